"""BatchList: the neighbours of many systems as one list on their device, reused within a skin.

    r_ij[p] = x[sender(p)] - x[receiver(p)] + image[p] @ cell[system(p)]

Reuse follows the rule of `md_plugin.neighbours`, system by system and without leaving the device.
With positions x0 and cells h0 at the build, x and h now,

    F = 1 + h0^+ (h - h0)      so that h = h0 F; rows that are not periodic count as zero
    s = 1 - |F - 1|            Frobenius norm: no singular value of F is smaller (Weyl)
    d = |x - x0 F|             of each atom

and a list built with rcut + skin is complete as long as s (rcut + skin) - 2 d >= rcut everywhere.
The answer is the one number for which the host waits for the device in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from md_plugin.device_neighbours import search_cells
from md_plugin.neighbours import check_finite, complete_cell, neighbour_pairs
from md_plugin.pairs import Geometry, Pairs, rows_times

MAX_TRANSLATIONS = 2**15  # that two bytes can count, as fused inference does


@dataclass(frozen=True, eq=False)
class Systems:
    """Systems one after the other, all on one device.

    Attributes:
        species: (n_atom,) int64 atomic numbers.
        positions: (n_atom, 3) Å; need not lie inside the cells.
        cell: (n_systems, 3, 3) lattice vectors as rows, Å.
        system: (n_atom,) int64, system of each atom, ascending.
        pbc: which directions are periodic, in all systems.
    """

    species: Tensor
    positions: Tensor
    cell: Tensor
    system: Tensor
    pbc: tuple[bool, bool, bool]

    @property
    def n_systems(self) -> int:
        """Number of systems."""
        return len(self.cell)

    def sizes(self) -> list[int]:
        """Number of atoms of each system; the host waits for it."""
        sizes: list[int] = torch.bincount(self.system, minlength=self.n_systems).tolist()
        return sizes

    def near(self, reference: Tensor | None) -> tuple[Systems, Tensor]:
        """The same systems, each atom moved by whole lattice vectors to next to where it was.

        Undoes the wrapping of an engine, which would look like a long way to a list. A periodic
        system is the same for any reference.

        Args:
            reference: (n_atom, 3) fractional coordinates that an earlier call returned, or None;
                1/2 puts atoms into their cell.

        Returns:
            The systems, and their fractional coordinates, zero where not periodic.
        """
        if not any(self.pbc):
            return self, torch.zeros_like(self.positions)
        # Not inv, for whose verdict the host would wait; a flat cell is found at the next build.
        inverse = torch.linalg.inv_ex(self.cell)[0] if all(self.pbc) else self.pinv()
        fractional = rows_times(self.positions, inverse[self.system])
        if reference is None or reference.shape != fractional.shape:
            return self, fractional
        images = (fractional - reference).round().nan_to_num(0.0, 0.0, 0.0)
        for axis in (k for k, periodic in enumerate(self.pbc) if not periodic):
            images[:, axis] = 0.0
        x = self.positions - rows_times(images, self.cell[self.system])
        return replace(self, positions=x), fractional - images

    def periodic_rows(self) -> Tensor:
        """(n_systems, 3, 3) lattice vectors, zero where not periodic."""
        rows = [self.cell[:, k] * float(periodic) for k, periodic in enumerate(self.pbc)]
        return torch.stack(rows, dim=1)

    def pinv(self) -> Tensor:
        """(n_systems, 3, 3) pseudo-inverse of `periodic_rows`."""
        inverse: Tensor = torch.linalg.pinv(self.periodic_rows())
        return inverse


# systems, cutoff (Å) -> receiver (n_pair,), sender (n_pair,), image (n_pair, 3) whole numbers
Search = Callable[[Systems, float], tuple[Tensor, Tensor, Tensor]]


def search_on_host(systems: Systems, rcut: float) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs closer than rcut, from `neighbour_pairs`, any mix of periodic directions."""
    device, sizes = systems.positions.device, systems.sizes()
    positions = torch.split(systems.positions.cpu().double(), sizes)
    cells = systems.cell.cpu().double().numpy()
    found, first = [], 0
    for x, cell in zip(positions, cells, strict=True):
        pairs, image = neighbour_pairs(x.numpy(), cell, systems.pbc, rcut)
        found.append((pairs.receiver + first, pairs.sender_long + first, image))
        first += len(x)
    receiver, sender, image = (torch.cat(part).to(device) for part in zip(*found, strict=True))
    return receiver, sender, image


def search_on_device(systems: Systems, rcut: float) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs closer than rcut, from `search_cells`, where the systems are."""
    cells = [complete_cell(h, np.array(systems.pbc)) for h in systems.cell.cpu().double().numpy()]
    found = search_cells(
        systems.positions, np.stack(cells), systems.pbc, rcut, system=systems.system
    )
    receiver, sender = found.pairs.receiver, found.pairs.sender_long
    wraps = found.wraps[sender] - found.wraps[receiver]
    return receiver, sender, found.images[found.image] + wraps


def search(systems: Systems, rcut: float) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs closer than rcut, by cells on a GPU, by vesin on a CPU, where it is faster."""
    on_device = systems.positions.device.type != "cpu"
    return search_on_device(systems, rcut) if on_device else search_on_host(systems, rcut)


class BatchList:
    """The neighbour list of a batch.

    Args:
        rcut: cutoff of the potential, Å.
        skin: extra distance stored, Å.
        search: finds the pairs.

    Attributes:
        pairs: pairs within each system, atoms numbered through the batch.
    """

    pairs: Pairs

    def __init__(self, rcut: float, skin: float, search: Search = search):
        self.rcut, self.skin, self._search = rcut, skin, search
        self._built: Systems | None = None

    def fits(self, systems: Systems) -> bool:
        """Whether the list was built for these atoms and is complete; the host waits for it."""
        old = self._built
        if old is None or old.pbc != systems.pbc or old.cell.shape != systems.cell.shape:
            return False
        if old.species.shape != systems.species.shape:
            return False
        same = (old.species == systems.species).all() & (old.system == systems.system).all()
        change = systems.periodic_rows() - self._h0
        strain = torch.linalg.matrix_norm(self._inverse @ change)
        shrunk = (1.0 - strain) * (self.rcut + self.skin)
        affine = old.positions + rows_times(self._fractional, change[systems.system])
        moved = torch.linalg.vector_norm(systems.positions - affine, dim=1)
        complete = shrunk[systems.system] - 2.0 * moved >= self.rcut
        return bool(same & complete.all())

    def build(self, systems: Systems) -> None:
        """Search the pairs of these systems.

        Raises:
            ValueError: positions or cells are not finite, or a cell is flat.
        """
        if not bool(systems.positions.isfinite().all() & systems.cell.isfinite().all()):
            check_finite(systems.positions.cpu().double().numpy(), "positions")
            check_finite(systems.cell.cpu().double().numpy().reshape(-1, 3), "cell vectors")
        receiver, sender, image = self._search(systems, self.rcut + self.skin)
        n_atom = len(systems.positions)
        self.pairs, perm = Pairs.from_edges(receiver, sender, n_atom, n_atom)
        system = systems.system[self.pairs.receiver]
        which, one = _different(system, image[perm].long())
        self._translation = which.short() if len(one) <= MAX_TRANSLATIONS else which.int()
        self._image = image[perm][one].to(systems.cell.dtype)
        self._image_system = system[one]
        self._h0 = systems.periodic_rows()
        self._inverse = systems.pinv()
        self._fractional = rows_times(systems.positions, self._inverse[systems.system])
        copies = (systems.species.clone(), systems.positions.clone(), systems.cell.clone())
        # An integrator may write into its state.
        self._built = Systems(*copies, systems.system.clone(), systems.pbc)

    @property
    def n_translations(self) -> int:
        """How many different periodic shifts the systems have together."""
        return len(self._image)

    def geometry(self, systems: Systems) -> Geometry:
        """The pairs at these positions, which `fits` has seen; in the dtype of the positions.

        `translation` is int32 where there are more than `MAX_TRANSLATIONS`.
        """
        translations = rows_times(self._image, systems.cell[self._image_system])
        return Geometry(systems.positions, self.pairs, self._translation, translations)


def _different(system: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """The different (system, image) of pairs: which one each pair has, and a pair that has it."""
    if len(image) == 0:
        return system, system
    lowest = image.amin(dim=0)
    span = image.amax(dim=0) - lowest + 1
    place = image - lowest
    key = ((system * span[0] + place[:, 0]) * span[1] + place[:, 1]) * span[2] + place[:, 2]
    kinds, which = torch.unique(key, return_inverse=True)
    pairs = torch.arange(len(key), device=key.device)
    return which, torch.zeros_like(kinds).scatter_(0, which, pairs)
