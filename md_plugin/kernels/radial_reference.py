"""Sensitivities and their derivatives in plain torch: the reference by which backends are judged.

    u = 1/r - 1/mu        t = sigma u        c = cos^2(pi r / (2 rcut)), exactly 0 from `end` on
    G = exp(-t^2 / 2), exactly 0 where t^2 / 2 >= 80
    s = G c

First derivatives; g = dL/ds takes them to sums over nu for r, over pairs for mu and sigma:

    s_r = G (c' + c sigma t / r^2)        s_mu = -G c t sigma / mu^2        s_sigma = -G c t u

Second derivatives, as those of h, the derivative of s along a direction (rho_p, alpha_nu, beta_nu):

    h   = D s = rho s_r + alpha s_mu + beta s_sigma = G (rho c' - c t D t)
    D t = sigma (alpha / mu^2 - rho / r^2) + beta u
    e   = rho c' t + c (1 - t^2) D t

    h_r     = -G (e t_r     + c t (D t)_r    ) + G (rho c'' - c' t D t)
    h_mu    = -G (e t_mu    + c t (D t)_mu   )
    h_sigma = -G (e t_sigma + c t (D t)_sigma)

Lubbers, Smith, Barros, J. Chem. Phys. 148, 241715 (2018), eqs. 6-8, for s. Distances and mu in Å,
sigma in Å; every function takes r (n_pair,), mu and sigma (n_nu,).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

# Gaussians below exp(-80) = 2e-35 are exactly zero: the sums skip zeros, and denormal numbers,
# which float32 would have from exp(-88) on, slow every product down several times.
FAR = -80.0

Gradients = tuple[Tensor, Tensor | None, Tensor | None]
Direction = tuple[Tensor, Tensor, Tensor]


class Cutoff(NamedTuple):
    """Where sensitivities end.

    Attributes:
        rcut: where the squared cosine vanishes, Å.
        end: distance from which on all is exactly zero, Å; at most rcut.
    """

    rcut: float
    end: float

    def value(self, r: Tensor) -> Tensor:
        """c at distances r (n_pair,)."""
        return self._inside(r, torch.cos(r * (0.5 * math.pi / self.rcut)).square())

    def derivatives(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """c' and c'' at distances r (n_pair,)."""
        k = math.pi / self.rcut
        first, second = -0.5 * k * torch.sin(k * r), -0.5 * k * k * torch.cos(k * r)
        return self._inside(r, first), self._inside(r, second)

    def _inside(self, r: Tensor, x: Tensor) -> Tensor:
        return torch.where(r < self.end, x, torch.zeros_like(x))


def sensitivity(r: Tensor, mu: Tensor, sigma: Tensor, cutoff: Cutoff) -> Tensor:
    """s (n_pair, n_nu); may be differentiated by autograd, as often as one likes."""
    t = torch.addmm((-sigma / mu)[None, :], r.reciprocal()[:, None], sigma[None, :])
    return _gaussian(t) * cutoff.value(r)[:, None]


def sensitivity_slope(
    grad: Tensor, r: Tensor, mu: Tensor, sigma: Tensor, cutoff: Cutoff, parameters: bool = True
) -> Gradients:
    """g (n_pair, n_nu) -> dr (n_pair,), dmu and dsigma (n_nu,), or None without `parameters`."""
    u, t = _offset(r, mu, sigma)
    c, c1 = cutoff.value(r)[:, None], cutoff.derivatives(r)[0][:, None]
    grad = grad * _gaussian(t)
    grad_r = (grad * (c1 + c * sigma * t * r.pow(-2)[:, None])).sum(dim=1)
    if not parameters:
        return grad_r, None, None
    moment = -grad * c * t
    return grad_r, moment.sum(dim=0) * sigma / mu.square(), (moment * u).sum(dim=0)


def sensitivity_curvature(
    grad: Tensor, r: Tensor, mu: Tensor, sigma: Tensor, along: Direction, cutoff: Cutoff
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sum g h.

    Args:
        grad: g (n_pair, n_nu).
        r: (n_pair,).
        mu: (n_nu,).
        sigma: (n_nu,).
        along: rho (n_pair,), alpha and beta (n_nu,), the cotangents of what the slope gives.
        cutoff: where all ends.

    Returns:
        h (n_pair, n_nu), which is the gradient in g; those in r (n_pair,), mu and sigma (n_nu,).
    """
    u, t = _offset(r, mu, sigma)
    gaussian = _gaussian(t)
    c, c1, c2 = (x[:, None] for x in (cutoff.value(r), *cutoff.derivatives(r)))
    q, m = r.reciprocal()[:, None], mu.reciprocal()
    rho, alpha, beta = along[0][:, None], along[1], along[2]

    du = alpha * m.square() - rho * q.square()
    dt = sigma * du + beta * u
    h = gaussian * (rho * c1 - c * t * dt)
    e = rho * c1 * t + c * (1 - t.square()) * dt

    def inner(t_x: Tensor, dt_x: Tensor) -> Tensor:
        return -grad * gaussian * (e * t_x + c * t * dt_x)

    of_r = inner(-sigma * q.square(), 2 * rho * sigma * q.pow(3) - beta * q.square())
    of_r = of_r + grad * gaussian * (rho * c2 - c1 * t * dt)
    of_mu = inner(sigma * m.square(), beta * m.square() - 2 * alpha * sigma * m.pow(3))
    of_sigma = inner(u, du)
    return h, of_r.sum(dim=1), of_mu.sum(dim=0), of_sigma.sum(dim=0)


def _offset(r: Tensor, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """u and t (n_pair, n_nu)."""
    u = r.reciprocal()[:, None] - mu.reciprocal()
    return u, sigma * u


def _gaussian(t: Tensor) -> Tensor:
    return torch.exp(threshold(-0.5 * t.square(), FAR, -torch.inf))
