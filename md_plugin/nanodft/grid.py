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
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_LEVEL = 9
# Last element of each period: the number of radial points depends on the period.
_NOBLE = (2, 10, 18)
# Keeps logarithm and slope finite where an atom's part of a point is below rounding.
_SMALLEST_SHARE = 1e-30


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
        """(..., n_grid, 3) bohr, for positions x (..., n_atom, 3) in bohr."""
        return x[..., self.owner, :] + self.offset

    def weights(self, x: Tensor) -> Tensor:
        """(..., n_grid) weights w_g in bohr^3, differentiable in x (..., n_atom, 3), bohr."""
        i, j = self.pairs
        # By matrix products, cdist's other way, distances would lose half of their digits.
        distance = torch.cdist(x, self.points(x), compute_mode="donot_use_mm_for_euclid_dist")
        apart = (x[..., i, :] - x[..., j, :]).norm(dim=-1)
        mu = (distance[..., i, :] - distance[..., j, :]) / apart[..., None]
        nu = mu + self.shift[:, None] * (1 - mu * mu)
        log_i, log_j = _LogShares.apply(nu)  # type: ignore[no-untyped-call]
        log_p = torch.zeros_like(distance).index_add(-2, i, log_i).index_add(-2, j, log_j)
        owner = self.owner.expand(*x.shape[:-2], 1, len(self))
        return self.volume * log_p.softmax(dim=-2).gather(-2, owner).squeeze(-2)

    def bytes_per_point(self) -> int:
        """Memory that `weights` and its derivative need for each point."""
        return 8 * (14 * self.pairs.shape[1] + 12 * int(self.owner.max() + 1) + 8)


class _LogShares(torch.autograd.Function):
    """ln s(nu) and ln s(-nu): a chain of a dozen small steps, whose slope is made on the way."""

    @staticmethod
    def forward(ctx: Any, nu: Tensor) -> tuple[Tensor, Tensor]:
        needs_slope = ctx.needs_input_grad[0]
        t, slope = nu, torch.full_like(nu, 0.5) if needs_slope else None
        for _ in range(3):
            square = t * t
            t = t * (0.5 * square).sub_(1.5).neg_()
            if slope is not None:
                slope *= square.mul_(-1.5).add_(1.5)
        near, far = ((1 + sign * t).mul_(0.5).clamp_(min=_SMALLEST_SHARE) for sign in (-1, 1))
        if slope is not None:
            ctx.save_for_backward(slope / near, slope / far)
        return near.log_(), far.log_()

    @staticmethod
    def backward(ctx: Any, *of_logs: Tensor) -> Tensor:
        (of_near, of_far), (near, far) = of_logs, ctx.saved_tensors
        return torch.addcmul(of_far * far, of_near, near, value=-1)


def check_level(level: int) -> None:
    """Raise ValueError unless there is a grid of that level."""
    if not isinstance(level, Integral) or isinstance(level, bool) or not 0 <= level <= MAX_LEVEL:
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
