"""Exchange-correlation energy, potential matrix and frozen-density gradient on a grid.

    E_xc = sum_g w_g e(rho_g, sigma_g)
    rho = chi.D chi,   rho_k = 2 chi_k.D chi,   sigma = rho_k rho_k       (sum over k = x, y, z)
    V   = Z + Z^T,     Z = sum_g chi (w e_rho / 2 chi + 2 w e_sigma rho_k chi_k)

The gradient holds D and moves functions, points and weights (Johnson, Gill, Pople, J. Chem. Phys.
98, 5612 (1993)). A function that moves with its atom changes rho by minus its derivative; a point
that moves with its atom sees all functions move the other way; the last part is that of the
weights, e_g dw_g/dR. Without it (and the points) the force is not the derivative of the energy.

Geometries (...) go through together, by chunks of points. Weights are kept between calls, values of
the functions as far as memory allows; those of the other chunks are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from md_plugin.nanodft.functionals import Functional
from md_plugin.nanodft.grid import Grid
from md_plugin.nanodft.orbitals import Orbitals

# Temporaries of a chunk of points: near a CPU's cache, and enough work for each launch on a GPU.
# Half or twice as much costs up to a tenth more (2 MB of L2 per core; water, benzene, six waters).
CHUNK_BYTES = {"cpu": 32_000_000, "cuda": 2_000_000_000}


class GridIntegrals:
    """E_xc of one geometry, or of many, as a function of the density matrix.

    Args:
        functional: one with an energy density.
        orbitals: functions of the basis set.
        grid: grid of the same composition.
        x: (..., n_atom, 3) positions, bohr, without a graph.
        max_bytes: bound of all memory that is taken here.
    """

    def __init__(
        self, functional: Functional, orbitals: Orbitals, grid: Grid, x: Tensor, max_bytes: int
    ):
        self.functional, self.orbitals, self.x = functional, orbitals, x
        n_ao, n_prim = orbitals.contraction.shape[1], len(orbitals.exponents)
        temporaries = 8 * (28 * n_ao + 3 * n_prim) + grid.bytes_per_point()
        temporaries *= math.prod(x.shape[:-2])
        size = max(1, min(CHUNK_BYTES[x.device.type], max_bytes // 2) // temporaries)
        self._parts = list(grid.chunks(size))
        self._weights = [part.weights(x) for part in self._parts]
        self._kept: list[Tensor] = []
        self._room = max_bytes - size * temporaries

    def potential(self, dm: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (...) and V (..., n_ao, n_ao) of symmetric density matrices, in Ha."""
        energy, half = dm.new_zeros(dm.shape[:-2]), torch.zeros_like(dm)
        for weights, tables in self._tables():
            chi = tables[0]
            rho, gradient = _density(chi @ dm, tables)
            e, vrho, vsigma = self.functional.evaluate(rho, gradient.square().sum(0))
            energy += (weights * e).sum(-1)
            z = (0.5 * weights * vrho)[..., None] * chi
            for slope, chi_k in zip(2 * weights * vsigma * gradient, tables[1:], strict=False):
                z.addcmul_(slope[..., None], chi_k)
            half += chi.mT @ z
        return energy, half + half.mT

    def gradient(self, dm: Tensor, grid_response: bool = True) -> Tensor:
        """(..., n_atom, 3) dE_xc/dR at constant dm, Ha/bohr.

        Args:
            dm: (..., n_ao, n_ao) symmetric.
            grid_response: points and weights follow the atoms, as they do in the energy.
        """
        total = torch.zeros_like(self.x)
        for part in self._parts:
            total += self._chunk_gradient(part, dm, grid_response)
        return total

    def _chunk_gradient(self, part: Grid, dm: Tensor, grid_response: bool) -> Tensor:
        functional = self.functional
        values = self.orbitals.at(part.points(self.x), self.x, 2 if functional.gradient else 1)
        tables = values.tables if functional.gradient else values.chi[None]
        half_density = tables[0] @ dm
        rho, gradient = _density(half_density, tables)
        e, vrho, vsigma = functional.evaluate(rho, gradient.square().sum(0))
        x = self.x.clone().requires_grad_(grid_response)
        with torch.set_grad_enabled(grid_response):
            weights = part.weights(x)
            energy = (weights * e).sum()
        total = torch.zeros_like(self.x)
        if grid_response:
            (total,) = torch.autograd.grad(energy, x)
        weights = weights.detach()
        of_chi = (2 * weights * vrho)[..., None] * half_density
        of_gradient = None
        if functional.gradient:
            slopes = 4 * weights * vsigma * gradient
            of_gradient = slopes[..., None] * half_density
            of_chi += torch.einsum("k...g,k...ga->...ga", slopes, tables[1:] @ dm)
        pull = values.pull(of_chi, of_gradient)
        of_functions = pull.sum(-2).movedim(0, -1)
        total = total.index_add(-2, self.orbitals.atom, of_functions, alpha=-1)
        if grid_response:
            total = total.index_add(-2, part.owner, pull.sum(-1).movedim(0, -1))
        return total

    def _tables(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(weights, chi and its derivatives where they are needed) of each chunk."""
        for k, (part, weights) in enumerate(zip(self._parts, self._weights, strict=True)):
            if k < len(self._kept):
                yield weights, self._kept[k]
                continue
            gradient = self.functional.gradient
            values = self.orbitals.at(part.points(self.x), self.x, int(gradient))
            tables = values.tables if gradient else values.chi[None]
            if k == len(self._kept) and tables.nbytes <= self._room:
                self._kept.append(tables)
                self._room -= tables.nbytes
            yield weights, tables


def _density(half_density: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """rho (..., n) and its gradient (3, ..., n), or (0, ..., n) where tables have no derivatives.

    half_density is chi D, (..., n, n_ao).
    """
    rho = (tables[0] * half_density).sum(-1)
    gradient = [2 * (chi_k * half_density).sum(-1) for chi_k in tables[1:]]
    return rho, torch.stack(gradient) if gradient else rho.new_zeros(0, *rho.shape)
