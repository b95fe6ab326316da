"""Buffers of a fixed capacity for the atoms and pairs of a step; they stay in place.

    receivers beyond the last    have empty rows: no pair, no force; their energies are cut off
    senders beyond the last      are atoms of which no pair knows
    pairs beyond the last        belong to no row: row_ptr, on the device, says where rows end

So lists may change, atoms come and go, and no shape changes, until a number exceeds its capacity
or falls below half of it. Room costs kernels an empty row each, and atom layers a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from md_plugin.halo import Halo, NoHalo
from md_plugin.model.fusion import Exchange, Fused
from md_plugin.pairs import Geometry, Pairs

GROWTH = 1.25
ALIGNMENT = 16  # capacities are multiples of it


class _WithRoom(Pairs):
    """Rows that end before `sender` does."""

    def __post_init__(self) -> None:
        """No checks: where rows end is known on the device alone."""


@dataclass(eq=False)
class Buffers:
    """Atoms and pairs of one step, with room for more.

    Attributes:
        species: (capacity of senders,) int64 atomic numbers; `pad` where there is no atom.
        geometry: positions and pairs.
        pad: an atomic number that the network knows.
        exchanges: whether a halo is filled during the step.
        square: whether all senders are receivers, also beyond the last.
        pairs: the list that is in them.
        images: `translation` of that list.
        exchanged: rows that the step goes on with after each exchange.
    """

    species: Tensor
    geometry: Geometry
    pad: int
    exchanges: bool
    square: bool
    pairs: Pairs | None = None
    images: Tensor | None = None
    exchanged: list[Tensor] = field(default_factory=list)

    @classmethod
    def build(cls, like: Geometry, halo: Halo | None, pad: int, growth: float) -> Buffers:
        """Buffers for `growth` times as many atoms, on the same device; nothing is in them."""

        def room(n: float) -> int:
            return -(-max(int(growth * n), 1) // ALIGNMENT) * ALIGNMENT

        pairs, images, shifts = like.pairs, like.translation, like.translations
        exchanges, square = _kind(like, halo)
        n_recv, n_pair = room(pairs.n_recv), room(GROWTH * pairs.n_pair)
        n_send = n_recv if square else max(n_recv, room(pairs.n_send))
        x = like.x.new_zeros(n_send, 3, dtype=torch.float64)
        rows = pairs.row_ptr.new_zeros(n_recv + 1), pairs.sender.new_zeros(n_pair)
        geometry = Geometry(
            x,
            _WithRoom(*rows, n_send),
            None if images is None else images.new_zeros(n_pair),
            None if shifts is None else x.new_zeros(room(len(shifts)), 3),
        )
        species = torch.full((n_send,), pad, device=x.device)
        return cls(species, geometry, pad, exchanges, square)

    def fit(self, new: Geometry, halo: Halo | None) -> bool:
        """Whether a geometry has its place here, and is not lost in it."""
        mine, images, shifts = self.geometry, new.translation, new.translations
        if (self.exchanges, self.square) != _kind(new, halo):
            return False
        sizes = [(getattr(mine.pairs, n), getattr(new.pairs, n)) for n in ("n_recv", "n_send")]
        sizes.append((mine.pairs.n_pair, new.pairs.n_pair))
        if mine.translation is None or mine.translations is None:
            if images is not None:
                return False
        elif images is None or shifts is None or images.dtype != mine.translation.dtype:
            return False
        else:
            sizes.append((len(mine.translations), len(shifts)))
        return all(n <= capacity <= max(2 * n, 4 * ALIGNMENT) for capacity, n in sizes)

    def fill(self, species: Tensor, new: Geometry) -> None:
        """Copy a step's atoms, and its pairs where the list is another one."""
        mine, pairs = self.geometry, new.pairs
        self.species[: pairs.n_send].copy_(species)
        mine.x[: pairs.n_send].copy_(new.x)
        if mine.translations is not None and new.translations is not None:
            mine.translations[: len(new.translations)].copy_(new.translations)
        if pairs is self.pairs and new.translation is self.images:
            return
        self.species[pairs.n_send :] = self.pad
        mine.pairs.row_ptr[: pairs.n_recv + 1].copy_(pairs.row_ptr)
        mine.pairs.row_ptr[pairs.n_recv + 1 :] = pairs.n_pair
        mine.pairs.sender[: pairs.n_pair].copy_(pairs.sender)
        if mine.translation is not None and new.translation is not None:
            mine.translation[: pairs.n_pair].copy_(new.translation)
        self.pairs, self.images = pairs, new.translation

    def exchange(self, number: int, asked: Exchange, halo: Halo) -> Tensor:
        """Exchange the rows of atoms that are there; the buffer that the step goes on with."""
        assert self.pairs is not None
        mine, pairs = self.geometry.pairs, self.pairs
        n_from, n_to = pairs.n_recv, pairs.n_send
        capacity = mine.n_send
        if asked.back:
            n_from, n_to, capacity = n_to, n_from, mine.n_recv
        rows = asked._replace(rows=asked.rows[:n_from]).travel(halo, pairs)
        if number == len(self.exchanged):
            self.exchanged.append(rows.new_zeros(capacity, rows.shape[1]))
        buffer = self.exchanged[number]
        buffer[:n_to].copy_(rows)
        buffer[n_to:].zero_()
        return buffer

    def cut(self, found: Fused, split: str = "") -> Fused:
        """A copy of what belongs to atoms that are there; of parts of the virial where wanted."""
        assert self.pairs is not None
        n_recv = self.pairs.n_recv
        energy, forces = found.atom_energy[:n_recv], found.forces[: self.pairs.n_send]
        given = [energy, forces, found.virial, found.closest]
        if split and found.parts is not None:
            given.append(found.parts[:n_recv])
        return Fused(*(tensor.clone() for tensor in given))


def _kind(geometry: Geometry, halo: Halo | None) -> tuple[bool, bool]:
    """Whether there are exchanges, and whether all senders are receivers."""
    exchanges = halo is not None and not isinstance(halo, NoHalo)
    return exchanges, not exchanges and geometry.pairs.n_recv == geometry.pairs.n_send
