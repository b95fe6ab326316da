"""The self-consistent field: matrices, stationarity, starting points, convergence."""

import nanodft_cases as cases
import numpy as np
import pytest
import torch
from ase.units import Hartree

from md_plugin.nanodft import ConvergenceError, Molecule, Settings, energy_forces
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.guess import superposition_of_atoms
from md_plugin.nanodft.scf import (
    Convergence,
    Diis,
    coulomb_matrix,
    exchange_matrix,
    purify,
    solve,
)

QUICK = {"basis": "sto-3g", "grid_level": 0}


@pytest.fixture(scope="module")
def water():
    """(molecule, Hamiltonian, converged state) of one H2O in B3LYP/6-31G."""
    from ase.units import Bohr

    atoms = cases.displaced("H2O")
    molecule = Molecule(atoms.numbers, Settings(grid_level=0))
    problem = molecule.hamiltonian(torch.from_numpy(atoms.positions / Bohr)[None])
    start = superposition_of_atoms(molecule.basis)[None]
    return molecule, problem, solve(problem, start, 5, Convergence(1e-11, 1e-9))


def random_symmetric(n):
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return a + a.T


def test_coulomb_and_exchange_matrices_are_their_sums(water):
    eri = water[1].eri[0]
    dm = random_symmetric(len(eri))
    coulomb, exchange = (torch.einsum(f"{s},kl->ij", eri, dm) for s in ("ijkl", "ikjl"))
    torch.testing.assert_close(coulomb_matrix(eri, dm), coulomb, rtol=0, atol=1e-12)
    torch.testing.assert_close(exchange_matrix(eri, dm), exchange, rtol=0, atol=1e-12)


def test_fock_matrix_is_the_derivative_of_the_energy(water):
    """For any symmetric density, not only the converged one; pins J, K, V_xc and their factors."""
    _, problem, state = water
    direction = random_symmetric(state.dm.shape[-1])
    dm, h = 0.9 * state.dm, 1e-4
    sides = [sum(problem.fock(dm + s * h * direction)[1].values()) for s in (1, -1)]
    slope = (sides[0] - sides[1]) / (2 * h)
    assert slope == pytest.approx(float((problem.fock(dm)[0] * direction).sum()), rel=1e-6)


def test_converged_density(water):
    _, problem, state = water
    dm, overlap = state.dm[0], problem.overlap[0]
    assert float((dm * overlap).sum()) == pytest.approx(10, abs=1e-12)
    torch.testing.assert_close(dm @ overlap @ dm, 2 * dm, rtol=0, atol=1e-11)
    fds = problem.fock(state.dm)[0][0] @ dm @ overlap
    assert (fds - fds.T).abs().max() < 1e-8
    # W = 2 C eps C^T
    occupied = state.orbital_energies[0, :5]
    weighted = (state.energy_weighted_dm * overlap).sum()
    assert float(weighted) == pytest.approx(2 * float(occupied.sum()), abs=1e-9)


def test_energy_is_a_minimum(water):
    _, problem, state = water
    x = problem.root[0]
    a = random_symmetric(len(x)).triu(1)
    for angle in (-1e-2, 1e-2):
        turn = torch.linalg.matrix_exp(angle * (a - a.T))
        rotation = x @ turn @ torch.linalg.inv(x)
        turned = rotation @ state.dm @ rotation.T
        assert sum(problem.fock(turned)[1].values()) > state.energy + 1e-6


def test_terms_add_up_to_the_energy():
    atoms = cases.displaced("NH3")
    expected = {"kinetic", "nuclear_attraction", "nuclear_repulsion", "coulomb"}
    for xc, more in (
        ("hf", {"exact_exchange"}),
        ("svwn", {"xc"}),
        ("b3lyp", {"exact_exchange", "xc"}),
    ):
        result = energy_forces(atoms.numbers, atoms.positions, xc=xc, **QUICK)
        assert result.terms.keys() == expected | more
        assert sum(result.terms.values()) * Hartree == pytest.approx(result.energy, rel=1e-14)
        assert result.terms["kinetic"] > 0 > result.terms["nuclear_attraction"]
    repulsion = cases.mole(atoms).energy_nuc()
    assert result.terms["nuclear_repulsion"] == pytest.approx(repulsion, rel=1e-12)


@pytest.mark.parametrize("name", ["HCl", "CH4", "Si2H6"])
def test_guess_has_the_electrons_of_neutral_atoms(name):
    atoms = cases.displaced(name)
    for basis in ("sto-3g", "6-31g"):
        dm = superposition_of_atoms(Basis.build(atoms.numbers, basis))
        overlap = torch.from_numpy(cases.mole(atoms, basis).intor("int1e_ovlp"))
        # between atoms the guess is zero, and within an atom the overlap knows no positions
        assert float((dm * overlap).sum()) == pytest.approx(atoms.numbers.sum(), abs=1e-8)


@pytest.mark.parametrize("number", [2, 10, 18, 4, 12])
def test_guess_of_closed_shells_is_hartree_fock(number):
    atoms = cases.Atoms([number])
    dm = superposition_of_atoms(Basis.build([number], "6-31g"))
    field = cases.mean_field(atoms, "hf", "6-31g")
    np.testing.assert_allclose(dm, field.make_rdm1(), atol=1e-5)


def test_guess_is_near_enough():
    """No more cycles than PySCF needs, plus one."""
    for name in ("H2O", "HCN", "C2H4"):
        atoms = cases.displaced(name)
        field = cases.mean_field(atoms, "b3lyp", "6-31g", level=0)
        result = energy_forces(
            atoms.numbers, atoms.positions, grid_level=0, conv_tol=1e-12, conv_tol_grad=1e-8
        )
        assert result.n_iter <= field.cycles + 2


def test_start_from_a_density_is_quicker_and_ends_at_the_same_place():
    atoms = cases.displaced("NH3")
    cold = energy_forces(atoms.numbers, atoms.positions, **QUICK)
    near = cases.displaced("NH3")
    near.rattle(0.01)
    start = energy_forces(near.numbers, near.positions, **QUICK).dm
    for dm0 in (start, torch.from_numpy(start)):
        warm = energy_forces(atoms.numbers, atoms.positions, dm0=dm0, **QUICK)
        assert warm.n_iter < cold.n_iter
        assert warm.energy == pytest.approx(cold.energy, abs=1e-9 * Hartree)
        np.testing.assert_allclose(warm.forces, cold.forces, atol=5e-6)
    same = energy_forces(atoms.numbers, atoms.positions, dm0=cold.dm, **QUICK)
    assert same.n_iter <= 3


def test_a_start_that_leads_nowhere_is_repeated_from_atoms(monkeypatch):
    atoms = cases.displaced("H2O")
    from md_plugin.nanodft import molecule

    calls = []

    def solve_warm_fails(problem, dm, n_occ, stop):
        calls.append(dm)
        return solve(problem, dm, n_occ, Convergence(max_cycle=2) if len(calls) == 1 else stop)

    monkeypatch.setattr(molecule, "solve", solve_warm_fails)
    cold = energy_forces(atoms.numbers, atoms.positions, dm0=np.eye(7), xc="hf", **QUICK)
    monkeypatch.undo()
    assert len(calls) == 2
    assert cold.energy == energy_forces(atoms.numbers, atoms.positions, xc="hf", **QUICK).energy


def test_purify_keeps_what_is_pure_and_mends_what_is_not(water):
    _, problem, state = water
    pure = purify(state.dm, problem, 5)
    torch.testing.assert_close(pure, state.dm, rtol=0, atol=1e-9)
    mended = purify(0.8 * state.dm + 0.01 * random_symmetric(13), problem, 5)
    assert float((mended * problem.overlap).sum()) == pytest.approx(10, abs=1e-10)


def test_diis_finds_the_combination_whose_error_vanishes():
    focks = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    errors = torch.zeros(3, 4, 4, dtype=torch.float64)
    errors[0, 0, 1], errors[1, 0, 1], errors[2, 2, 3] = 1.0, -3.0, 5.0
    diis = Diis()
    torch.testing.assert_close(diis.extrapolate(focks[0], errors[0]), focks[0])
    expected = 0.75 * focks[0] + 0.25 * focks[1]
    torch.testing.assert_close(diis.extrapolate(focks[1], errors[1]), expected)
    torch.testing.assert_close(diis.extrapolate(focks[2], errors[2]), expected)


@pytest.mark.parametrize("settings", [{"max_cycle": 3}, {"conv_tol_grad": 1e-15, "max_cycle": 20}])
def test_what_has_not_converged_is_no_result(settings):
    atoms = cases.displaced("H2O")
    message = r"no convergence in (3|20) cycles: the energy still changes by .* Ha and the orbital"
    with pytest.raises(ConvergenceError, match=message):
        energy_forces(atoms.numbers, atoms.positions, **QUICK, **settings)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_modes_of_torch_do_not_matter(mode, dtype):
    atoms = cases.displaced("H2O")
    expected = energy_forces(atoms.numbers, atoms.positions, **QUICK)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with mode():
            result = energy_forces(atoms.numbers, atoms.positions, **QUICK)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    finally:
        torch.set_default_dtype(default)
    assert result.energy == expected.energy
    assert np.array_equal(result.forces, expected.forces)


def test_backends_agree_and_are_named():
    atoms = cases.displaced("HCN")
    results = [
        energy_forces(atoms.numbers, atoms.positions, backend=backend, conv_tol_grad=1e-8, **QUICK)
        for backend in ("torch", "numba", "libcint", "auto")
    ]
    assert [r.backend for r in results] == ["torch", "numba", "libcint", "numba"]
    assert {r.device for r in results} == {"cpu"}
    for result in results[1:]:
        assert result.energy == pytest.approx(results[0].energy, abs=1e-8)
        np.testing.assert_allclose(result.forces, results[0].forces, rtol=0, atol=1e-6)


def test_gap_and_dipole_have_their_units_and_signs():
    """Oxygen pulls the electrons: the dipole points from O to the hydrogens; literature 1.85 D."""
    from ase.build import molecule
    from ase.units import Debye

    atoms = molecule("H2O")
    result = energy_forces(atoms.numbers, atoms.positions, grid_level=1)
    towards_hydrogen = atoms.positions[1:].mean(0) - atoms.positions[0]
    assert result.dipole @ towards_hydrogen > 0
    assert 1.5 < np.linalg.norm(result.dipole) / Debye < 2.7
    assert 5 < result.homo_lumo_gap < 12


def test_no_orbital_empty():
    """He in STO-3G has one orbital and no gap."""
    result = energy_forces([2], np.zeros((1, 3)), xc="hf", basis="sto-3g")
    assert result.homo_lumo_gap == np.inf
    assert result.energy / Hartree == pytest.approx(-2.807784, abs=1e-6)
    assert not result.forces.any()
