"""What fused layers on the GPU are given, positions, pairs, sensitivities, and what they find."""

from __future__ import annotations

import math
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

N_SUM = 10  # of a receiver: the virial row by row, and the distance of its closest pair
_EXP2_SCALE = math.sqrt(0.5 / math.log(2.0))  # exp(-t^2 / 2) = 2^-(t scale)^2


class Geometry(NamedTuple):
    """Positions and pairs, on one device. Indices are not checked.

    Attributes:
        x: (n_send, 3) float64 positions, ghosts after the receivers.
        row_ptr: (n_recv + 1,) int32, rows of the pairs.
        sender: (n_pair,) int32; pairs from the end on are skipped.
        translation: (n_pair,) int16, row of `translations` that is added to each sender, or None.
        translations: (n_translation, 3) float64 lattice translations, or None.
        species: (n_send,) int32 index of the species, for a first layer only.
    """

    x: Tensor
    row_ptr: Tensor
    sender: Tensor
    translation: Tensor | None = None
    translations: Tensor | None = None
    species: Tensor | None = None


class Radial(NamedTuple):
    """Sensitivities as the kernels take them, all on the device: models share compiled kernels.

    Attributes:
        table: (2, n_nu) scale and offset: s = 2^-(scale / r - offset)^2 under the cutoff.
        limits: (2,) where the squared cosine vanishes, and where pairs end, Å.
    """

    table: Tensor
    limits: Tensor

    @classmethod
    def build(cls, mu: Tensor, sigma: Tensor, rcut: float, end: float | None = None) -> Radial:
        """Of centres mu and inverse widths sigma (n_nu,), whose dtype is the network's."""
        scale = sigma.detach().double() * _EXP2_SCALE
        table = torch.stack([scale, scale / mu.detach().double()]).to(mu.dtype)
        return cls(table, mu.new_tensor([rcut, rcut if end is None else end]))


def halves(x: Tensor, n_half: int) -> Tensor:
    """(n_half, *shape) float16 whose sum is x, of numbers up to 65504."""
    found = x.new_empty(n_half, *x.shape, dtype=torch.float16)
    found[0] = x
    if n_half == 2:
        torch.sub(x, found[0], out=found[1])
    return found


def grade(array: Tensor) -> torch.dtype:
    """What z, env or dE/denv are as good as: two halves are float32."""
    return torch.float32 if array.dtype == torch.float16 and len(array) == 2 else array.dtype


class Gradients:
    """What backward passes add to.

    Args:
        where: positions and pairs.
        n_feat: features of the layer's input; 0 for a first layer.
        dtype: of the network.
        own_rows: passes add what belongs to each receiver of a block alone, without atomics;
            `triton_fused.mirror` adds the rest.
        per_atom: whether virials of atoms are wanted.

    Attributes:
        forces: (n_send, 3) float64.
        messages: (n_send, n_feat), dE/dz.
        sums: (n_recv, 10) float64, virial and closest distance of each receiver.
        sent: (n_send, 9) float64, half of the virial of each sender's pairs; None where virials of
            atoms are not wanted.
    """

    def __init__(
        self,
        where: Geometry,
        n_feat: int,
        dtype: torch.dtype,
        own_rows: bool = False,
        *,
        per_atom: bool = False,
    ):
        n_send, n_recv, self.own_rows = len(where.x), len(where.row_ptr) - 1, own_rows
        # At once; and sums, of 80 bytes each, before forces, so that both start at 16 bytes.
        zeros = where.x.new_zeros(N_SUM * n_recv + 3 * n_send)
        self.sums = zeros[: N_SUM * n_recv].view(n_recv, N_SUM)
        self.forces = zeros[N_SUM * n_recv :].view(n_send, 3)
        self.sums[:, -1] = math.inf
        self.messages = where.x.new_zeros(n_send, n_feat, dtype=dtype)
        self.sent = where.x.new_zeros(len(where.x), 9) if per_atom else None

    def for_layer(self, n_feat: int) -> Gradients:
        """Messages of its own; the same forces and sums."""
        other = copy(self)
        other.messages = self.messages.new_zeros(len(self.forces), n_feat)
        return other

    def part(self, t: int) -> Gradients:
        """Itself: programs share everything."""
        return self

    @property
    def row_virials(self) -> Tensor:
        """(n_recv, 3, 3) of each receiver's pairs."""
        return self.sums[:, :9].view(-1, 3, 3)

    @property
    def virial(self) -> Tensor:
        """(3, 3)."""
        return self.row_virials.sum(dim=0)

    @property
    def atom_virials(self) -> Tensor | None:
        """(n_send, 3, 3), half of each pair's virial to each of its atoms; None if not wanted."""
        if self.sent is None:
            return None
        atoms = self.sent.reshape(-1, 3, 3).clone()
        atoms[: len(self.sums)] += 0.5 * self.row_virials
        return atoms

    @property
    def closest(self) -> Tensor:
        """() distance of the closest pair; infinite where there is none."""
        least = self.sums[:, -1]
        return least.amin() if len(least) else least.new_full((), math.inf)
