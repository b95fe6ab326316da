"""Energies and forces: against PySCF, against finite differences, conserved in dynamics."""

import nanodft_cases as cases
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from ase.units import Bohr, Hartree
from scipy.spatial.transform import Rotation

from md_plugin.nanodft import NanoDFTCalculator, energy_forces
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.exchange_correlation import GridIntegrals
from md_plugin.nanodft.functionals import METHODS
from md_plugin.nanodft.grid import Grid
from md_plugin.nanodft.orbitals import Orbitals

FORCE = Hartree / Bohr  # eV/Å in a Hartree per bohr
CASES = [
    (name, xc, basis) for name in cases.NAMES for xc in METHODS for basis in ("sto-3g", "6-31g")
]


def compute(atoms, **settings):
    return energy_forces(atoms.numbers, atoms.positions, **settings)


@pytest.mark.parametrize(("name", "xc", "basis"), CASES)
def test_energy_and_forces_are_those_of_pyscf(name, xc, basis):
    atoms = cases.displaced(name)
    field = cases.mean_field(atoms, xc, basis, level=0)
    result = compute(atoms, xc=xc, basis=basis, grid_level=0)
    assert result.converged
    assert abs(result.energy / Hartree - field.e_tot) < 1e-9
    assert abs(result.forces / FORCE + cases.gradient(field)).max() < 3e-8
    assert abs(result.forces.sum(0)).max() / FORCE < 1e-9
    occupied = field.mo_occ > 0
    gap = field.mo_energy[~occupied].min() - field.mo_energy[occupied].max()
    assert result.homo_lumo_gap / Hartree == pytest.approx(gap, abs=1e-6)
    dipole = field.dip_moment(unit="au", verbose=0)
    np.testing.assert_allclose(result.dipole / Bohr, dipole, atol=1e-5)
    np.testing.assert_allclose(result.dm, field.make_rdm1(), atol=1e-5)


@pytest.mark.parametrize("name", ["H2O", "NH3"])
def test_on_the_default_grid_and_tolerances(name):
    atoms = cases.displaced(name, seed=1)
    field = cases.mean_field(atoms, "b3lyp", "6-31g", level=3)
    result = compute(atoms)
    assert abs(result.energy / Hartree - field.e_tot) < 1e-9
    assert abs(result.forces / FORCE + cases.gradient(field)).max() < 1e-7


@pytest.mark.parametrize(("numbers", "charge"), [([8, 1, 1, 1], 1), ([8, 1], -1), ([2], 0)])
def test_ions_and_atoms(numbers, charge):
    generator = np.random.default_rng(3)
    positions = 0.9 * np.eye(4, 3, k=-1)[: len(numbers)] + generator.normal(
        scale=0.05, size=(len(numbers), 3)
    )
    atoms = Atoms(numbers, positions)
    field = cases.mean_field(atoms, "b3lyp", "6-31g", level=1, charge=charge)
    result = compute(atoms, charge=charge, grid_level=1)
    assert abs(result.energy / Hartree - field.e_tot) < 1e-9
    assert abs(result.forces / FORCE + cases.gradient(field)).max() < 2e-7


def four_point_difference(atoms, direction, **settings):
    """Slope of the energy along a direction (n, 3), eV/Å, to fourth order in 1e-3 bohr."""
    h, slope = 1e-3 * Bohr, 0.0
    for factor, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
        moved = atoms.positions + factor * h * direction
        slope += weight * energy_forces(atoms.numbers, moved, **settings).energy / (12 * h)
    return slope


@pytest.mark.parametrize(
    ("name", "xc", "level"),
    [("H2O", "b3lyp", 0), ("H2O", "b3lyp", 1), ("H2O", "b3lyp", 3), ("CH4", "svwn", 0)]
    + [("HCl", "b3lyp5", 0), ("HCN", "hf", 0), ("NH3", "svwn", 1)],
)
def test_forces_are_differences_of_the_energy(name, xc, level):
    atoms = cases.displaced(name)
    direction = np.random.default_rng(1).normal(size=atoms.positions.shape)
    settings = {"xc": xc, "grid_level": level, "conv_tol_grad": 1e-8}
    slope = four_point_difference(atoms, direction, **settings)
    expected = -(compute(atoms, **settings).forces * direction).sum()
    assert abs(slope - expected) / FORCE < 1e-7


def test_without_grid_response_forces_are_those_of_pyscf_and_no_derivative():
    """At a coarse grid the error is three orders above the agreement of the test before."""
    atoms = cases.displaced("H2O")
    settings = {"xc": "b3lyp", "grid_level": 0, "conv_tol_grad": 1e-8}
    with_response = compute(atoms, **settings)
    without = compute(atoms, grid_response=False, **settings)
    field = cases.mean_field(atoms, "b3lyp", "6-31g", level=0)
    expected = cases.gradient(field, grid_response=False)
    assert without.energy == with_response.energy
    assert abs(without.forces / FORCE + expected).max() < 1e-7
    assert abs(without.forces - with_response.forces).max() / FORCE > 1e-4
    assert abs(without.forces.sum(0)).max() / FORCE > 1e-4


@pytest.mark.parametrize("name", ["H2O", "CH4"])
def test_rotation_at_the_default_level(name):
    """A grid knows directions; level 3 hides them below what a fit to labels could see."""
    atoms = cases.displaced(name)
    first = compute(atoms, basis="sto-3g")
    for rotation in Rotation.random(2, rng=np.random.default_rng(0)):
        turned = energy_forces(atoms.numbers, rotation.apply(atoms.positions), basis="sto-3g")
        assert abs(turned.energy - first.energy) / Hartree < 1e-5
        assert abs(turned.forces - rotation.apply(first.forces)).max() / FORCE < 5e-5
        np.testing.assert_allclose(turned.dipole, rotation.apply(first.dipole), atol=1e-4)


def test_translation_and_order_of_atoms():
    atoms = cases.displaced("NH3")
    settings = {"grid_level": 0, "basis": "sto-3g"}
    first = compute(atoms, **settings)
    order = [2, 0, 3, 1]
    moved = energy_forces(
        atoms.numbers[order], atoms.positions[order] + [3.0, -7.0, 11.0], **settings
    )
    assert moved.energy == pytest.approx(first.energy, abs=1e-8)
    np.testing.assert_allclose(moved.forces, first.forces[order], atol=1e-5)
    np.testing.assert_allclose(moved.dipole, first.dipole, atol=1e-5)


def test_two_molecules_far_apart_are_two_molecules():
    a, b = cases.displaced("H2O"), cases.displaced("HCN")
    settings = {"xc": "svwn", "basis": "sto-3g", "grid_level": 1, "conv_tol_grad": 1e-8}
    both = Atoms(
        np.concatenate([a.numbers, b.numbers]),
        np.concatenate([a.positions, b.positions + [0.0, 300.0, 0.0]]),
    )
    together, alone = compute(both, **settings), [compute(x, **settings) for x in (a, b)]
    # dipoles of 0.5 e Å at 300 Å: 1e-7 eV
    assert together.energy == pytest.approx(sum(x.energy for x in alone), abs=1e-6)
    np.testing.assert_allclose(
        together.forces, np.concatenate([x.forces for x in alone]), atol=1e-5
    )


@pytest.mark.parametrize("xc", ["svwn", "b3lyp"])
def test_memory_bound_changes_nothing_but_time(xc):
    """Little memory: shorter chunks, and functions that are computed again in each cycle."""
    atoms = cases.displaced("NH3")
    basis, grid = Basis.build(atoms.numbers, "6-31g"), Grid.build(atoms.numbers, 0)
    x = torch.from_numpy(atoms.positions / Bohr)
    a = torch.randn(15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for max_bytes in (10**9, 5 * 10**5, 10**5):
        xc_of = GridIntegrals(METHODS[xc], Orbitals.of(basis), grid, x, max_bytes)
        for dm in (a @ a.T, 0.1 * a @ a.T):  # the second time with what was kept
            energy, potential = xc_of.potential(dm)
        energy = float(energy)
        kept = sum(tables.nbytes for tables in xc_of._kept)
        assert kept < max_bytes
        found.append((kept, energy, potential, xc_of.gradient(dm)))
    assert found[0][0] > found[1][0] > found[2][0]
    for _, energy, potential, gradient in found[1:]:
        assert energy == pytest.approx(found[0][1], rel=1e-12)
        torch.testing.assert_close(potential, found[0][2], rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient, found[0][3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("level", [0, 1])
def test_energy_and_momentum_are_conserved(level):
    atoms = cases.displaced("H2O", sigma=0.02)
    atoms.calc = NanoDFTCalculator(basis="sto-3g", grid_level=level)
    atoms.set_momenta(np.zeros((3, 3)))
    energies, momenta, kinetic = [], [], []
    dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.attach(lambda: momenta.append(atoms.get_momenta().sum(0)))
    dynamics.attach(lambda: kinetic.append(atoms.get_kinetic_energy()))
    dynamics.run(120)
    assert len(energies) == 121
    assert np.std(energies) / len(atoms) < 2e-3
    assert max(kinetic) > 0.1  # eV: what is conserved had been exchanged
    atomic_unit = np.sqrt(units._me / units._amu * Hartree)  # of momentum, in ASE's units
    assert abs(np.array(momenta)).max() / atomic_unit < 1e-6
