"""Neighbours: positions and cell -> `Pairs`, once per rebuild, reused within a skin.

Works for any mix of periodic directions, triclinic cells, cutoffs larger than the cell (an atom
then sees its own images) and no cell at all. The search is vesin's; what is ours is the CSR form,
the batch, and the rule that says when a list may be reused.

    r_ij[p] = x[sender(p)] - x[receiver(p)] + image[p] @ cell,        image[p] whole numbers

A cell has few different images, so a list keeps a table of them and an index of two bytes a pair.

Reuse. A list built at positions x0 and cell h0 with cutoff rcut + skin holds every pair that was
that close. Let F = h0^-1 h be the deformation of the cell since then and d the largest distance
of an atom from its affinely moved place x0 F. Any pair that is not in the list is then at least
s (rcut + skin) - 2 d apart, with s the smallest singular value of F. So the list is complete as
long as  s (rcut + skin) - 2 d >= rcut,  also under a barostat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from md_plugin.ordering import space_filling_order
from md_plugin.pairs import Geometry, Pairs, pair_vectors

FloatArray = NDArray[np.float64]
MANY_ATOMS = 4096  # fewer have their features in the second-level cache, in any order


def neighbour_pairs(
    positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, rcut: float
) -> tuple[Pairs, Tensor]:
    """All pairs closer than rcut, each in both directions.

    Args:
        positions: (n, 3) Å; need not lie inside the cell.
        cell: (3, 3) lattice vectors as rows, Å; zero rows are fine where not periodic.
        pbc: (3,) which directions are periodic, or one bool.
        rcut: cutoff, Å.

    Returns:
        The pairs, and their periodic images (n_pair, 3) float64, whole numbers of cell vectors:
        ``r_ij = x[sender] - x[receiver] + image @ cell``.

    Raises:
        ValueError: positions or cell are not finite, the cell is flat in a periodic direction, or
            rcut is not a positive number.
    """
    from vesin import NeighborList

    if not 0.0 < rcut < np.inf:
        raise ValueError(f"rcut must be a positive number of Å, got {rcut}")
    x = np.ascontiguousarray(positions, dtype=np.float64).reshape(-1, 3)
    periodic = np.broadcast_to(np.asarray(pbc, dtype=bool), (3,))
    box = complete_cell(cell, periodic)
    check_finite(x, "positions")
    if len(x) == 0:
        empty = torch.zeros(0, dtype=torch.int64)
        return Pairs.from_edges(empty, empty, 0, 0)[0], torch.zeros(0, 3, dtype=torch.float64)
    search = NeighborList(cutoff=float(rcut), full_list=True, sorted=True)
    receiver, sender, image = search.compute(x, box, periodic, "ijS")
    pairs, perm = Pairs.from_edges(
        torch.from_numpy(receiver.astype(np.int64)),
        torch.from_numpy(sender.astype(np.int64)),
        len(x),
        len(x),
    )
    return pairs, torch.from_numpy(image.astype(np.float64))[perm]


def check_finite(values: FloatArray, what: str) -> None:
    """Raise ValueError naming the first row of `values` that holds NaN or infinity."""
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[0])
        raise ValueError(
            f"{what} are not finite: the first bad row is {row}: {values[row]}. The simulation "
            "has probably blown up before; try a shorter time step or inspect the start structure"
        )


def complete_cell(cell: ArrayLike, pbc: NDArray[np.bool_]) -> FloatArray:
    """The cell with missing (zero) vectors of non-periodic directions filled in.

    Raises:
        ValueError: a periodic direction has no lattice vector, or the vectors are coplanar.
    """
    h: FloatArray = np.array(cell, dtype=np.float64).reshape(3, 3)
    check_finite(h, "cell vectors")
    missing = np.linalg.norm(h, axis=1) == 0.0
    if (missing & pbc).any():
        raise ValueError(
            f"pbc is {pbc.tolist()}, but lattice vector {int(np.argmax(missing & pbc))} is zero; "
            "set the cell or switch off pbc"
        )
    if missing.any():
        # Unit vectors orthogonal to what is there: the null space of the given rows.
        h[missing] = np.linalg.svd(h)[2][3 - int(missing.sum()) :]
    if abs(np.linalg.det(h)) < 1e-10 * np.prod(np.linalg.norm(h, axis=1)):
        raise ValueError(f"cell vectors are coplanar (volume zero): {h.tolist()}")
    return h


@dataclass
class NeighbourList:
    """A neighbour list with a skin, reused while it is provably complete.

    Attributes:
        rcut: cutoff of the potential, Å.
        skin: extra distance stored, Å; 0 rebuilds at every change.
        ordered: whether many atoms are renumbered along a space-filling curve at each build.
        n_builds: how often the list was built.
        order: (n,) which atom is the first of `pairs` and `geometry`, the second, ...; None where
            they are numbered as they were given.
    """

    rcut: float
    skin: float = 0.5
    ordered: bool = False
    n_builds: int = 0
    order: NDArray[np.int64] | None = field(default=None, init=False, repr=False)
    pairs: Pairs = field(init=False)
    _image: Tensor = field(init=False, repr=False)  # (n_pair,) int16, row of _images
    _images: Tensor = field(init=False, repr=False)  # (n, 3) float64
    _wraps: Tensor = field(init=False, repr=False)  # (n_atom, 3) float64 whole numbers
    _x0: FloatArray | None = field(default=None, init=False, repr=False)
    _h0: FloatArray = field(init=False, repr=False)
    _pbc: NDArray[np.bool_] = field(init=False, repr=False)

    def update(self, positions: FloatArray, cell: ArrayLike, pbc: ArrayLike) -> bool:
        """Make the list right for these positions; returns whether it had to be built."""
        periodic = np.broadcast_to(np.asarray(pbc, dtype=bool), (3,)).copy()
        h = complete_cell(cell, periodic)
        check_finite(positions, "positions")
        if self._is_complete(positions, h, periodic):
            return False
        # Atoms that have left the cell are taken back, so that there are few images.
        wraps = -np.floor(np.linalg.solve(h.T, positions.T).T) * periodic
        self.order, x = None, positions
        if self.ordered and len(positions) >= MANY_ATOMS:
            self.order = space_filling_order(positions + wraps @ h, 0.5 * self.rcut)
            wraps, x = wraps[self.order], positions[self.order]
        self._build(x, wraps, h, periodic)
        self._x0, self._h0, self._pbc = positions.copy(), h, periodic
        self.n_builds += 1
        return True

    def _build(
        self, x: FloatArray, wraps: FloatArray, h: FloatArray, pbc: NDArray[np.bool_]
    ) -> None:
        self._wraps = torch.from_numpy(wraps)
        self.pairs, image = neighbour_pairs(x, h, pbc, self.rcut + self.skin)
        image += self._wraps[self.pairs.receiver] - self._wraps[self.pairs.sender_long]
        self._images, self._image = _table(image)

    def geometry(self, positions: FloatArray, cell: ArrayLike) -> Geometry:
        """The pairs at these positions, which `update` has seen."""
        h = torch.from_numpy(complete_cell(cell, self._pbc))
        x = positions if self.order is None else positions[self.order]
        x = np.ascontiguousarray(x, dtype=np.float64)
        at_home = torch.from_numpy(x) + self._wraps @ h
        return Geometry(at_home, self.pairs, self._image, self._images @ h)

    @property
    def image(self) -> Tensor:
        """(n_pair, 3) float64 whole numbers, the periodic image of each sender."""
        wraps = self._wraps[self.pairs.sender_long] - self._wraps[self.pairs.receiver]
        return self._images[self._image.int()] + wraps

    def r_ij(self, positions: FloatArray, cell: ArrayLike) -> Tensor:
        """(n_pair, 3) float64, x[sender] - x[receiver] + image @ cell."""
        return self.geometry(positions, cell).r_ij()

    def _is_complete(self, x: FloatArray, h: FloatArray, periodic: NDArray[np.bool_]) -> bool:
        x0 = self._x0
        if x0 is None or x0.shape != x.shape or not np.array_equal(periodic, self._pbc):
            return False
        deformation = np.linalg.solve(self._h0, h)
        shrink = 1.0
        if not np.array_equal(h, self._h0):
            shrink = float(np.linalg.svd(deformation, compute_uv=False)[-1])
            x0 = x0 @ deformation
        moved = np.sqrt(np.max(np.sum((x - x0) ** 2, axis=1), initial=0.0))
        return bool(shrink * (self.rcut + self.skin) - 2.0 * moved >= self.rcut)


def _table(image: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n_pair, 3) -> the different ones (n, 3), and which one each pair has."""
    lowest = image.amin(dim=0) if len(image) else image.new_zeros(3)
    span = (image.amax(dim=0) - lowest + 1).long() if len(image) else torch.ones(3).long()
    if int(span.prod()) >= 2**15:
        raise ValueError(
            f"the cutoff reaches over {span.tolist()} periodic images of this cell; give a "
            "supercell"
        )
    place = (image - lowest).long()
    index = (place[:, 0] * span[1] + place[:, 1]) * span[2] + place[:, 2]
    grid = torch.cartesian_prod(*(torch.arange(int(n)) for n in span)).reshape(-1, 3)
    return grid.double() + lowest, index.to(torch.int16)


@dataclass(frozen=True, eq=False)
class Structure:
    """One structure.

    Attributes:
        species: (n,) atomic numbers.
        positions: (n, 3) Å.
        cell: (3, 3) lattice vectors as rows, Å.
        pbc: (3,) periodic directions.
    """

    species: NDArray[np.int64]
    positions: FloatArray
    cell: FloatArray = field(default_factory=lambda: np.zeros((3, 3)))
    pbc: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(3, dtype=bool))


@dataclass(frozen=True, eq=False)
class Batch:
    """Several structures as one disconnected set of pairs.

    Attributes:
        species: (n_atom,) int64.
        pairs: pairs within each structure, atoms numbered through the batch.
        r_ij: (n_pair, 3) float64, Å.
        structure: (n_atom,) int64, structure of each atom.
        n_atoms: (n_structures,) int64.
        volume: (n_structures,) float64, Å^3; NaN where not periodic in three directions.
    """

    species: Tensor
    pairs: Pairs
    r_ij: Tensor
    structure: Tensor
    n_atoms: Tensor
    volume: Tensor

    @property
    def n_structures(self) -> int:
        """Number of structures."""
        return self.n_atoms.numel()

    @classmethod
    def from_structures(cls, structures: Sequence[Structure], rcut: float) -> Batch:
        """Build the neighbours of every structure and join them."""
        return cls.join([cls._single(s, rcut) for s in structures])

    @classmethod
    def _single(cls, s: Structure, rcut: float) -> Batch:
        pbc = np.broadcast_to(np.asarray(s.pbc, dtype=bool), (3,))
        x = np.ascontiguousarray(s.positions, dtype=np.float64).reshape(-1, 3)
        if len(s.species) != len(x):
            raise ValueError(f"a structure has {len(s.species)} species but {len(x)} positions")
        pairs, image = neighbour_pairs(x, s.cell, pbc, rcut)
        h = complete_cell(s.cell, pbc)
        r_ij = pair_vectors(torch.from_numpy(x), pairs, image @ torch.from_numpy(h))
        volume = abs(float(np.linalg.det(h))) if pbc.all() else float("nan")
        n = len(x)
        return cls(
            torch.as_tensor(np.asarray(s.species), dtype=torch.int64),
            pairs,
            r_ij,
            torch.zeros(n, dtype=torch.int64),
            torch.tensor([n]),
            torch.tensor([volume], dtype=torch.float64),
        )

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """Concatenate; already built neighbour lists are reused as they are."""
        if not batches:
            raise ValueError("a batch needs at least one structure")
        if len(batches) == 1:
            return batches[0]
        atoms = np.cumsum([0] + [b.pairs.n_send for b in batches])
        edges = np.cumsum([0] + [b.pairs.n_pair for b in batches])
        first = np.cumsum([0] + [b.n_structures for b in batches])
        row_ptr = [b.pairs.row_ptr[:-1] + int(e) for b, e in zip(batches, edges, strict=False)]
        row_ptr.append(torch.tensor([int(edges[-1])], dtype=torch.int32))
        sender = torch.cat([b.pairs.sender + int(a) for b, a in zip(batches, atoms, strict=False)])
        structure = [b.structure + int(s) for b, s in zip(batches, first, strict=False)]
        return cls(
            torch.cat([b.species for b in batches]),
            Pairs(torch.cat(row_ptr), sender, int(atoms[-1])),
            torch.cat([b.r_ij for b in batches]),
            torch.cat(structure),
            torch.cat([b.n_atoms for b in batches]),
            torch.cat([b.volume for b in batches]),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = (self.species.to(device), self.pairs.to(device), self.r_ij.to(device))
        rest = (self.structure.to(device), self.n_atoms.to(device), self.volume.to(device))
        return Batch(*moved, *rest)
