"""Neighbours found by cells, in torch, on any device: positions go there, and no pair ever leaves.

Space is cut into bins at least rcut wide (in a periodic direction a whole number of them, one where
the box is smaller); atoms are sorted by the number of their bin, and each receiver looks into the
bins around its own. With n bins along a periodic lattice vector whose planes are h apart,

    bin b of an atom at fraction f:  floor(n f),     bins b - m ... b + m,   m = ceil(n rcut / h)
    bin b + s  is  bin (b + s) mod n  of image  floor((b + s) / n)

which holds for one bin and any m, so that tiny cells are no special case. Open directions have
bins from the lowest atom on, and nothing beyond them. Pairs come out row by row:

    r_ij[p] = x'[sender] - x'[receiver] + images[image[p]] @ cell,       x' = x + wraps @ cell

Memory grows with pairs, and with atoms 27-fold; what is looked at on the way comes in chunks. The
host waits twice: for the number of pairs to look at, and for the number of pairs. `DeviceList` is
the `NeighbourList` whose pairs live there; between its builds positions go over and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from md_plugin.devices import Staging
from md_plugin.neighbours import FloatArray, NeighbourList, complete_cell
from md_plugin.pairs import MAX_PAIRS, Geometry, Pairs, rows_times

CHUNK = 1 << 21  # pairs looked at in one go: some 400 MB
RADIX = 1 << 15  # bins along a direction, at most; wider ones where the box needs it
MAX_IMAGES = 2**15  # that two bytes can count


@dataclass(frozen=True, eq=False)
class Found:
    """Pairs as they come out of a search.

    Attributes:
        pairs: rows of the receivers.
        image: (n_pair,) int32, the row of `images` of each sender.
        images: (n_image, 3) float64 whole numbers of cell vectors.
        wraps: (n_send, 3) float64 whole numbers by which each atom was taken back into its cell.
    """

    pairs: Pairs
    image: Tensor
    images: Tensor
    wraps: Tensor


@dataclass(frozen=True, eq=False)
class _Bins:
    """Bins of n_systems cells, on the host; see the module page.

    Attributes:
        scale: (n_systems, 3) bins per unit of the fractional coordinate.
        count: (n_systems, 3) bins that there are; `RADIX` in open directions.
        reach: (3,) bins to look at on either side, in every system.
        far: (3,) images that are met there.
    """

    scale: FloatArray
    count: NDArray[np.int64]
    reach: NDArray[np.int64]
    far: NDArray[np.int64]

    @classmethod
    def of(cls, cells: FloatArray, pbc: NDArray[np.bool_], rcut: float) -> _Bins:
        apart = 1.0 / np.linalg.norm(np.linalg.inv(cells), axis=1)  # lattice planes, Å
        # A hair wider than rcut, so that rounding never asks for one more on each side.
        count = np.clip(np.floor(apart / rcut * (1.0 - 1e-12)), 1, RADIX).astype(np.int64)
        reach = np.where(pbc, np.ceil(count * rcut / apart), 1).astype(np.int64).max(axis=0)
        far = np.where(pbc, (count - 1 + reach) // count, 0).max(axis=0)
        scale = np.where(pbc, count, apart / rcut)
        return cls(scale, np.where(pbc, count, RADIX), reach, far)


def search_cells(
    x: Tensor,
    cells: FloatArray,
    pbc: ArrayLike,
    rcut: float,
    *,
    system: Tensor | None = None,
    n_recv: int | None = None,
) -> Found:
    """All pairs closer than rcut, each receiver's in a row of its own, the closest first.

    In the order of distances, tiles of pairs leave out what they do not feel; see
    `md_plugin.kernels.triton_layer`.

    Args:
        x: (n_send, 3) finite positions, Å, on the device that is to search.
        cells: (n_systems, 3, 3) lattice vectors as rows, Å, on the host; see `complete_cell`.
        pbc: (3,) which directions are periodic, or one bool.
        rcut: cutoff, Å.
        system: (n_send,) int64, system of each atom; None for one system.
        n_recv: the first atoms, which have rows; None for all.

    Raises:
        ValueError: more pairs than int32 can index, or too many periodic images.
    """
    n_send, device, x = len(x), x.device, x.double()
    periodic = np.broadcast_to(np.asarray(pbc, dtype=bool), (3,))
    bins = _Bins.of(cells, periodic, rcut)
    if (2 * bins.far + 1).prod() > MAX_IMAGES:
        raise ValueError(
            f"the cutoff reaches over {(2 * bins.far + 1).tolist()} periodic images of this cell; "
            "give a supercell"
        )
    if system is None:
        system = torch.zeros(n_send, dtype=torch.int64, device=device)
    h, inverse = _there(cells, device), _there(np.linalg.inv(cells), device)
    fraction = rows_times(x, inverse[system])
    wraps = -fraction.floor() * _there(periodic.astype(float), device)
    images = _there(_grid(bins.far).astype(float), device)
    n_recv = n_send if n_recv is None else n_recv
    search = _Search(x + rows_times(wraps, h[system]), images @ h, system, n_recv)
    row_ptr, sender, image, r2 = search.closer_than(rcut, bins, fraction + wraps)
    receiver = Pairs(row_ptr, sender, n_send).receiver
    # Stable: a fraction that rounds to one stays in its row.
    order = torch.argsort(receiver + r2 / rcut**2, stable=True)
    return Found(Pairs(row_ptr, sender[order], n_send), image[order], images, wraps)


def _grid(reach: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n, 3) whole numbers from -reach to reach, the last direction changing fastest."""
    return np.array(np.indices((2 * reach + 1).tolist()).reshape(3, -1).T - reach)


def _there(array: NDArray[Any], device: torch.device) -> Tensor:
    """A small table on the device; nobody waits for it."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _number(system: Tensor, place: Tensor) -> Tensor:
    """One number for a system and three bins."""
    return ((system * RADIX + place[..., 0]) * RADIX + place[..., 1]) * RADIX + place[..., 2]


@dataclass(frozen=True, eq=False)
class _Entries:
    """Of each receiver and each bin around it, receiver by receiver.

    Attributes:
        first, n_in: (n,) int32, which of the sorted atoms are in the bin.
        image: (n,) int32, row of the images.
        end: (n,) int64, candidates up to here.
        order: (n_send,) the sorted atoms.
    """

    first: Tensor
    n_in: Tensor
    image: Tensor
    end: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False)
class _Search:
    """Atoms in their cells; shifts are (n_systems, n_image, 3), Å."""

    x: Tensor
    shifts: Tensor
    system: Tensor
    n_recv: int

    def closer_than(self, rcut: float, bins: _Bins, fraction: Tensor) -> tuple[Tensor, ...]:
        """row_ptr, and of each pair its sender, image and squared distance.

        All candidates are looked at twice, for lengths of rows and then for the pairs themselves:
        picking pairs out of a chunk at once would make the host wait in each.
        """
        device = self.x.device
        row_ptr = torch.zeros(self.n_recv + 1, dtype=torch.int32, device=device)
        if self.n_recv == 0:
            none = row_ptr[:0]
            return row_ptr, none, none, self.x.new_zeros(0)
        entries, n_entry = self._entries(bins, fraction), len(_grid(bins.reach))
        length = torch.zeros(self.n_recv, dtype=torch.int64, device=device)
        total = int(entries.end[-1])  # here the host waits
        for entry, _, _, r2 in self._chunks(entries, n_entry, total):
            length.scatter_add_(0, entry // n_entry, (r2 < rcut * rcut).long())
        end = torch.cumsum(length, 0)
        n_pair = int(end[-1])  # and here
        if n_pair > MAX_PAIRS:
            raise ValueError(f"{n_pair} pairs; int32 indices reach {MAX_PAIRS}")
        row_ptr[1:] = end
        # What is no pair goes to one place behind the last.
        sender, image = (row_ptr.new_empty(n_pair + 1) for _ in range(2))
        squared, done = self.x.new_empty(n_pair + 1), end.new_zeros(())
        for _, atom, shift, r2 in self._chunks(entries, n_entry, total):
            found = r2 < rcut * rcut
            upto = done + torch.cumsum(found, 0)
            place = torch.where(found, upto - 1, n_pair)
            sender.scatter_(0, place, atom.int())
            image.scatter_(0, place, shift)
            squared.scatter_(0, place, r2)
            done = upto[-1]
        return row_ptr, sender[:n_pair], image[:n_pair], squared[:n_pair]

    def _entries(self, bins: _Bins, fraction: Tensor) -> _Entries:
        device = self.x.device
        scale, count = _there(bins.scale, device), _there(bins.count, device)
        far, opened = _there(bins.far, device), _there(bins.far == 0, device)
        place = (fraction * scale[self.system]).floor()
        # In an open direction, from the lowest atom on.
        place = (place - place.amin(dim=0) * opened).clamp(0, RADIX - 1).long()
        place = torch.minimum(place, count[self.system] - 1)
        number = _number(self.system, place)
        order = torch.argsort(number, stable=True)
        number, stencil = number[order], _there(_grid(bins.reach), device)
        a, b, c = bins.far.tolist()
        parts, step = [], max(1, CHUNK // len(stencil))
        for rows in torch.split(torch.arange(self.n_recv, device=device), step):
            system, n = self.system[rows, None], count[self.system[rows], None]
            wanted = place[rows, None] + stencil
            shift = torch.div(wanted, n, rounding_mode="floor")
            wanted = _number(system, wanted - shift * n)
            first = torch.searchsorted(number, wanted)
            n_in = torch.searchsorted(number, wanted, right=True) - first
            # Nothing is beyond the ends of an open direction.
            n_in = torch.where((shift.abs() <= far).all(dim=2), n_in, 0)
            image = ((shift[..., 0] + a) * (2 * b + 1) + shift[..., 1] + b) * (2 * c + 1)
            parts.append((first.int(), n_in.int(), (image + shift[..., 2] + c).int()))
        first, n_in, image = (torch.cat(part).ravel() for part in zip(*parts, strict=True))
        return _Entries(first, n_in, image, torch.cumsum(n_in, 0, dtype=torch.int64), order)

    def _chunks(self, entries: _Entries, n_entry: int, total: int) -> Iterator[tuple[Tensor, ...]]:
        """Entry, sender, image and squared distance of each candidate, itself infinitely far."""
        n_image, shifts = self.shifts.shape[1], self.shifts.reshape(-1, 3)
        for start in range(0, total, CHUNK):
            candidate = torch.arange(start, min(start + CHUNK, total), device=self.x.device)
            entry = torch.searchsorted(entries.end, candidate, right=True)
            within = candidate - (entries.end[entry] - entries.n_in[entry])
            sender = entries.order[entries.first[entry] + within]
            receiver, image = entry // n_entry, entries.image[entry]
            shift = shifts[self.system[receiver] * n_image + image]
            r2 = (self.x[sender] - self.x[receiver] + shift).square().sum(dim=1)
            itself = (sender == receiver) & (image == n_image // 2)
            yield entry, sender, image, torch.where(itself, torch.inf, r2)


class DeviceList(NeighbourList):
    """A `NeighbourList` whose pairs are found and kept on a device.

    Whether it still holds is decided on the host, where the positions come from, so that no step
    waits for the device to hear it. A step sends the positions, and the cell where it has changed.

    Args:
        rcut: cutoff of the potential, Å.
        skin: extra distance stored, Å; 0 rebuilds at every change.
        device: where the pairs are to live.
        ordered: whether many atoms are renumbered along a space-filling curve at each build.
    """

    def __init__(
        self,
        rcut: float,
        skin: float,
        device: torch.device,
        *,
        ordered: bool = False,
    ):
        super().__init__(rcut, skin, ordered)
        self.device = device
        self.staging = Staging(device)

    def _build(
        self, x: FloatArray, wraps: FloatArray, h: FloatArray, pbc: NDArray[np.bool_]
    ) -> None:
        there = self.staging.send(torch.from_numpy(x))
        found = search_cells(there, h[None], pbc, self.rcut + self.skin)
        self.pairs, self._image = found.pairs, found.image.short()
        self._images, self._wraps = found.images, found.wraps
        order = self.order
        self._order_there = None if order is None else _there(order, self.device)
        self._cell: FloatArray | None = None

    def geometry(self, positions: FloatArray, cell: ArrayLike) -> Geometry:
        """The pairs at these positions, which `update` has seen; on the device."""
        h = complete_cell(cell, self._pbc)
        if self._cell is None or not np.array_equal(h, self._cell):
            self._cell = h
            there = self.staging.send(torch.from_numpy(h))
            self._translations, self._back = self._images @ there, self._wraps @ there
        x = self.staging.send(torch.from_numpy(np.ascontiguousarray(positions, np.float64)))
        if self._order_there is not None:
            x = x.index_select(0, self._order_there)
        return Geometry(x.add_(self._back), self.pairs, self._image, self._translations)
