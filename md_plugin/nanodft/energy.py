"""Energies and forces of molecules: `energy_forces` for one geometry, a batch form for many.

    Settings -> Molecule (basis, grid, guess: once) -> SCF -> gradient -> Result

Geometries are in Å, results in eV and eV/Å with the constants of ase.units; inside, everything is
in Hartree and bohr. Forces are minus the derivative of the energy.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from md_plugin.nanodft.exchange_correlation import GridIntegrals
from md_plugin.nanodft.functionals import get_functional
from md_plugin.nanodft.gradient import nuclear_repulsion, one_electron_gradient
from md_plugin.nanodft.grid import Grid
from md_plugin.nanodft.guess import superposition_of_atoms
from md_plugin.nanodft.orbitals import Orbitals
from md_plugin.nanodft.scf import (
    Convergence,
    ConvergenceError,
    Hamiltonian,
    State,
    inverse_root,
    purify,
    solve,
)

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


def energy_forces(
    numbers: ArrayLike,
    positions: ArrayLike | Tensor,
    *,
    dm0: ArrayLike | Tensor | None = None,
    **settings: Any,
) -> Result:
    """Energy, forces and more of a closed-shell molecule.

    Args:
        numbers: (n_atom,) atomic numbers, 1 to 18.
        positions: (n_atom, 3) Å; a tensor must not require a gradient.
        dm0: (n_ao, n_ao) float64 density to start from, e.g. `dm` of a similar geometry; the
            result does not depend on it beyond the tolerances. Default: free atoms.
        **settings: fields of `Settings`: charge=0, xc="b3lyp", basis="6-31g", grid_level=3,
            grid_response=True, device="cpu", backend="auto", conv_tol=1e-10, conv_tol_grad=1e-7,
            max_cycle=60, max_memory_mb=1024.

    Raises:
        ValueError: bad input, each case with its own sentence (see `md_plugin.nanodft.checks`).
        UnsupportedSystem: a ValueError; the input makes sense, but nanodft cannot compute it.
        ConvergenceError: the self-consistent field did not converge.
        BackendError: an explicit backend is absent or unfit for the device.
        MemoryError: the integrals would exceed max_memory_mb; raised before allocating.
    """
    return Molecule(numbers, Settings(**settings)).evaluate(positions, dm0)


def energy_forces_batch(
    numbers: ArrayLike, positions: Sequence[Any] | NDArray[np.float64] | Tensor, **settings: Any
) -> list[Result]:
    """`energy_forces` for conformers of one composition.

    Basis, grid and tables are made once, and each conformer starts from the density of the one
    before. Results depend on the order by no more than the tolerances.

    Args:
        numbers: (n_atom,) atomic numbers.
        positions: (n_conformer, n_atom, 3) Å.
        **settings: fields of `Settings`.

    Raises:
        As `energy_forces`; a note says which conformer it was.
    """
    molecule = Molecule(numbers, Settings(**settings))
    results: list[Result] = []
    for k, conformer in enumerate(positions):
        try:
            results.append(molecule.evaluate(conformer, results[-1].dm if results else None))
        except Exception as error:
            error.add_note(f"in conformer {k}")
            raise
    return results


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
            dm0 = check_density(dm0, self.basis.n_ao).to(self.device)
        x = torch.as_tensor(geometry / Bohr, device=self.device)
        problem = self.hamiltonian(x)
        state = self._solve(problem, dm0)
        gradient = self._gradient(x, problem, state)
        moments = -(integrals.dipole(self.basis, x) * state.dm).sum((1, 2))
        dipole = moments + self._charges @ x
        return Result(
            energy=state.energy * Hartree,
            forces=-gradient.cpu().numpy() * (Hartree / Bohr),
            converged=True,
            n_iter=state.n_iter,
            dm=state.dm.cpu().numpy(),
            homo_lumo_gap=state.gap * Hartree,
            dipole=dipole.cpu().numpy() * Bohr,
            terms=state.terms,
            backend=self.backend,
            device=str(self.device),
        )

    def hamiltonian(self, x: Tensor) -> Hamiltonian:
        """Integrals and grid at positions x (n_atom, 3) in bohr; what depends on no density."""
        settings, basis, functional = self.settings, self.basis, self.functional
        overlap = integrals.overlap(basis, x)
        root = inverse_root(overlap)  # before the long integrals: it may refuse the geometry
        eri = integrals.eri(basis, x, backend=self.backend, max_memory_mb=settings.max_memory_mb)
        xc = None
        if self._grid is not None:
            left = int(settings.max_memory_mb * 1e6) - 8 * basis.n_ao**4
            left = max(left, _MIN_GRID_BYTES)
            xc = GridIntegrals(functional, self._orbitals, self._grid, x, left)
        return Hamiltonian(
            overlap=overlap,
            root=root,
            kinetic=integrals.kinetic(basis, x),
            nuclear=integrals.nuclear(basis, x, self._charges),
            eri=eri,
            hyb=functional.hyb,
            repulsion=float(nuclear_repulsion(self._charges, x)),
            xc=xc,
        )

    def _solve(self, problem: Hamiltonian, dm0: Tensor | None) -> State:
        settings = self.settings
        stop = Convergence(settings.conv_tol, settings.conv_tol_grad, settings.max_cycle)
        if dm0 is not None:
            try:
                return solve(problem, purify(dm0, problem, self.n_pair), self.n_pair, stop)
            except ConvergenceError:
                pass
        if self._atoms is None:
            self._atoms = superposition_of_atoms(self.basis).to(self.device)
        return solve(problem, self._atoms, self.n_pair, stop)

    def _gradient(self, x: Tensor, problem: Hamiltonian, state: State) -> Tensor:
        """(n_atom, 3) dE/dR, Ha/bohr."""
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
