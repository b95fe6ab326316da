"""Restricted Kohn-Sham: the density matrix that is stationary, found by DIIS.

    E[D] = Tr D h + 1/2 Tr D J - hyb/4 Tr D K + E_xc[D] + E_nn,      D = 2 C_occ C_occ^T
    F    = h + J - hyb/2 K + V_xc,    J_ij = (ij|kl) D_kl,    K_ij = (ik|jl) D_kl
    g    = X^T (F D S - S D F) X,     X = S^(-1/2)

g vanishes at the solution; the extrapolated Fock matrix is the combination of earlier ones whose g
is the shortest (Pulay, J. Comput. Chem. 3, 556 (1982)). The result is the density that the last
extrapolation gives: its g is about ten times shorter than the one that was found short enough.

Geometries are solved together, and each ends when it has converged: it is then held, and what it
is does not depend on the others. Energies in Ha. A density that has not converged is an error and
never a result.
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
_SHORTEST = 1e-150  # of g; keeps an exact solution apart from 0 / 0


class ConvergenceError(RuntimeError):
    """The self-consistent field did not converge; there are no numbers."""


@dataclass(frozen=True, eq=False)
class Hamiltonian:
    """Everything in E[D] but D, for one geometry or for many (...).

    Attributes:
        overlap: (..., n_ao, n_ao) S.
        root: (..., n_ao, n_ao) S^(-1/2).
        kinetic: (..., n_ao, n_ao) Ha.
        nuclear: (..., n_ao, n_ao) attraction by the nuclei, Ha.
        eri: (..., n_ao, n_ao, n_ao, n_ao) integrals (ij|kl), Ha.
        hyb: fraction of exact exchange.
        repulsion: (...) of the nuclei, Ha.
        xc: None in Hartree-Fock.
    """

    overlap: Tensor
    root: Tensor
    kinetic: Tensor
    nuclear: Tensor
    eri: Tensor
    hyb: float
    repulsion: Tensor
    xc: GridIntegrals | None

    def fock(self, dm: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """F (..., n_ao, n_ao) and the terms (...) of the energy, all in Ha."""
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
    """Converged densities of n_mol geometries, with the Fock matrices whose orbitals they have.

    Attributes:
        dm: (n_mol, n_ao, n_ao) density matrix D.
        fock: (n_mol, n_ao, n_ao) F, Ha.
        orbital_energies: (n_mol, n_ao) Ha, ascending.
        n_occ: doubly occupied orbitals.
        terms: parts of the energy, (n_mol,) Ha each.
        n_iter: (n_mol,) Fock matrices that were made.
        errors: (n_mol,) None, or why there are no numbers; the rest is then meaningless.
    """

    dm: Tensor
    fock: Tensor
    orbital_energies: Tensor
    n_occ: int
    terms: dict[str, Tensor]
    n_iter: Tensor
    errors: tuple[ConvergenceError | None, ...]

    @property
    def energy(self) -> Tensor:
        """(n_mol,) total energy, Ha."""
        return torch.stack(list(self.terms.values())).sum(0)

    @property
    def energy_weighted_dm(self) -> Tensor:
        """W = D F D / 2, which is 2 C_occ eps_occ C_occ^T, Ha."""
        return 0.5 * self.dm @ self.fock @ self.dm

    @property
    def gap(self) -> Tensor:
        """(n_mol,) between highest occupied and lowest empty orbital, Ha; infinite without one."""
        padded = torch.nn.functional.pad(self.orbital_energies, (0, 1), value=math.inf)
        return padded[:, self.n_occ] - padded[:, self.n_occ - 1]


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
    """The self-consistent densities of n_mol geometries, starting from dm (n_mol, n_ao, n_ao).

    Raises:
        UnsupportedSystem: there are too few basis functions for the electrons.
    """
    x = problem.root
    if n_occ > x.shape[-1]:
        raise UnsupportedSystem(
            f"{n_occ} electron pairs do not fit into {x.shape[-1]} basis functions"
        )
    diis, last = Diis(), dm.new_full((len(dm),), math.inf)
    n_iter = torch.zeros_like(last, dtype=torch.int64)
    active, lost = n_iter == 0, n_iter > 0
    state: dict[str, Tensor] = {}
    for _ in range(stop.max_cycle):
        fock, terms = problem.fock(dm)
        energy = sum(terms.values(), torch.zeros_like(last))
        error = commutator(fock, dm, problem.overlap, x)
        change, last, residual = (energy - last).abs(), energy, error.abs().amax((-1, -2))
        finite = (energy + residual).isfinite()
        # orbitals of what is not finite would end the whole batch
        fock, error = (
            _where(finite, fock, problem.overlap),
            _where(finite, error, dm.new_zeros(dm.shape)),
        )
        fock = diis.extrapolate(fock, error)
        orbital_energies, c = orbitals_of(fock, x)
        density = 2 * c[..., :n_occ] @ c[..., :n_occ].mT
        found = {"dm": density, "fock": fock, "orbital_energies": orbital_energies, **terms}
        ended = active & (change < stop.energy) & (residual < stop.gradient)
        state = {name: _where(ended, new, state.get(name, new)) for name, new in found.items()}
        n_iter, lost = n_iter + active, lost | (active & ~finite)
        active = active & ~ended & finite
        dm = _where(active, density, dm)
        if not bool(active.any()):
            break
    errors = _errors(active, lost, n_iter, (change, residual), stop)
    dm, fock, orbital_energies = (state.pop(n) for n in ("dm", "fock", "orbital_energies"))
    return State(dm, fock, orbital_energies, n_occ, state, n_iter, errors)


def _errors(
    active: Tensor, lost: Tensor, n_iter: Tensor, left: tuple[Tensor, Tensor], stop: Convergence
) -> tuple[ConvergenceError | None, ...]:
    """Of each geometry; active: it goes on changing, lost: it is not finite."""
    errors: list[ConvergenceError | None] = []
    columns = [column.tolist() for column in (active, lost, n_iter, *left)]
    for goes_on, is_lost, cycle, change, residual in zip(*columns, strict=True):
        message = ""
        if is_lost:
            message = f"the energy is not finite in cycle {cycle}"
        elif goes_on:
            message = (
                f"no convergence in {stop.max_cycle} cycles: the energy still changes by "
                f"{change:.1e} Ha and the orbital gradient is {residual:.1e} Ha (wanted "
                f"{stop.energy:.1e} and {stop.gradient:.1e})"
            )
        errors.append(ConvergenceError(message) if message else None)
    return tuple(errors)


@dataclass
class Diis:
    """Direct inversion in the iterative subspace, over the last N_DIIS Fock matrices."""

    focks: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)

    def extrapolate(self, fock: Tensor, error: Tensor) -> Tensor:
        """The best combination of this Fock matrix (..., n_ao, n_ao) and earlier ones."""
        self.focks = [*self.focks, fock][-N_DIIS:]
        self.errors = [*self.errors, error][-N_DIIS:]
        n = len(self.focks)
        flat = torch.stack(self.errors, dim=-3).flatten(-2)
        # Errors span many orders of magnitude: unknowns are weights times lengths, of unit vectors.
        length = flat.norm(dim=-1, keepdim=True).clamp(min=_SHORTEST)
        unit, inverse = flat / length, length.amin(-2, keepdim=True) / length
        equations = flat.new_zeros(*flat.shape[:-2], n + 1, n + 1)
        equations[..., :n, :n] = unit @ unit.mT
        equations[..., :n, n:] = inverse
        equations[..., n:, :n] = inverse.mT
        right = torch.zeros_like(equations[..., :1])
        right[..., n, :] = 1
        solution = torch.linalg.lstsq(equations.cpu(), right.cpu(), driver="gelsd").solution
        weights = solution[..., :n, :].to(fock.device) * inverse
        weights = (weights / weights.sum(-2, keepdim=True))[..., None]  # gelsd keeps no constraint
        combined: Tensor = (weights * torch.stack(self.focks, dim=-3)).sum(-3)
        return combined


def coulomb_matrix(eri: Tensor, dm: Tensor) -> Tensor:
    """J_ij = (ij|kl) D_kl, symmetric dm."""
    *many, n = dm.shape[:-1]
    return (eri.reshape(*many, n * n, n * n) @ dm.reshape(*many, n * n, 1)).reshape(dm.shape)


def exchange_matrix(eri: Tensor, dm: Tensor) -> Tensor:
    """K_ij = (ik|jl) D_kl, symmetric dm; read as (ik|lj), which lies in memory in that order."""
    *many, n = dm.shape[:-1]
    rows = dm.reshape(*many, 1, 1, n * n) @ eri.reshape(*many, n, n * n, n)
    return rows.squeeze(-2)


def commutator(fock: Tensor, dm: Tensor, overlap: Tensor, x: Tensor) -> Tensor:
    """The orbital gradient g of the module's equations."""
    fds = fock @ dm @ overlap
    return x.mT @ (fds - fds.mT) @ x


def orbitals_of(fock: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Orbital energies (..., n_ao) and coefficients (..., n_ao, n_ao), by energy."""
    energies, c = torch.linalg.eigh(x.mT @ fock @ x)
    return energies, x @ c


def linear_dependence(smallest: float) -> UnsupportedSystem | None:
    """An error where the smallest eigenvalue of an overlap is below MIN_OVERLAP."""
    if smallest >= MIN_OVERLAP:
        return None
    return UnsupportedSystem(
        "the basis functions are linearly dependent, atoms are too close: the smallest "
        f"eigenvalue of the overlap is {smallest:.1e}, supported is {MIN_OVERLAP:.0e}"
    )


def inverse_root(overlap: Tensor) -> Tensor:
    """S^(-1/2).

    Raises:
        UnsupportedSystem: an eigenvalue is below MIN_OVERLAP.
    """
    values, vectors = torch.linalg.eigh(overlap)
    if error := linear_dependence(float(values.min())):
        raise error
    root: Tensor = vectors @ (values.rsqrt()[..., None] * vectors.mT)
    return root


def purify(dm: Tensor, problem: Hamiltonian, n_occ: int) -> Tensor:
    """Density of the n_occ natural orbitals of dm that are most occupied in this geometry.

    Makes the density of another one fit for it: idempotent, with the right trace.
    """
    root = problem.overlap @ problem.root  # S^(1/2)
    _, c = torch.linalg.eigh(root @ dm @ root)
    c = problem.root @ c[..., dm.shape[-1] - n_occ :]
    pure: Tensor = 2 * c @ c.mT
    return pure


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new where the geometry's mask is set."""
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)


def _trace(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-1, -2))
