"""Exchange-correlation functionals of closed shells: Slater, VWN5, VWN (RPA), B88, LYP and sums.

    E_xc = int e(rho, sigma) dr,    sigma = |grad rho|^2;    e in Ha/bohr^3, lengths in bohr

Each functional is the formula of its paper at zero spin polarisation, followed by its derivatives

    v_rho = de/drho,    v_sigma = de/dsigma

Where rho is below `MIN_DENSITY`, all three are exactly zero: quotients of vanishing densities are
nothing that a computer could form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

MIN_DENSITY = 1e-14  # 1/bohr^3

Derivatives = tuple[Tensor, Tensor, Tensor]  # e, v_rho, v_sigma; (n,) each


def slater(rho: Tensor) -> tuple[Tensor, Tensor]:
    """e and v_rho of the uniform electron gas's exchange (Dirac 1930; Slater 1951)."""
    factor: float = -0.75 * (3 / math.pi) ** (1 / 3)
    root = rho.pow(1 / 3)
    return factor * rho * root, 4 / 3 * factor * root


def b88(rho: Tensor, sigma: Tensor) -> Derivatives:
    """What Becke's exchange adds to Slater's, Phys. Rev. A 38, 3098 (1988), eq. 8."""
    beta = 0.0042
    rho43 = (0.5 * rho).pow(4 / 3)  # of one spin
    s = 0.5 * sigma.sqrt() / rho43
    arc = s.asinh()
    g = 1 + 6 * beta * s * arc
    s_dlng_ds = 6 * beta * s * (arc + s * (1 + s * s).rsqrt()) / g
    per_sigma = -0.5 * beta / (rho43 * g)
    e = per_sigma * sigma
    return e, -4 / 3 * e / rho * (1 - s_dlng_ds), per_sigma * (1 - 0.5 * s_dlng_ds)


def _vwn(rho: Tensor, x0: float, b: float, c: float) -> tuple[Tensor, Tensor]:
    """Vosko, Wilk, Nusair, Can. J. Phys. 58, 1200 (1980), eq. 4.4, paramagnetic; A in Ha."""
    a = 0.0310907
    q = math.sqrt(4 * c - b * b)
    k = b * x0 / (x0 * x0 + b * x0 + c)
    x = (4 * math.pi / 3 * rho).pow(-1 / 6)  # square root of the Wigner-Seitz radius
    big_x = x * x + b * x + c
    arc = (q / (2 * x + b)).atan() / q
    uniform = (x * x / big_x).log() + 2 * b * arc
    shifted = ((x - x0) ** 2 / big_x).log() + 2 * (b + 2 * x0) * arc
    energy = a * (uniform - k * shifted)
    # the arc's slope is -1 / (2 X), because q^2 + (2 x + b)^2 = 4 X
    slope_uniform = 2 / x - 2 * (x + b) / big_x
    slope_shifted = 2 / (x - x0) - 2 * (x + b + x0) / big_x
    slope = a * (slope_uniform - k * slope_shifted)
    return rho * energy, energy - x / 6 * slope


def vwn5(rho: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation of the uniform gas, the paper's fit V to Ceperley and Alder's energies."""
    return _vwn(rho, x0=-0.10498, b=3.72744, c=12.9352)


def vwn_rpa(rho: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation of the uniform gas, the paper's fit to the random phase approximation."""
    return _vwn(rho, x0=-0.409286, b=13.0720, c=42.7198)


def lyp(rho: Tensor, sigma: Tensor) -> Derivatives:
    """Lee, Yang, Parr, Phys. Rev. B 37, 785 (1988), without second derivatives of the density.

    Miehlich et al., Chem. Phys. Lett. 157, 200 (1989), eq. 2, at equal spin densities:

        e = -a h [rho + b exp(-c u) (C_F rho - sigma u^5 m)],    u = rho^(-1/3)
        h = 1 / (1 + d u),    m = (3 + 7 delta) / 72,    delta = u (c + d h)
    """
    a, b, c, d = 0.04918, 0.132, 0.2533, 0.349
    kinetic: float = 0.3 * (3 * math.pi**2) ** (2 / 3)
    u = rho.pow(-1 / 3)
    h = 1 / (1 + d * u)
    decay = b * (-c * u).exp()
    m = (3 + 7 * u * (c + d * h)) / 72
    u4 = u.square().square()
    inner = kinetic * rho - sigma * u4 * u * m
    outer = rho + decay * inner
    slope_m = 7 / 72 * (c + d * h * h)
    slope_inner = -sigma * u4 * (5 * m + u * slope_m)
    slope_u = -d * h * outer + decay * (slope_inner - c * inner)
    v_rho = -a * h * (1 + decay * kinetic - u / (3 * rho) * slope_u)
    return -a * h * outer, v_rho, a * h * decay * u4 * u * m


def _svwn(rho: Tensor, sigma: Tensor) -> Derivatives:
    exchange, correlation = slater(rho), vwn5(rho)
    return exchange[0] + correlation[0], exchange[1] + correlation[1], torch.zeros_like(sigma)


def _b3lyp(
    rho: Tensor, sigma: Tensor, vwn: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Derivatives:
    """Stephens et al., J. Phys. Chem. 98, 11623 (1994), without the exact exchange (20 %)."""
    local = zip(slater(rho), vwn(rho), strict=True)
    e, v_rho = (0.8 * exchange + 0.19 * correlation for exchange, correlation in local)
    becke, lee = b88(rho, sigma), lyp(rho, sigma)
    e_gradient, v_gradient, v_sigma = (
        0.72 * exchange + 0.81 * correlation
        for exchange, correlation in zip(becke, lee, strict=True)
    )
    return e + e_gradient, v_rho + v_gradient, v_sigma


@dataclass(frozen=True)
class Functional:
    """A method of Kohn-Sham theory.

    Attributes:
        name: as users write it.
        hyb: fraction of exact exchange.
        density_functional: e, v_rho, v_sigma of positive rho and sigma; None in Hartree-Fock.
        gradient: e depends on sigma.
    """

    name: str
    hyb: float
    density_functional: Callable[[Tensor, Tensor], Derivatives] | None
    gradient: bool = False

    def evaluate(self, rho: Tensor, sigma: Tensor) -> Derivatives:
        """Energy density and its derivatives.

        Args:
            rho: (n,) density, 1/bohr^3.
            sigma: (n,) squared gradient of the density, 1/bohr^8; ignored by svwn.

        Returns:
            e, v_rho, v_sigma, (n,) each; zeros where rho < MIN_DENSITY.
        """
        assert self.density_functional is not None, f"{self.name} has no density functional"
        outside = rho < MIN_DENSITY
        values = self.density_functional(
            rho.masked_fill(outside, 1.0), sigma.masked_fill(outside, 0.0)
        )
        e, v_rho, v_sigma = (value.masked_fill(outside, 0.0) for value in values)
        return e, v_rho, v_sigma


METHODS = {
    "hf": Functional("hf", 1.0, None),
    "svwn": Functional("svwn", 0.0, _svwn),
    "b3lyp": Functional("b3lyp", 0.2, partial(_b3lyp, vwn=vwn_rpa), gradient=True),
    "b3lyp5": Functional("b3lyp5", 0.2, partial(_b3lyp, vwn=vwn5), gradient=True),
}


def get_functional(name: str) -> Functional:
    """The method of that name, in any case.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name.lower() not in METHODS:
        raise ValueError(f"xc {name!r} is not known; choose {', '.join(METHODS)}")
    return METHODS[name.lower()]
