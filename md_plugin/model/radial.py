"""Sensitivities: how strongly a pair at distance r is felt in each of n_nu radial channels.

    cutoff(r)  = cos^2(pi r / (2 rcut))   for r < rcut, else exactly 0
    s_nu(r)    = exp(-(sigma_nu (1/r - 1/mu_nu))^2 / 2) cutoff(r)
    s_nu(r)    = sum_k g_k(r) matching[k, nu]      where a bottleneck makes n_nu of n_gaussians g_k

Gaussians in inverse distance with trainable centres mu (Å) and inverse widths sigma (Å), under a
squared-cosine cutoff: Lubbers, Smith, Barros, J. Chem. Phys. 148, 241715 (2018), eqs. 6-8. The
backend computes them and their derivatives: `md_plugin.kernels.radial_reference`.

    tensors    1;  r_hat;  r_hat r_hat^T - 1/3        (components of order 0, 1, 2)

The traceless quadrupole is stored as its xx, xy, xz, yy, yz elements (zz follows from the trace):
Chigaev et al., J. Chem. Phys. 158, 184108 (2023). HIP-HOP-NN goes on to order 3, whose traceless
tensor has the elements xxx, xxy, xxz, xyy, xyz, yyy, yyz.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from md_plugin.kernels.radial_reference import Cutoff
from md_plugin.kernels.registry import Backend, resolve
from md_plugin.model.invariants import monomials, monomials_of_components, projection

N_COMPONENTS = (1, 4, 9, 16)  # by order: scalar; + vector; + quadrupole; + octupole


class Distance(torch.autograd.Function):
    """r = |r_ij|: (n_pair, 3) -> (n_pair,), any derivative.

    torch's own norm takes twice as long when forces are trained, since it looks for zeros each
    time. Here the gradient of a distance of zero is NaN: no two atoms are at one place.
    """

    @staticmethod
    def forward(ctx: Any, r_ij: Tensor) -> Tensor:
        """The length of each row."""
        r: Tensor = torch.linalg.vector_norm(r_ij, dim=1)
        ctx.save_for_backward(r_ij, r)
        return r

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """dr/dr_ij = r_ij / r, of which r is differentiated as above."""
        r_ij, r = ctx.saved_tensors
        return r_ij * (grads[0] / r)[:, None]


class InverseGaussianSensitivity(nn.Module):
    """Sensitivities s_nu(r); trainable `mu` and `sigma`, each one number per Gaussian, in Å.

    The centres start evenly spaced in 1/r between r_min and r_max; the inverse width starts at
    2 n r_min for n Gaussians, which makes neighbours overlap (hippynn's starting point).

    Args:
        n_nu: sensitivities.
        r_min: centre of the innermost Gaussian at the start, Å.
        r_max: centre of the outermost Gaussian at the start, Å.
        rcut: cutoff, Å.
        n_gaussians: Gaussians of which a trainable matrix makes the sensitivities; None: n_nu, and
            no matrix.
        end: distance from which on all is zero, if before rcut, Å.
    """

    def __init__(
        self,
        n_nu: int,
        r_min: float,
        r_max: float,
        rcut: float,
        n_gaussians: int | None = None,
        end: float | None = None,
    ):
        super().__init__()
        self.n_nu, self.rcut, self.end = n_nu, rcut, end
        n = n_gaussians or n_nu
        self.mu = nn.Parameter(1.0 / torch.linspace(1.0 / r_max, 1.0 / r_min, n))
        self.sigma = nn.Parameter(torch.full((n,), 2.0 * n * r_min))
        self.matching: nn.Parameter | None = None
        if n_gaussians is not None:
            self.matching = nn.Parameter(nn.init.orthogonal_(torch.empty(n, n_nu)))

    def forward(self, r: Tensor, backend: Backend | None = None) -> Tensor:
        """Distances (n_pair,) in Å -> sense (n_pair, n_nu)."""
        backend = backend or resolve(None, None, r.device)
        cutoff = Cutoff(self.rcut, self.rcut if self.end is None else self.end)
        sense = backend.sensitivity(r, self.mu, self.sigma, cutoff)
        return sense if self.matching is None else sense @ self.matching


class TensorComponents(nn.Module):
    """Unit vectors -> components of their traceless tensors, for HIP-HOP-NN.

    The matrices from the monomials of a vector to its tensors are stored with the model: hippynn
    rounds them to the precision in which it was imported, and a model keeps what it was trained on.
    They are float64 in every precision of the network.
    """

    def __init__(self, order: int):
        super().__init__()
        self.order = order
        for l in range(2, order + 1):
            self.register_buffer(f"projection_{l}", projection(l))

    def forward(self, r_hat: Tensor) -> Tensor:
        """(n_pair, 3) -> (n_pair, 1 | 4 | 9 | 16)."""
        parts = [torch.ones_like(r_hat[:, :1]), r_hat][: self.order + 1]
        products = r_hat
        for l in range(2, self.order + 1):
            products = _next_monomials(products, r_hat, l)
            matrix: Tensor = getattr(self, f"projection_{l}")
            parts.append(products @ matrix.to(products.dtype))
        return torch.cat(parts, dim=1)

    def of_exact(self) -> Tensor:
        """(C, C) float64: these components from those of matrices that were never rounded."""
        matrix = torch.eye((self.order + 1) ** 2, dtype=torch.float64)
        for l in range(2, self.order + 1):
            stored: Tensor = getattr(self, f"projection_{l}")
            lower = (l + 1) ** 2
            matrix[l * l : lower, :lower] = stored.T.cpu().double() @ monomials_of_components(l)
        return matrix

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        device = fn(torch.empty(0)).device
        for name, matrix in self.named_buffers():
            setattr(self, name, matrix.to(device))
        return self


def _next_monomials(products: Tensor, r_hat: Tensor, order: int) -> Tensor:
    """Monomials of one order less (n_pair, ...) -> those of `order`."""
    lower = {m: k for k, m in enumerate(monomials(order - 1))}
    columns = [products[:, lower[m[:-1]]] * r_hat[:, m[-1]] for m in monomials(order)]
    return torch.stack(columns, dim=1)


def tensor_components(r_hat: Tensor, order: int) -> Tensor:
    """Unit vectors (n_pair, 3) -> (n_pair, 1 | 4 | 9) components up to `order`."""
    parts = [torch.ones_like(r_hat[:, :1])]
    if order >= 1:
        parts.append(r_hat)
    if order >= 2:
        x, y, z = r_hat.unbind(dim=1)
        parts.append(torch.stack([x * x - 1 / 3, x * y, x * z, y * y - 1 / 3, y * z], dim=1))
    return torch.cat(parts, dim=1)
