"""Molecule: a composition and a method, and with them the energies and forces of its geometries.

    Settings -> Molecule (basis, grid, guess: once) -> integrals -> SCF -> gradient -> Result

A stage takes many geometries as one: its tensors have an axis of them, first. Geometries are in Å,
results in eV and eV/Å with the constants of ase.units; inside, everything is in Hartree and bohr.
Forces are minus the derivative of the energy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase.units import Bohr, Hartree
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from md_plugin.devices import choose_device
from md_plugin.nanodft import integrals
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.checks import (
    Settings,
    check_density,
    check_numbers,
    check_positions,
    count_pairs,
)
from md_plugin.nanodft.exchange_correlation import CHUNK_BYTES, GridIntegrals
from md_plugin.nanodft.functionals import get_functional
from md_plugin.nanodft.gradient import nuclear_repulsion, one_electron_gradient
from md_plugin.nanodft.grid import Grid
from md_plugin.nanodft.guess import superposition_of_atoms
from md_plugin.nanodft.orbitals import Orbitals
from md_plugin.nanodft.scf import (
    Convergence,
    Hamiltonian,
    State,
    inverse_root,
    linear_dependence,
    purify,
    solve,
)
from md_plugin.nanodft.shell_pairs import shell_pairs

_MOST = 4096  # geometries at once; a GPU is full long before, and its grids end at 65,535
# Of one-electron integrals and their graph, per pair of primitives and atom; measured.
_BYTES_OF_PAIR = 700
_MIN_GRID_BYTES = 16_000_000  # left for the grid where the integrals take nearly all


@dataclass(frozen=True, eq=False)
class Result:
    """What one calculation gives.

    Attributes:
        energy: eV.
        forces: (n_atom, 3) eV/Å, minus the derivative of the energy.
        converged: always True: what has not converged is a ConvergenceError.
        n_iter: Fock matrices that were made.
        dm: (n_ao, n_ao) density matrix, in PySCF's order of functions.
        homo_lumo_gap: eV; infinite where no orbital is empty.
        dipole: (3,) e Å, about the origin of the coordinates (it matters only for ions).
        terms: parts of the energy, Ha.
        backend: of the two-electron integrals, by name.
        device: where it ran.
    """

    energy: float
    forces: NDArray[np.float64]
    converged: bool
    n_iter: int
    dm: NDArray[np.float64]
    homo_lumo_gap: float
    dipole: NDArray[np.float64]
    terms: dict[str, float]
    backend: str
    device: str


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` consecutive items; of Python 3.12's itertools, for 3.11."""
    rest = iter(items)
    while part := list(itertools.islice(rest, size)):
        yield part


class Molecule:
    """A composition with everything that its geometries share.

    Args:
        numbers: (n_atom,) atomic numbers.
        settings: the method of computation.

    Raises:
        ValueError, UnsupportedSystem, BackendError: as `energy_forces`.
    """

    @torch.inference_mode(False)  # its tensors could never meet autograd
    def __init__(self, numbers: ArrayLike, settings: Settings):
        self.settings = settings
        self.numbers = check_numbers(numbers)
        self.n_pair = count_pairs(self.numbers, settings.charge)
        self.device = choose_device(settings.device)
        self.backend = integrals.get_backend(settings.backend, self.device)
        self.functional = get_functional(settings.xc)
        self.basis = Basis.build(self.numbers, settings.basis)
        self._charges = torch.tensor(self.numbers, dtype=torch.float64, device=self.device)
        self._orbitals = Orbitals.of(self.basis, self.device)
        self._grid: Grid | None = None
        if self.functional.density_functional is not None:
            self._grid = Grid.build(self.numbers, settings.grid_level, self.device)
        self._atoms: Tensor | None = None

    @torch.inference_mode(False)
    def evaluate(self, positions: ArrayLike | Tensor, dm0: Any = None) -> Result:
        """Energy and forces at positions (n_atom, 3), Å; see `energy_forces`.

        A start from dm0 that does not converge is repeated from free atoms, so that success does
        not depend on the history.
        """
        geometry = check_positions(positions, len(self.numbers))
        if dm0 is not None:
            dm0 = check_density(dm0, self.basis.n_ao).to(self.device)[None]
        (outcome,) = self._together([geometry], dm0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def outcomes(self, conformers: Iterable[Any]) -> Iterator[Result | Exception]:
        """The result of each geometry (n_atom, 3), Å, or its error; as many at once as fit."""
        for many in batched(conformers, self._n_together()):
            geometries: list[NDArray[np.float64] | Exception] = []
            for positions in many:
                try:
                    geometries.append(check_positions(positions, len(self.numbers)))
                except ValueError as error:
                    geometries.append(error)
            good = [x for x in geometries if not isinstance(x, Exception)]
            found = iter(self._together(good) if good else ())
            for x in geometries:
                yield x if isinstance(x, Exception) else next(found)

    def _n_together(self) -> int:
        """Geometries whose integrals, and values of functions on the grid, fit the memory."""
        limit, n_ao = int(self.settings.max_memory_mb * 1e6), self.basis.n_ao
        n_pair = shell_pairs(self.basis, self.device).exponent.shape[1]
        each = integrals.eri_bytes(n_ao) + n_pair * (_BYTES_OF_PAIR * len(self.numbers) + 2000)
        if self._grid is not None:
            limit -= min(limit // 2, CHUNK_BYTES[self.device.type])
            each += 8 * len(self._grid) * (n_ao * (4 if self.functional.gradient else 1) + 1)
        return min(max(1, limit // each), _MOST)

    @torch.inference_mode(False)
    def _together(
        self, geometries: list[NDArray[np.float64]], dm0: Tensor | None = None
    ) -> list[Result | Exception]:
        """Results or errors of geometries (n_atom, 3), Å, in one pass."""
        x = torch.as_tensor(np.stack(geometries) / Bohr, device=self.device)
        smallest = torch.linalg.eigvalsh(integrals.overlap(self.basis, x))[:, 0].tolist()
        outcomes: list[Result | Exception | None] = [linear_dependence(value) for value in smallest]
        sound = [k for k, error in enumerate(outcomes) if error is None]
        if sound:
            x = x[sound]
            problem = self.hamiltonian(x)
            state = self._solve(problem, dm0)
            gradient = self._gradient(x, problem, state)
            for k, outcome in zip(sound, self._results(x, state, gradient), strict=True):
                outcomes[k] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def _results(self, x: Tensor, state: State, gradient: Tensor) -> Iterator[Result | Exception]:
        """Of each geometry, in eV and Å."""
        moments = -(integrals.dipole(self.basis, x) * state.dm[:, None]).sum((-1, -2))
        dipole = ((moments + self._charges @ x) * Bohr).cpu().numpy()
        forces, dm = -gradient.cpu().numpy() * (Hartree / Bohr), state.dm.cpu().numpy()
        energy, gap = (state.energy * Hartree).tolist(), (state.gap * Hartree).tolist()
        n_iter, terms = state.n_iter.tolist(), {n: t.tolist() for n, t in state.terms.items()}
        for k, error in enumerate(state.errors):
            yield error or Result(
                energy=energy[k],
                forces=forces[k],
                converged=True,
                n_iter=n_iter[k],
                dm=dm[k],
                homo_lumo_gap=gap[k],
                dipole=dipole[k],
                terms={name: values[k] for name, values in terms.items()},
                backend=self.backend,
                device=str(self.device),
            )

    def hamiltonian(self, x: Tensor) -> Hamiltonian:
        """Integrals and grid at positions x (n_mol, n_atom, 3) in bohr; they need no density."""
        settings, basis, functional = self.settings, self.basis, self.functional
        overlap = integrals.overlap(basis, x)
        root = inverse_root(overlap)  # before the long integrals: it may refuse the geometry
        memory = settings.max_memory_mb
        eri = integrals.eri(self.numbers, x, basis, self.backend, max_memory_mb=memory)
        xc = None
        if self._grid is not None:
            left = max(int(memory * 1e6) - eri.nbytes, _MIN_GRID_BYTES)
            xc = GridIntegrals(functional, self._orbitals, self._grid, x, left)
        return Hamiltonian(
            overlap=overlap,
            root=root,
            kinetic=integrals.kinetic(basis, x),
            nuclear=integrals.nuclear(basis, x, self._charges),
            eri=eri,
            hyb=functional.hyb,
            repulsion=nuclear_repulsion(self._charges, x),
            xc=xc,
        )

    def _solve(self, problem: Hamiltonian, dm0: Tensor | None) -> State:
        settings = self.settings
        stop = Convergence(settings.conv_tol, settings.conv_tol_grad, settings.max_cycle)
        if dm0 is not None:
            state = solve(problem, purify(dm0, problem, self.n_pair), self.n_pair, stop)
            if not any(state.errors):
                return state
        if self._atoms is None:
            self._atoms = superposition_of_atoms(self.basis).to(self.device)
        start = self._atoms.expand(problem.overlap.shape).contiguous()
        return solve(problem, start, self.n_pair, stop)

    def _gradient(self, x: Tensor, problem: Hamiltonian, state: State) -> Tensor:
        """(n_mol, n_atom, 3) dE/dR, Ha/bohr."""
        settings = self.settings
        gradient = one_electron_gradient(self.basis, self._charges, x, state)
        gradient += integrals.two_electron_gradient(
            self.numbers,
            x,
            state.dm,
            basis=self.basis,
            hyb=self.functional.hyb,
            backend=self.backend,
            max_memory_mb=settings.max_memory_mb,
        )
        if problem.xc is not None:
            gradient += problem.xc.gradient(state.dm, settings.grid_response)
        return gradient
