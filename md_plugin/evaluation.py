"""Evaluation: what a potential says about structures, and the sums over pairs that follow from it.

    F_i      = sum_{p: receiver i} g_p - sum_{p: sender i} g_p          g_p = dE / d r_ij(p)
    W        = - sum_p r_p (x) g_p          virial;  stress = -W / volume in ASE's sign
    W_k      = - half of each pair's r_p (x) g_p to each of its atoms   atom_virial
    W_k      = sum_{p: sender k} (D_p - r_p (x) g_p) - sum_{p: receiver k} D_p
                                                                        centroid_virial
    D_p,ab   = sum_i (x_i - x_receiver(p))_a dE_i / d r_p,b             pair_moment

With one interaction layer an atom's energy depends on its own row alone, and D vanishes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from md_plugin.halo import MomentHalo
from md_plugin.pairs import Pairs

if TYPE_CHECKING:
    from md_plugin.model.fusion import Fused


class Wanted(NamedTuple):
    """What fused inference is asked for beside energies of atoms, forces and the virial.

    Attributes:
        home: where results are to be.
        structure: (n_recv,) structure of each atom; None for one structure.
        n_structures: how many there are.
        per_atom: whether virials of atoms are wanted.
    """

    home: torch.device
    structure: Tensor | None = None
    n_structures: int = 1
    per_atom: bool = False

    @property
    def split(self) -> str:
        """Of `md_plugin.model.fusion`: how far the virial has to be taken apart."""
        return "atoms" if self.per_atom else "" if self.structure is None else "structures"

    def evaluation(self, found: Fused, pairs: Pairs) -> Evaluation:
        """What fused inference has found."""
        energy, virial, none = found.atom_energy, found.virial[None], found.forces[:0]
        structure = None if self.structure is None else self.structure.to(self.home)
        if structure is not None and found.parts is not None:
            virial = segment_sum(found.parts, structure, self.n_structures)
        sums = Totals(found.forces, virial, found.parts if self.per_atom else None)
        total = segment_sum(energy, structure, self.n_structures)
        return Evaluation(total, energy, None, pairs, none, structure, sums=sums)


class Totals(NamedTuple):
    """What fused inference has added up.

    Attributes:
        forces: (n_send, 3) eV/Å.
        virial: (n_structures, 3, 3) eV.
        atom_virial: (n_send, 3, 3) eV; None where it was not asked for.
    """

    forces: Tensor
    virial: Tensor
    atom_virial: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a potential says about one or many structures.

    Sums over pairs are taken when they are first asked for: an engine that adds up forces itself
    pays for `pair_gradient` alone. Fused inference has nothing per pair and gives the `sums`.

    Attributes:
        energy: (n_structures,) float64, eV.
        atom_energy: (n_recv,) float64, eV.
        pair_gradient: (n_pair, 3) dE/dr_ij, eV/Å; None where forces were not asked for, or `sums`
            are there.
        pairs: the pairs that were evaluated.
        r_ij: (n_pair, 3) Å, in the geometry's dtype; empty where `sums` are there.
        structure: (n_recv,) structure of each atom; None for one structure.
        pair_moment: (n_pair, 3, 3) eV, sum_i (x_i - x_receiver)_a dE_i/dr_p,b; None where it was
            not asked for.
        members: what each member of a committee says; empty for a single model.
        sums: of fused inference.
    """

    energy: Tensor
    atom_energy: Tensor
    pair_gradient: Tensor | None
    pairs: Pairs
    r_ij: Tensor
    structure: Tensor | None = None
    pair_moment: Tensor | None = None
    members: tuple[Evaluation, ...] = ()
    sums: Totals | None = None

    @cached_property
    def forces(self) -> Tensor | None:
        """(n_send, 3) eV/Å; rows of ghosts are to be added to their owners. Or None."""
        if self.sums is not None:
            return self.sums.forces
        if self.pair_gradient is None:
            return None
        return pair_forces_to_atoms(self.pair_gradient, self.pairs)

    @cached_property
    def virial(self) -> Tensor | None:
        """(n_structures, 3, 3) eV, -sum_p r_p (x) g_p. Or None."""
        if self.sums is not None:
            return self.sums.virial
        if self.pair_gradient is None:
            return None
        if self.structure is None:
            return -(self.r_ij.T @ self.pair_gradient)[None]
        terms = -(self.r_ij[:, :, None] * self.pair_gradient[:, None, :])
        structure = self.structure[self.pairs.receiver]
        return segment_sum(terms, structure, self.energy.numel())

    @cached_property
    def atom_virial(self) -> Tensor | None:
        """(n_send, 3, 3) eV: half of each pair's -r (x) g to each of its atoms. Or None."""
        if self.sums is not None:
            return self.sums.atom_virial
        if self.pair_gradient is None:
            return None
        half = (-0.5 * self.r_ij[:, :, None] * self.pair_gradient[:, None, :]).flatten(1)
        atoms = half.new_zeros(self.pairs.n_send, 9)
        atoms = add_rows(atoms, self.pairs.receiver, half)
        return add_rows(atoms, self.pairs.sender_long, half).reshape(-1, 3, 3)

    @cached_property
    def centroid_virial(self) -> Tensor | None:
        """(n_send, 3, 3) eV, the virial by which heat flows. Or None.

        W_k,ab multiplies the velocity v_k,b in the potential part of the heat flux

            J_a = sum_i sum_k (x_i - x_k)_a (dE_i/dx_k . v_k) = sum_k sum_b W_k,ab v_k,b

        (Fan et al., Phys. Rev. B 92, 094301 (2015), eq. 23, for many-body potentials; for energies
        of atoms that also depend on pairs of other receivers, as with several interaction
        layers, Langer et al., J. Chem. Phys. 159, 174105 (2023)). Sums to the virial.
        """
        if self.pair_gradient is None or self.pair_moment is None:
            return None
        away = self.r_ij[:, :, None] * self.pair_gradient[:, None, :]
        moment = self.pair_moment
        atoms = away.new_zeros(self.pairs.n_send, 9)
        atoms = add_rows(atoms, self.pairs.sender_long, (moment - away).flatten(1))
        return add_rows(atoms, self.pairs.receiver, -moment.flatten(1)).reshape(-1, 3, 3)


def pair_moment(
    energy: Tensor, r_ij: Tensor, gradient: Tensor, halo: MomentHalo, pairs: Pairs
) -> Tensor:
    """D (n_pair, 3, 3), eV, from d(sum_i x_i E_i)/dr_p, one component of x at a time.

    Args:
        energy: (n,) of atoms, with the graph that leads to r_ij.
        r_ij: (n_pair, 3), Å.
        gradient: (n_pair, 3) dE/dr_ij, eV/Å.
        halo: that filled the features, and knows the positions.
        pairs: who sees whom.
    """
    if halo.n_exchanges == 0:
        return gradient.new_zeros(pairs.n_pair, 3, 3)
    columns = []
    for axis in range(3):
        halo.axis = axis
        x = halo.positions[:, axis]
        (weighted,) = torch.autograd.grad(
            energy, r_ij, x[: energy.numel()].to(energy.dtype), retain_graph=axis < 2
        )
        columns.append(weighted - x[pairs.receiver, None] * gradient)
    return torch.stack(columns, dim=1)


def segment_sum(values: Tensor, segment: Tensor | None, n_segments: int) -> Tensor:
    """Sum rows (n, ...) by segment -> (n_segments, ...)."""
    if segment is None:
        return values.sum(dim=0, keepdim=True)
    rest = values.shape[1:]
    sums = values.new_zeros(n_segments, rest.numel())
    return add_rows(sums, segment, values.reshape(len(values), rest.numel())).reshape(
        n_segments, *rest
    )


def pair_forces_to_atoms(gradient: Tensor, pairs: Pairs) -> Tensor:
    """dE/dr_ij (n_pair, 3) -> forces (n_send, 3): + on the receiver, - on the sender."""
    forces = add_rows(gradient.new_zeros(pairs.n_send, 3), pairs.receiver, gradient)
    return add_rows(forces, pairs.sender_long, -gradient)


def add_rows(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """target (n, k) with rows (m, k) added at `index` (m,): index_add, five times as fast."""
    return target.scatter_add(0, index[:, None].expand_as(rows), rows)
