"""Exchange-correlation functionals of closed shells: Slater, VWN5, VWN (RPA), B88, LYP and sums.

    E_xc = int e(rho, sigma) dr,    sigma = |grad rho|^2;    e in Ha/bohr^3, lengths in bohr

Each functional is the formula of its paper at zero spin polarisation; derivatives come from
autograd. Where rho is below `MIN_DENSITY`, energy and derivatives are exactly zero: quotients of
vanishing densities have no derivative that a computer could form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_DENSITY = 1e-14  # 1/bohr^3
_MIN_SIGMA = 1e-40  # below, B88's square root has no slope; its term is 0 there anyway

EnergyDensity = Callable[[Tensor, Tensor], Tensor]


def slater(rho: Tensor, sigma: Tensor) -> Tensor:
    """Exchange of the uniform electron gas (Dirac 1930; Slater 1951)."""
    factor: float = -0.75 * (3 / math.pi) ** (1 / 3)
    return factor * rho.pow(4 / 3)


def b88(rho: Tensor, sigma: Tensor) -> Tensor:
    """Becke's exchange, Phys. Rev. A 38, 3098 (1988), eq. 8, Slater's part included."""
    beta = 0.0042
    rho43 = (0.5 * rho).pow(4 / 3)  # of one spin
    s = 0.5 * sigma.clamp(min=_MIN_SIGMA).sqrt() / rho43
    gradient_part = -2 * beta * rho43 * s * s / (1 + 6 * beta * s * s.asinh())
    return slater(rho, sigma) + gradient_part


def _vwn(rho: Tensor, x0: float, b: float, c: float) -> Tensor:
    """Vosko, Wilk, Nusair, Can. J. Phys. 58, 1200 (1980), eq. 4.4, paramagnetic; A in Ha."""
    a = 0.0310907
    q = math.sqrt(4 * c - b * b)
    x = (4 * math.pi / 3 * rho).pow(-1 / 6)  # square root of the Wigner-Seitz radius
    big_x = x * x + b * x + c
    arc = (q / (2 * x + b)).atan()
    shifted = ((x - x0) ** 2 / big_x).log() + 2 * (b + 2 * x0) / q * arc
    uniform = (x * x / big_x).log() + 2 * b / q * arc
    return a * rho * (uniform - b * x0 / (x0 * x0 + b * x0 + c) * shifted)


def vwn5(rho: Tensor, sigma: Tensor) -> Tensor:
    """Correlation of the uniform gas, the paper's fit V to Ceperley and Alder's energies."""
    return _vwn(rho, x0=-0.10498, b=3.72744, c=12.9352)


def vwn_rpa(rho: Tensor, sigma: Tensor) -> Tensor:
    """Correlation of the uniform gas, the paper's fit to the random phase approximation."""
    return _vwn(rho, x0=-0.409286, b=13.0720, c=42.7198)


def lyp(rho: Tensor, sigma: Tensor) -> Tensor:
    """Lee, Yang, Parr, Phys. Rev. B 37, 785 (1988), without second derivatives of the density.

    Miehlich et al., Chem. Phys. Lett. 157, 200 (1989), eq. 2, at equal spin densities.
    """
    a, b, c, d = 0.04918, 0.132, 0.2533, 0.349
    kinetic: float = 0.3 * (3 * math.pi**2) ** (2 / 3)
    t = rho.pow(-1 / 3)
    screening = 1 / (1 + d * t)
    delta = c * t + d * t * screening
    gradient_part = sigma * t**5 * (3 + 7 * delta) / 72
    return -a * screening * (rho + b * (-c * t).exp() * (kinetic * rho - gradient_part))


def _b3lyp(rho: Tensor, sigma: Tensor, vwn: EnergyDensity) -> Tensor:
    """Stephens et al., J. Phys. Chem. 98, 11623 (1994), without the exact exchange."""
    exchange = 0.08 * slater(rho, sigma) + 0.72 * b88(rho, sigma)
    return exchange + 0.19 * vwn(rho, sigma) + 0.81 * lyp(rho, sigma)


@dataclass(frozen=True)
class Functional:
    """A method of Kohn-Sham theory.

    Attributes:
        name: as users write it.
        hyb: fraction of exact exchange.
        energy_density: e(rho, sigma); None where there is no density functional (Hartree-Fock).
        gradient: e depends on sigma.
    """

    name: str
    hyb: float
    energy_density: EnergyDensity | None
    gradient: bool = False

    def evaluate(self, rho: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Energy density and its derivatives.

        Args:
            rho: (n,) density, 1/bohr^3.
            sigma: (n,) squared gradient of the density, 1/bohr^8; ignored by svwn.

        Returns:
            e, de/drho, de/dsigma, each (n,), without a graph; zeros where rho < MIN_DENSITY.
        """
        assert self.energy_density is not None, f"{self.name} has no density functional"
        inside = rho > MIN_DENSITY
        with torch.enable_grad():
            safe_rho = torch.where(inside, rho, 1.0).detach().requires_grad_()
            safe_sigma = torch.where(inside, sigma, 0.0).detach().requires_grad_()
            e = self.energy_density(safe_rho, safe_sigma)
            slopes = torch.autograd.grad(e.sum(), (safe_rho, safe_sigma), allow_unused=True)
        vrho, vsigma = (torch.zeros_like(rho) if v is None else v for v in slopes)
        e, vrho, vsigma = (torch.where(inside, v, 0.0) for v in (e.detach(), vrho, vsigma))
        return e, vrho, vsigma


METHODS = {
    "hf": Functional("hf", 1.0, None),
    "svwn": Functional("svwn", 0.0, lambda r, s: slater(r, s) + vwn5(r, s)),
    "b3lyp": Functional("b3lyp", 0.2, lambda r, s: _b3lyp(r, s, vwn_rpa), gradient=True),
    "b3lyp5": Functional("b3lyp5", 0.2, lambda r, s: _b3lyp(r, s, vwn5), gradient=True),
}


def get_functional(name: str) -> Functional:
    """The method of that name, in any case.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name.lower() not in METHODS:
        raise ValueError(f"xc {name!r} is not known; choose {', '.join(METHODS)}")
    return METHODS[name.lower()]
