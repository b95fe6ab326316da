"""Becke's molecular grid, the one that PySCF makes by default.

    int f(r) dr  =  sum_g w_g f(r_g),    r_g = R_o(g) + d_g,    w_g = v_g P_o(g) / sum_i P_i

Each point g belongs to an atom o(g) and moves with it; d_g and the volume v_g are those of the free
atom. The partition (Becke, J. Chem. Phys. 88, 2547 (1988), eqs. 11-22) is a softmax of

    ln P_i = sum_{j != i} ln s(nu_ij),       s(nu) = (1 - f(f(f(nu)))) / 2,  f(t) = (3 t - t^3) / 2
    nu_ij  = mu_ij + a_ij (1 - mu_ij^2),     mu_ij = (|r_g - R_i| - |r_g - R_j|) / |R_i - R_j|

with a_ij from the square roots of Bragg radii (Treutler and Ahlrichs, J. Chem. Phys. 102, 346
(1995)). Lengths in bohr. Radial points (same paper, M4), Lebedev points and NWChem's pruning come
from PySCF's tables, so that the same grid results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_LEVEL = 9
# Last element of each period: the number of radial points depends on the period.
_NOBLE = (2, 10, 18)
# Keeps the logarithm finite where an atom has no part of a point; its share is below rounding.
_SMALLEST_SHARE = 1e-300


@dataclass(frozen=True, eq=False)
class Grid:
    """Grid of one composition; holds no positions, so that it serves a whole trajectory.

    Attributes:
        owner: (n_grid,) index of the atom that a point moves with.
        offset: (n_grid, 3) from that atom, bohr.
        volume: (n_grid,) weight in the free atom, bohr^3.
        pairs: (2, n_pair) all atoms i < j.
        shift: (n_pair,) Treutler's a_ij.
    """

    owner: Tensor
    offset: Tensor
    volume: Tensor
    pairs: Tensor
    shift: Tensor

    @classmethod
    def build(cls, numbers: Sequence[int], level: int, device: torch.device | str = "cpu") -> Grid:
        """The grid of PySCF's `level`.

        Args:
            numbers: (n_atom,) atomic numbers, 1 to 18.
            level: 0 (coarse) to 9.
            device: where the tensors live.

        Raises:
            ValueError: there is no such level.
        """
        check_level(level)
        atoms = {z: _atomic_grid(z, level) for z in dict.fromkeys(numbers)}
        offset, volume = (np.concatenate([atoms[z][k] for z in numbers]) for k in (0, 1))
        owner = np.repeat(np.arange(len(numbers)), [len(atoms[z][1]) for z in numbers])
        i, j = np.triu_indices(len(numbers), 1)
        radius = _bragg_radii()[list(numbers)]
        ratio = np.sqrt(radius[j] / radius[i])
        shift = (0.25 * (ratio - 1 / ratio)).clip(-0.5, 0.5)
        arrays = (owner, offset, volume, np.stack([i, j]), shift)
        return cls(*(torch.as_tensor(a, device=device) for a in arrays))

    def __len__(self) -> int:
        return len(self.owner)

    def chunks(self, size: int) -> Iterator[Grid]:
        """Consecutive parts of at most `size` points."""
        for start in range(0, len(self), max(1, size)):
            part = slice(start, start + max(1, size))
            yield Grid(
                self.owner[part], self.offset[part], self.volume[part], self.pairs, self.shift
            )

    def points(self, x: Tensor) -> Tensor:
        """(n_grid, 3) bohr, for positions x (n_atom, 3) in bohr."""
        return x[self.owner] + self.offset

    def weights(self, x: Tensor) -> Tensor:
        """(n_grid,) weights w_g in bohr^3, differentiable in the positions x (n_atom, 3), bohr."""
        i, j = self.pairs
        # (n_atom, n_grid), the point last: the sums below then run along memory
        distance = (self.points(x) - x[:, None]).norm(dim=-1)
        apart = (x[i] - x[j]).norm(dim=-1)
        mu = (distance[i] - distance[j]) / apart[:, None]
        t = mu + self.shift[:, None] * (1 - mu * mu)
        for _ in range(3):
            t = 0.5 * t * (3 - t * t)
        log_p = torch.zeros_like(distance)
        log_p = log_p.index_add(0, i, (0.5 * (1 - t)).clamp(min=_SMALLEST_SHARE).log())
        log_p = log_p.index_add(0, j, (0.5 * (1 + t)).clamp(min=_SMALLEST_SHARE).log())
        share = log_p.softmax(dim=0).gather(0, self.owner[None])[0]
        return self.volume * share

    def bytes_per_point(self) -> int:
        """Memory that `weights` and its derivative need for each point."""
        return 8 * (14 * self.pairs.shape[1] + 12 * int(self.owner.max() + 1) + 8)


def check_level(level: int) -> None:
    """Raise ValueError unless there is a grid of that level."""
    if level not in range(MAX_LEVEL + 1):
        raise ValueError(f"grid_level must be an integer from 0 to {MAX_LEVEL}, got {level!r}")


def _atomic_grid(number: int, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 3) in bohr around a free atom, and their volumes (n,) in bohr^3."""
    gen_grid, radi = _pyscf_tables()
    period = int(np.searchsorted(_NOBLE, number))
    n_radial = gen_grid.RAD_GRIDS[level, period]
    n_angular = gen_grid.LEBEDEV_ORDER[gen_grid.ANG_ORDER[level, period]]
    r, dr = radi.treutler_ahlrichs(n_radial, number)
    shells = gen_grid.nwchem_prune(number, r, n_angular)
    points, volumes = [], []
    for n in np.unique(shells):
        sphere = np.asarray(gen_grid.MakeAngularGrid(int(n)))
        here = shells == n
        points.append((r[here, None, None] * sphere[:, :3]).reshape(-1, 3))
        volumes.append(np.outer(4 * np.pi * r[here] ** 2 * dr[here], sphere[:, 3]).ravel())
    return np.concatenate(points), np.concatenate(volumes)


def _bragg_radii() -> np.ndarray:
    _, radi = _pyscf_tables()
    return np.asarray(radi.BRAGG_RADII)


def _pyscf_tables() -> tuple[Any, Any]:
    """PySCF's modules of angular and of radial grids."""
    try:
        from pyscf.dft import gen_grid, radi
    except ImportError as error:
        raise ImportError("nanodft needs PySCF: pip install 'md-plugin[dft]'") from error
    return gen_grid, radi
