"""NanoDFTCalculator: ASE's contract, warm starts without memory, settings, refusals."""

import copy
import pickle

import nanodft_cases as cases
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import InputError, PropertyNotImplementedError, SCFError
from ase.calculators.fd import calculate_numerical_forces
from ase.io import read, write
from ase.optimize import BFGS

from md_plugin.nanodft import NanoDFTCalculator, Settings, UnsupportedSystem, energy_forces
from md_plugin.nanodft.molecule import Molecule

QUICK = {"xc": "hf", "basis": "sto-3g"}


def attached(name="H2O", seed=0, **settings):
    atoms = cases.displaced(name, seed)
    atoms.calc = NanoDFTCalculator(**{**QUICK, **settings})
    return atoms


@pytest.fixture
def iterations(monkeypatch):
    """Number of cycles of each calculation, in order."""
    original, found = Molecule.evaluate, []

    def evaluate(self, *args):
        result = original(self, *args)
        found.append(result.n_iter)
        return result

    monkeypatch.setattr(Molecule, "evaluate", evaluate)
    return found


def test_results_are_those_of_energy_forces():
    settings = {"xc": "b3lyp", "basis": "6-31g", "grid_level": 0}
    atoms = attached("NH3", **settings)
    expected = energy_forces(atoms.numbers, atoms.positions, **settings)
    assert atoms.get_potential_energy() == expected.energy
    assert atoms.get_potential_energy(force_consistent=True) == expected.energy
    assert np.array_equal(atoms.get_forces(), expected.forces)
    assert np.array_equal(atoms.get_dipole_moment(), expected.dipole)


def test_forces_are_numerical_derivatives():
    atoms = attached(conv_tol_grad=1e-8)
    numerical = calculate_numerical_forces(atoms, eps=1e-3)
    np.testing.assert_allclose(atoms.get_forces(), numerical, atol=1e-4)


def test_one_calculation_for_all_properties(iterations):
    atoms = attached()
    atoms.get_forces()
    atoms.get_potential_energy()
    atoms.get_dipole_moment()
    assert len(iterations) == 1
    atoms.positions[0, 0] += 0.01
    atoms.get_potential_energy()
    assert len(iterations) == 2


def test_result_does_not_depend_on_history():
    end = cases.displaced("H2O", seed=5)
    found = []
    for seeds in ((), (1,), (2, 3, 4)):
        atoms = attached(grid_level=0, xc="b3lyp")
        for seed in seeds:
            atoms.positions = cases.displaced("H2O", seed, 0.2).positions
            atoms.get_forces()
        atoms.positions = end.positions
        found.append((atoms.get_potential_energy(), atoms.get_forces()))
    for energy, forces in found[1:]:
        assert energy == pytest.approx(found[0][0], abs=1e-8)
        np.testing.assert_allclose(forces, found[0][1], atol=5e-6)


def test_warm_start_saves_cycles_and_can_be_switched_off(iterations):
    for warm_start in (True, False):
        atoms = attached(warm_start=warm_start)
        atoms.get_forces()
        atoms.positions[1] += 0.002
        atoms.get_forces()
    assert iterations[1] < iterations[0]
    assert iterations[2] == iterations[0]
    assert iterations[3] >= iterations[0] - 1


def test_other_atoms_start_afresh(iterations):
    atoms = attached("H2O")
    atoms.get_forces()
    calculator = atoms.calc
    other = cases.displaced("NH3")
    expected = energy_forces(other.numbers, other.positions, **QUICK)
    assert calculator.get_potential_energy(other) == expected.energy
    turned = atoms[[1, 0, 2]]
    expected = energy_forces(turned.numbers, turned.positions, **QUICK)
    assert calculator.get_potential_energy(turned) == expected.energy


def test_settings_are_parameters():
    atoms = attached(grid_level=0)
    assert atoms.calc.parameters["xc"] == "hf" and atoms.calc.parameters["conv_tol"] == 1e-10
    energy = atoms.get_potential_energy()
    assert atoms.calc.set(xc="svwn") == {"xc": "svwn"}
    assert atoms.calc.results == {}
    expected = energy_forces(
        atoms.numbers, atoms.positions, xc="svwn", basis="sto-3g", grid_level=0
    ).energy
    assert atoms.get_potential_energy() == expected != energy
    with pytest.raises(ValueError, match="xc 'pbe' is not known"):
        atoms.calc.set(xc="pbe")
    assert atoms.calc.parameters["xc"] == "svwn"
    with pytest.raises(
        ValueError, match=r"unknown settings \['functional'\]; known are charge, xc"
    ):
        NanoDFTCalculator(functional="hf")
    assert set(NanoDFTCalculator.default_parameters) == set(vars(Settings()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_live_on_their_own(duplicate):
    atoms = attached(xc="b3lyp", grid_level=0)
    forces = atoms.get_forces()
    twin = duplicate(atoms)
    assert np.array_equal(twin.get_forces(), forces)
    twin.positions[0] += 0.1
    twin.get_forces()
    assert np.array_equal(atoms.get_forces(), forces)


@pytest.mark.parametrize("suffix", ["traj", "extxyz"])
def test_written_and_read_again(tmp_path, suffix):
    atoms = attached()
    forces = atoms.get_forces()
    write(tmp_path / f"a.{suffix}", atoms)
    again = read(tmp_path / f"a.{suffix}")
    assert again.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(again.get_forces(), forces, atol=1e-7)


def test_optimiser_finds_the_bond_length():
    """H2, Hartree-Fock in STO-3G: 1.346 bohr (Szabo and Ostlund, table 3.11)."""
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.8]], calculator=NanoDFTCalculator(**QUICK))
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=20)
    assert atoms.get_distance(0, 1) / 0.529177 == pytest.approx(1.346, abs=2e-3)


@pytest.mark.parametrize("pbc", [True, (False, False, True)])
def test_periodic_boxes_are_refused(pbc):
    atoms = attached()
    atoms.cell, atoms.pbc = [9, 9, 9], pbc
    with pytest.raises(InputError, match="nanodft computes molecules, but pbc is"):
        atoms.get_potential_energy()
    atoms.pbc = False
    assert atoms.get_potential_energy() < 0


def test_stress_is_refused():
    atoms = attached()
    atoms.cell = [9, 9, 9]
    with pytest.raises(PropertyNotImplementedError, match="stress"):
        atoms.get_stress()


def test_magnetic_moments_are_refused():
    atoms = attached()
    atoms.set_initial_magnetic_moments([1, 0, 0])
    with pytest.raises(InputError, match="nanodft computes closed shells, but the atoms have mag"):
        atoms.get_forces()


def test_no_convergence_leaves_no_numbers():
    atoms = attached(max_cycle=2)
    for _ in range(2):
        with pytest.raises(SCFError, match="no convergence in 2 cycles"):
            atoms.get_forces()
        assert not atoms.calc.results
    atoms.calc.set(max_cycle=60)
    assert np.isfinite(atoms.get_forces()).all()


def test_bad_geometries_are_told_and_forgotten():
    atoms = attached()
    good = atoms.positions.copy()
    atoms.positions[1] = np.nan
    with pytest.raises(ValueError, match="positions are not finite: atom 1"):
        atoms.get_forces()
    atoms.positions = good
    assert np.isfinite(atoms.get_forces()).all()
    radical = Atoms("OH", [[0, 0, 0], [0, 0, 1.0]], calculator=NanoDFTCalculator(**QUICK))
    with pytest.raises(UnsupportedSystem, match=r"9 electrons \(charge 0\) are no closed shell"):
        radical.get_potential_energy()
    radical.calc.set(charge=-1)
    assert radical.get_potential_energy() < 0
