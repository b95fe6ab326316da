"""Sensitivities: how strongly a pair at distance r is felt in each of n_nu radial channels.

    cutoff(r)  = cos^2(pi r / (2 rcut))   for r < rcut, else exactly 0
    s_nu(r)    = exp(-(sigma_nu (1/r - 1/mu_nu))^2 / 2) cutoff(r)

Gaussians in inverse distance with trainable centres mu (Å) and inverse widths sigma (Å), under a
squared-cosine cutoff: Lubbers, Smith, Barros, J. Chem. Phys. 148, 241715 (2018), eqs. 6-8.

    tensors    1;  r_hat;  r_hat r_hat^T - 1/3        (components of order 0, 1, 2)

The traceless quadrupole is stored as its xx, xy, xz, yy, yz elements (zz follows from the trace):
Chigaev et al., J. Chem. Phys. 158, 184108 (2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import threshold

# Gaussians below exp(-80) = 2e-35 are exactly zero: the sums skip zeros, and denormal numbers,
# which float32 would have from exp(-88) on, slow every product down several times.
FAR = -80.0
N_COMPONENTS = (1, 4, 9)  # by order: scalar; + vector; + traceless quadrupole


def cutoff(r: Tensor, rcut: float) -> Tensor:
    """Squared-cosine cutoff of distances r (n_pair,); exactly zero from rcut on."""
    inside = torch.cos(r * (0.5 * math.pi / rcut)).square()
    return torch.where(r < rcut, inside, torch.zeros_like(inside))


class InverseGaussianSensitivity(nn.Module):
    """Sensitivities s_nu(r); trainable `mu` and `sigma`, each (n_nu,), in Å.

    The centres start evenly spaced in 1/r between r_min and r_max; the inverse width starts at
    2 n_nu r_min, which makes neighbouring Gaussians overlap (hippynn's starting point).
    """

    def __init__(self, n_nu: int, r_min: float, r_max: float, rcut: float):
        super().__init__()
        self.rcut = rcut
        self.mu = nn.Parameter(1.0 / torch.linspace(1.0 / r_max, 1.0 / r_min, n_nu))
        self.sigma = nn.Parameter(torch.full((n_nu,), 2.0 * n_nu * r_min))

    def forward(self, r: Tensor) -> Tensor:
        """Distances (n_pair,) in Å -> sense (n_pair, n_nu)."""
        scaled = torch.addmm(
            (-self.sigma / self.mu)[None, :], r.reciprocal()[:, None], self.sigma[None, :]
        )
        exponent = threshold(-0.5 * scaled.square(), FAR, -torch.inf)
        return torch.exp(exponent) * cutoff(r, self.rcut)[:, None]


def tensor_components(r_hat: Tensor, order: int) -> Tensor:
    """Unit vectors (n_pair, 3) -> (n_pair, 1 | 4 | 9) components up to `order`."""
    parts = [torch.ones_like(r_hat[:, :1])]
    if order >= 1:
        parts.append(r_hat)
    if order >= 2:
        x, y, z = r_hat.unbind(dim=1)
        parts.append(torch.stack([x * x - 1 / 3, x * y, x * z, y * y - 1 / 3, y * z], dim=1))
    return torch.cat(parts, dim=1)
