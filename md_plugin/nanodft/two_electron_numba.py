"""Two-electron integrals on the CPU: tables in torch, kernels in numba.

Pairs of primitives too far apart to matter are dropped first. As a Coulomb integral is a positive
form, |(a|b)| <= sqrt((a|a)) sqrt((b|b)); a primitive pair's bound is the sum of that root over its
Hermite Gaussians. What is left out is under `ERI_CUT` per quartet of primitives in the integrals;
in the gradient, under `GRADIENT_CUT` of the energy per quartet.

The kernels give Y, the derivative of the energy in every expansion coefficient; that in a centre is
E_h Y_{h+1}, and autograd takes both through the tables, which are small, to the positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from md_plugin.kernels.numba_cpu import threads
from md_plugin.nanodft import boys, numba_eri, numba_gradient
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.hermite import TRIPLES, n_hermite, steps, sums
from md_plugin.nanodft.numba_kernels import Pairs, Recursion
from md_plugin.nanodft.shell_pairs import (
    HermitePairs,
    PairClass,
    hermite_pairs,
    products,
    shell_pairs,
)
from md_plugin.nanodft.two_electron_torch import padded_density, pull_back, unique_product

ERI_CUT = 1e-14
GRADIENT_CUT = 1e-11


def eri(basis: Basis, positions: Tensor, max_memory: int) -> Tensor:
    """(n_ao (n_ao + 1) / 2,) * 2 integrals over unique products m >= n, in Hartree."""
    tables = hermite_pairs(shell_pairs(basis, positions.device), positions.detach())
    sides = _sides(tables, ERI_CUT)
    products = [_wanted_products(t.kind) for t in tables]
    n = basis.n_ao * (basis.n_ao + 1) // 2
    packed = np.zeros((n, n))
    n_thread = threads()
    for i, bra in enumerate(sides):
        for j, ket in enumerate(sides[: i + 1]):
            recursion = _recursion(tables[i].kind.order, tables[j].kind.order)
            arguments = (
                bra.arrays,
                ket.arrays,
                i == j,
                recursion,
                products[i],
                products[j],
                packed,
            )
            if n_thread == 1:  # numba's threads are then never started
                numba_eri.eri_rows(*arguments, 0, 1)
            else:
                numba_eri.eri_threads(*arguments, n_thread)
    return torch.from_numpy(packed)


def two_electron_gradient(
    basis: Basis, positions: Tensor, dm: Tensor, hyb: float, max_memory: int
) -> Tensor:
    """(n_atom, 3) gradient at constant density matrix, Ha/bohr; see `integrals`."""
    padded = padded_density(dm)
    with torch.enable_grad():
        x = positions.detach().requires_grad_()
        tables = hermite_pairs(shell_pairs(basis, x.device), x)
    with torch.no_grad():
        sides = _sides(tables, GRADIENT_CUT / max(float(dm.abs().max()) ** 2, 1e-300))
        slopes = []
        for i, (table, bra) in enumerate(zip(tables, sides, strict=True)):
            potential = _potential(tables, sides, i, padded.numpy(), hyb)
            if not hyb:
                m, n = table.kind.ao.unbind(-1)
                gamma = (table.kind.weight[:, None] * padded[m, n])[table.kind.pair[bra.kept]]
                potential = potential * gamma[:, None]
            slopes.append(_slopes(table, bra.kept, potential))
    return pull_back(tables, x, slopes)


@dataclass(frozen=True, eq=False)
class _Side:
    """Pairs of one class that matter: arrays of the kernels; kept: which of the primitives."""

    arrays: Pairs
    kept: Tensor


def _potential(
    tables: tuple[HermitePairs, ...], sides: list[_Side], i: int, dm: np.ndarray, hyb: float
) -> Tensor:
    """Y (n_prim, n_hermite(order + 1), n_prod) of class i, or (..., 1) without exchange."""
    bra, order = sides[i], tables[i].kind.order
    n_row = bra.arrays.ao.shape[1] if hyb else 1
    out = np.zeros((len(bra.kept), n_hermite(order + 1), n_row))
    n_thread = threads()
    for table, ket in zip(tables, sides, strict=True):
        recursion = _recursion(order + 1, table.kind.order)
        arguments = (bra.arrays, ket.arrays, dm, hyb, GRADIENT_CUT, recursion, out)
        if n_thread == 1:  # numba's threads are then never started
            numba_gradient.gradient_rows(*arguments, 0, 1)
        else:
            numba_gradient.gradient_threads(*arguments, n_thread)
    return torch.from_numpy(out)


def _slopes(table: HermitePairs, kept: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the energy in all expansion coefficients and centres, from Y."""
    slope, force = torch.zeros_like(table.expansion), torch.zeros_like(table.centre)
    n = slope.shape[1]
    slope[kept] = potential[:, :n]
    expansion = table.expansion[kept]
    raised = sums(table.kind.order, 1)
    for axis in range(3):
        force[kept, axis] = (expansion * potential[:, raised[:, 1 + axis]]).sum((1, 2))
    return slope, force


def _sides(tables: tuple[HermitePairs, ...], cut: float) -> list[_Side]:
    """The kernels' arrays, without primitives whose bound times the largest is below the cut."""
    bounds = [_bounds(t) for t in tables]
    lowest = cut / max(float(b.max()) for b in bounds)
    return [_side(t, b, b > lowest) for t, b in zip(tables, bounds, strict=True)]


def _bounds(table: HermitePairs) -> Tensor:
    """(n_prim,) sum_h |E_h| sqrt((h|h)), the largest over the products.

    (0|0) = theta(p, p), and (h|h) / (0|0) is p / 3 for one derivative; for two it is 3 p^2 / 5 at
    most (R_400 at zero).
    """
    p = table.exponent
    own = torch.sqrt(2 * math.pi**2.5 / (p * p * torch.sqrt(2 * p)))
    largest = table.expansion.abs().amax(-1)
    bound = largest[:, 0]
    for h, (t, u, v) in enumerate(TRIPLES[1 : largest.shape[1]], start=1):
        bound = bound + largest[:, h] * (torch.sqrt(p / 3) if t + u + v == 1 else 0.6**0.5 * p)
    return own * bound


def _side(table: HermitePairs, bound: Tensor, keep: Tensor) -> _Side:
    kind, kept = table.kind, keep.nonzero().squeeze(1)
    counts = torch.zeros_like(kind.weight).index_add(0, kind.pair, keep.to(kind.weight))
    start = torch.nn.functional.pad(counts.cumsum(0).long(), (1, 0))
    total = torch.zeros_like(kind.weight).index_add(0, kind.pair, bound)
    order = kind.order
    parity = bound.new_tensor([(-1.0) ** sum(t) for t in TRIPLES[: n_hermite(order)]])
    expansion = (table.expansion.detach()[kept] * parity[:, None]).permute(2, 1, 0).contiguous()
    centre = table.centre.detach()[kept].T.contiguous()
    arrays = Pairs(
        start=start.numpy(),
        ao=kind.ao.numpy(),
        weight=kind.weight.numpy(),
        exponent=table.exponent[kept].numpy(),
        centre=centre.numpy(),
        expansion=expansion.numpy(),
        bound=bound.detach()[kept].numpy(),
        total=total.detach().numpy(),
        terms=_terms(order),
    )
    return _Side(arrays, kept)


def _wanted_products(kind: PairClass) -> np.ndarray:
    """(n_pair, n_prod) number of each product; -1 for what a shell with itself has twice."""
    m, n = kind.ao.unbind(-1)
    twice = (kind.weight == 1.0)[:, None] & (m < n)
    return torch.where(twice, -1, unique_product(kind.ao)).numpy()


@lru_cache(maxsize=3)
def _terms(order: int) -> np.ndarray:
    """(n_prod, 5) how many Hermite coefficients a product has, and which, padded with the last."""
    terms = []
    for m, n in products(order):
        there = [
            h
            for h, triple in enumerate(TRIPLES[: n_hermite(order)])
            if all(t <= i + j for t, i, j in zip(triple, m, n, strict=True))
        ]
        terms.append([len(there), *there, *[there[-1]] * (4 - len(there))])
    return np.array(terms)


@lru_cache(maxsize=16)
def _recursion(bra: int, ket: int) -> Recursion:
    """Constants for Hermite orders of the two sides."""
    plan = np.array(steps(bra + ket), dtype=np.int64).reshape(-1, 5)
    return Recursion(bra + ket, plan, sums(bra, ket).numpy(), boys.table().numpy())
