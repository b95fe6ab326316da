"""Restricted Kohn-Sham: the density matrix that is stationary, found by DIIS.

    E[D] = Tr D h + 1/2 Tr D J - hyb/4 Tr D K + E_xc[D] + E_nn,      D = 2 C_occ C_occ^T
    F    = h + J - hyb/2 K + V_xc,    J_ij = (ij|kl) D_kl,    K_ij = (ik|jl) D_kl
    g    = X^T (F D S - S D F) X,     X = S^(-1/2)

g vanishes at the solution; the extrapolated Fock matrix is the combination of earlier ones whose g
is the shortest (Pulay, J. Comput. Chem. 3, 556 (1982)). Energies in Ha. A density that has not
converged is an error and never a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from md_plugin.nanodft.errors import UnsupportedSystem
from md_plugin.nanodft.exchange_correlation import GridIntegrals

MIN_OVERLAP = 1e-8  # eigenvalue of S; below, functions are linearly dependent in float64
N_DIIS = 8


class ConvergenceError(RuntimeError):
    """The self-consistent field did not converge; there are no numbers."""


@dataclass(frozen=True, eq=False)
class Hamiltonian:
    """Everything in E[D] but D, for one geometry.

    Attributes:
        overlap: (n_ao, n_ao) S.
        root: (n_ao, n_ao) S^(-1/2).
        kinetic: (n_ao, n_ao) Ha.
        nuclear: (n_ao, n_ao) attraction by the nuclei, Ha.
        eri: (n_ao,) * 4 integrals (ij|kl), Ha.
        hyb: fraction of exact exchange.
        repulsion: of the nuclei, Ha.
        xc: None in Hartree-Fock.
    """

    overlap: Tensor
    root: Tensor
    kinetic: Tensor
    nuclear: Tensor
    eri: Tensor
    hyb: float
    repulsion: float
    xc: GridIntegrals | None

    def fock(self, dm: Tensor) -> tuple[Tensor, dict[str, float]]:
        """F (n_ao, n_ao) and the terms of the energy, all in Ha."""
        core = self.kinetic + self.nuclear
        coulomb = coulomb_matrix(self.eri, dm)
        fock = core + coulomb
        terms = {
            "kinetic": _trace(dm, self.kinetic),
            "nuclear_attraction": _trace(dm, self.nuclear),
            "coulomb": 0.5 * _trace(dm, coulomb),
            "nuclear_repulsion": self.repulsion,
        }
        if self.hyb:
            exchange = exchange_matrix(self.eri, dm)
            fock = fock - 0.5 * self.hyb * exchange
            terms["exact_exchange"] = -0.25 * self.hyb * _trace(dm, exchange)
        if self.xc is not None:
            terms["xc"], potential = self.xc.potential(dm)
            fock = fock + potential
        return fock, terms


@dataclass(frozen=True, eq=False)
class State:
    """A converged density with the Fock matrix that was made of it.

    Attributes:
        dm: (n_ao, n_ao) density matrix D.
        fock: (n_ao, n_ao) F[D], Ha.
        orbital_energies: (n_ao,) Ha, ascending.
        n_occ: doubly occupied orbitals.
        terms: parts of the energy, Ha.
        n_iter: Fock matrices that were made.
    """

    dm: Tensor
    fock: Tensor
    orbital_energies: Tensor
    n_occ: int
    terms: dict[str, float]
    n_iter: int

    @property
    def energy(self) -> float:
        """Total energy, Ha."""
        return sum(self.terms.values())

    @property
    def energy_weighted_dm(self) -> Tensor:
        """W = D F D / 2, which is 2 C_occ eps_occ C_occ^T at the solution, Ha."""
        return 0.5 * self.dm @ self.fock @ self.dm

    @property
    def gap(self) -> float:
        """Between highest occupied and lowest empty orbital, Ha; infinite if none is empty."""
        if self.n_occ == len(self.orbital_energies):
            return math.inf
        return float(self.orbital_energies[self.n_occ] - self.orbital_energies[self.n_occ - 1])


@dataclass(frozen=True)
class Convergence:
    """When to stop.

    Attributes:
        energy: largest change of the energy in the last cycle, Ha.
        gradient: largest element of g, Ha; the error of forces is of its order.
        max_cycle: Fock matrices at most.
    """

    energy: float = 1e-10
    gradient: float = 1e-7
    max_cycle: int = 60


def solve(problem: Hamiltonian, dm: Tensor, n_occ: int, stop: Convergence) -> State:
    """The self-consistent density, starting from dm (n_ao, n_ao).

    Raises:
        UnsupportedSystem: there are too few basis functions for the electrons.
        ConvergenceError: not converged within stop.max_cycle.
    """
    x = problem.root
    if n_occ > len(x):
        raise UnsupportedSystem(f"{n_occ} electron pairs do not fit into {len(x)} basis functions")
    diis, last, residual = Diis(), math.inf, math.inf
    change = math.inf
    for cycle in range(1, stop.max_cycle + 1):
        fock, terms = problem.fock(dm)
        energy = sum(terms.values())
        error = commutator(fock, dm, problem.overlap, x)
        change, last, residual = abs(energy - last), energy, float(error.abs().max())
        if not math.isfinite(energy + residual):
            raise ConvergenceError(f"the energy is not finite in cycle {cycle}")
        if change < stop.energy and residual < stop.gradient:
            energies, _ = orbitals_of(fock, x)
            return State(dm, fock, energies, n_occ, terms, cycle)
        _, c = orbitals_of(diis.extrapolate(fock, error), x)
        dm = 2 * c[:, :n_occ] @ c[:, :n_occ].T
    raise ConvergenceError(
        f"no convergence in {stop.max_cycle} cycles: the energy still changes by {change:.1e} Ha "
        f"and the orbital gradient is {residual:.1e} Ha (wanted {stop.energy:.1e} and "
        f"{stop.gradient:.1e})"
    )


@dataclass
class Diis:
    """Direct inversion in the iterative subspace, over the last N_DIIS Fock matrices."""

    focks: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)

    def extrapolate(self, fock: Tensor, error: Tensor) -> Tensor:
        """The best combination of this Fock matrix and earlier ones."""
        self.focks = [*self.focks, fock][-N_DIIS:]
        self.errors = [*self.errors, error][-N_DIIS:]
        n = len(self.focks)
        flat = torch.stack(self.errors).reshape(n, -1)
        scale = float(flat[-1].square().sum()) or 1.0  # errors span many orders of magnitude
        equations = flat.new_ones(n + 1, n + 1)
        equations[:n, :n] = flat @ flat.T / scale
        equations[n, n] = 0
        right = flat.new_zeros(n + 1, 1)
        right[n] = 1
        solution = torch.linalg.lstsq(equations.cpu(), right.cpu(), driver="gelsd").solution
        weights: Tensor = solution[:n].to(fock.device)[:, :, None]
        return (weights * torch.stack(self.focks)).sum(0)


def coulomb_matrix(eri: Tensor, dm: Tensor) -> Tensor:
    """J_ij = (ij|kl) D_kl, symmetric dm."""
    n = len(dm)
    return (eri.reshape(n * n, n * n) @ dm.reshape(-1)).reshape(n, n)


def exchange_matrix(eri: Tensor, dm: Tensor) -> Tensor:
    """K_ij = (ik|jl) D_kl, symmetric dm; read as (ik|lj), which lies in memory in that order."""
    n = len(dm)
    return torch.matmul(dm.reshape(1, 1, n * n), eri.reshape(n, n * n, n))[:, 0]


def commutator(fock: Tensor, dm: Tensor, overlap: Tensor, x: Tensor) -> Tensor:
    """The orbital gradient g of the module's equations."""
    fds = fock @ dm @ overlap
    return x.T @ (fds - fds.T) @ x


def orbitals_of(fock: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Orbital energies (n_ao,) and coefficients (n_ao, n_ao), by energy."""
    energies, c = torch.linalg.eigh(x.T @ fock @ x)
    return energies, x @ c


def inverse_root(overlap: Tensor) -> Tensor:
    """S^(-1/2).

    Raises:
        UnsupportedSystem: an eigenvalue is below MIN_OVERLAP.
    """
    values, vectors = torch.linalg.eigh(overlap)
    if float(values[0]) < MIN_OVERLAP:
        raise UnsupportedSystem(
            "the basis functions are linearly dependent, atoms are too close: the smallest "
            f"eigenvalue of the overlap is {float(values[0]):.1e}, supported is {MIN_OVERLAP:.0e}"
        )
    root: Tensor = vectors @ (values.rsqrt()[:, None] * vectors.T)
    return root


def purify(dm: Tensor, problem: Hamiltonian, n_occ: int) -> Tensor:
    """Density of the n_occ natural orbitals of dm that are most occupied in this geometry.

    Makes the density of another one fit for it: idempotent, with the right trace.
    """
    root = problem.overlap @ problem.root  # S^(1/2)
    _, c = torch.linalg.eigh(root @ dm @ root)
    c = problem.root @ c[:, len(dm) - n_occ :]
    pure: Tensor = 2 * c @ c.T
    return pure


def _trace(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
