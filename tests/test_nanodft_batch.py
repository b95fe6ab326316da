"""Many geometries at once: the numbers and errors of one by one, for the operators of one."""

import nanodft_cases as cases
import numpy as np
import pytest
import torch
from ase.units import Bohr, Hartree
from torch.utils._python_dispatch import TorchDispatchMode

from md_plugin.nanodft import (
    ConvergenceError,
    Molecule,
    Settings,
    UnsupportedSystem,
    energy_forces,
    energy_forces_batch,
    exchange_correlation,
    integrals,
)
from md_plugin.nanodft.integrals import two_electron_gradient
from md_plugin.nanodft.scf import Convergence, solve

WATER = [8, 1, 1]
CONFORMERS = np.stack([cases.displaced("H2O", seed, 0.1).positions for seed in range(8)])
QUICK = {"basis": "sto-3g", "grid_level": 0}


def assert_same(result, expected):
    assert abs(result.energy - expected.energy) / Hartree < 1e-9
    assert abs(result.forces - expected.forces).max() / (Hartree / Bohr) < 1e-8
    assert result.n_iter == expected.n_iter and result.terms.keys() == expected.terms.keys()
    np.testing.assert_allclose(result.dipole, expected.dipole, rtol=0, atol=1e-8)
    np.testing.assert_allclose(result.dm, expected.dm, rtol=0, atol=1e-8)
    assert result.homo_lumo_gap == pytest.approx(expected.homo_lumo_gap, abs=1e-7)


@pytest.mark.parametrize("backend", ["torch", "numba", "libcint"])
@pytest.mark.parametrize("xc", ["hf", "svwn", "b3lyp"])
def test_the_numbers_of_one_by_one_in_any_order(xc, backend):
    settings = {**QUICK, "xc": xc, "backend": backend}
    batch = energy_forces_batch(WATER, CONFORMERS[:4], **settings)
    backwards = energy_forces_batch(WATER, list(CONFORMERS[3::-1]), **settings)[::-1]
    for k, x in enumerate(CONFORMERS[:4]):
        alone = energy_forces(WATER, x, **settings)
        assert_same(batch[k], alone)
        assert_same(backwards[k], alone)


@pytest.mark.parametrize("call", ["eri", "two_electron_gradient"])
@pytest.mark.parametrize("backend", ["torch", "numba", "libcint"])
def test_two_electron_integrals_of_many(call, backend):
    x = torch.from_numpy(CONFORMERS[:4] / Bohr).view(2, 2, 3, 3)
    a = torch.randn(2, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def one(k):
        if call == "eri":
            return integrals.eri(WATER, x[k], "sto-3g", backend, max_memory_mb=1.5)
        dm = (a + a.mT)[k]
        options = {"basis": "sto-3g", "hyb": 0.2, "backend": backend, "max_memory_mb": 1}
        return two_electron_gradient(WATER, x[k], dm, **options)

    alone = torch.stack([torch.stack([one((i, j)) for j in range(2)]) for i in range(2)])
    torch.testing.assert_close(one(...), alone, rtol=0, atol=1e-11)


class Operators(TorchDispatchMode):
    """Counts what torch is asked to compute: each is a launch, or several, on a GPU."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("xc", ["hf", "b3lyp"])
def test_eight_molecules_cost_the_operators_of_one(xc, monkeypatch):
    """Cut into chunks as on a GPU, where launches cost: on CPUs they follow the cache instead."""
    monkeypatch.setitem(exchange_correlation.CHUNK_BYTES, "cpu", 2 * 10**9)
    settings = {**QUICK, "xc": xc, "backend": "torch", "max_memory_mb": 8000}
    energy_forces(WATER, CONFORMERS[0], **settings)  # tables are made once
    counts = []
    for n in (1, 8):
        with Operators() as operators:
            energy_forces_batch(WATER, CONFORMERS[:n], **settings)
        counts.append(operators.n)
    assert counts[0] > 1000
    assert counts[1] < 1.2 * counts[0]


def test_memory_bound_cuts_batches_and_changes_nothing(monkeypatch):
    settings = {**QUICK, "backend": "numba"}
    whole = energy_forces_batch(WATER, CONFORMERS, **settings)
    sizes, original = [], Molecule.hamiltonian
    monkeypatch.setattr(
        Molecule, "hamiltonian", lambda self, x: sizes.append(len(x)) or original(self, x)
    )
    cut = energy_forces_batch(WATER, CONFORMERS, max_memory_mb=4, **settings)
    assert sum(sizes) == 8 and 1 < max(sizes) < 8
    for result, expected in zip(cut, whole, strict=True):
        assert_same(result, expected)


def test_no_conformers_no_results():
    assert energy_forces_batch(WATER, [], **QUICK) == []


# ---- one of them fails ---------------------------------------------------------------------------


def test_a_conformer_that_cannot_be_is_named():
    bad = CONFORMERS[0].copy()
    bad[1] = bad[0]
    with pytest.raises(ValueError, match=r"atoms 0 and 1 are 0\.000 Å apart") as caught:
        energy_forces_batch(WATER, [CONFORMERS[0], bad], basis="sto-3g", xc="hf")
    assert caught.value.__notes__ == ["in conformer 1"]


def test_the_others_are_not_lost():
    """Three fail, each in its way: overlap, distance, shape."""
    lithium = 2.5 * np.random.default_rng(0).normal(size=(3, 6, 3))
    near, twice = 0.11 * np.vstack([np.eye(3), -np.eye(3)]), lithium[0].copy()
    twice[3] = twice[1]
    given = [lithium[0], near, lithium[1], twice, lithium[2][:2]]
    settings = {"xc": "hf", "basis": "6-31g", "backend": "numba"}
    found = energy_forces_batch([3] * 6, given, return_exceptions=True, **settings)
    for k, error, words in (
        (1, UnsupportedSystem, "linearly dependent"),
        (3, ValueError, "atoms 1 and 3 are"),
        (4, ValueError, "shape (2, 3)"),
    ):
        assert type(found[k]) is error and words in str(found[k])
        assert found[k].__notes__ == [f"in conformer {k}"]
    for k in (0, 2):
        assert_same(found[k], energy_forces([3] * 6, given[k], **settings))


def test_one_that_does_not_converge_is_that_one():
    settings = {**QUICK, "xc": "hf", "backend": "numba"}
    stretched = CONFORMERS[0] * 2.6
    given = [CONFORMERS[1], stretched, CONFORMERS[2]]
    cycles = [energy_forces(WATER, x, **settings).n_iter for x in given]
    limit = cycles[1] - 1
    assert max(cycles[0], cycles[2]) <= limit, "the stretched one takes the most cycles"
    found = energy_forces_batch(WATER, given, max_cycle=limit, return_exceptions=True, **settings)
    assert isinstance(found[1], ConvergenceError) and f"in {limit} cycles" in str(found[1])
    for k in (0, 2):
        assert_same(found[k], energy_forces(WATER, given[k], **settings))
    with pytest.raises(ConvergenceError, match="no convergence") as caught:
        energy_forces_batch(WATER, given, max_cycle=limit, **settings)
    assert caught.value.__notes__ == ["in conformer 1"]


def test_what_is_not_finite_ends_alone():
    molecule = Molecule(WATER, Settings(xc="hf", backend="numba", **QUICK))
    problem = molecule.hamiltonian(torch.from_numpy(CONFORMERS[:2] / Bohr))
    start = 0.5 * torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)
    expected = solve(problem, start, 5, Convergence())
    start[0, 0, 0] = torch.inf
    state = solve(problem, start, 5, Convergence())
    assert str(state.errors[0]) == "the energy is not finite in cycle 1"
    assert state.errors[1] is None and expected.errors == (None, None)
    torch.testing.assert_close(state.dm[1], expected.dm[1], rtol=0, atol=1e-10)
