"""What the two-electron backends share: bounds, signs, the end of the gradient.

As a Coulomb integral is a positive form, |(a|b)| <= sqrt((a|a)) sqrt((b|b)). A primitive pair's
bound is the sum of that root over its Hermite Gaussians.

A kernel of the gradient gives Y, the derivative of the energy in every expansion coefficient E_h of
a primitive pair. As the derivative of Lambda_h in its centre is Lambda_{h+1}, that of the energy is
E_h Y_{h+1}; autograd takes both through the tables of pairs, which are small, to the positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.hermite import TRIPLES, n_hermite, sums
from md_plugin.nanodft.shell_pairs import (
    HermitePairs,
    PairClass,
    hermite_pairs,
    products,
    shell_pairs,
)

Potentials = Callable[[tuple[HermitePairs, ...], Tensor], Iterable[tuple[Tensor, Tensor]]]


def bounds(table: HermitePairs) -> Tensor:
    """(n_prim,) sum_h |E_h| sqrt((h|h)), with the largest |E_h| of products and geometries.

    (0|0) = 2 pi^{5/2} / (p^2 sqrt(2 p)); (h|h) / (0|0) is p / 3 for one derivative, and for two at
    most 3 p^2 / 5 (R_400 at zero).
    """
    p = table.exponent
    own = torch.sqrt(2 * math.pi**2.5 / (p * p * torch.sqrt(2 * p)))
    roots = (torch.ones_like(p), torch.sqrt(p / 3), math.sqrt(0.6) * p)
    largest = table.expansion.detach().abs().amax(-1)
    largest = largest.flatten(0, -3).amax(0) if largest.dim() > 2 else largest
    orders = [sum(t) for t in TRIPLES[: largest.shape[1]]]
    return own * (largest * torch.stack([roots[n] for n in orders], dim=1)).sum(1)


def kept(bound: tuple[Tensor, ...], cut: float) -> tuple[Tensor, ...]:
    """Per class the primitive pairs whose bound times the largest of all reaches the cut."""
    lowest = cut / max(float(b.max()) for b in bound)
    return tuple((b >= lowest).nonzero().squeeze(1) for b in bound)


def parity(order: int, like: Tensor) -> Tensor:
    """(n_hermite(order),) (-1)^(t + u + v), the sign of a ket's Hermite Gaussians in R_{h+h'}."""
    return like.new_tensor([(-1.0) ** sum(t) for t in TRIPLES[: n_hermite(order)]])


@lru_cache(maxsize=3)
def terms(order: int) -> tuple[tuple[int, ...], ...]:
    """For each product of a class, the Hermite indices whose coefficient may differ from zero."""
    return tuple(
        tuple(
            h
            for h, triple in enumerate(TRIPLES[: n_hermite(order)])
            if all(t <= i + j for t, i, j in zip(triple, m, n, strict=True))
        )
        for m, n in products(order)
    )


@lru_cache(maxsize=64)
def wanted_products(kind: PairClass) -> Tensor:
    """(n_pair, n_prod) number of each product; -1 for what a shell with itself has twice."""
    m, n = kind.ao.unbind(-1)
    twice = (kind.weight == 1.0)[:, None] & (m < n)
    return torch.where(twice, -1, kind.product)


def padded_density(dm: Tensor) -> Tensor:
    """The density matrix with a zero row and column for functions numbered -1."""
    return torch.nn.functional.pad(dm, (0, 1, 0, 1))


def coulomb_only(table: HermitePairs, part: Tensor, potential: Tensor, dm: Tensor) -> Tensor:
    """Y of all products from the potential of all kets, (..., n, n_hermite, 1): without exchange
    Gamma is a product, and only the bra's factor is left. dm is the padded density matrix.
    """
    m, n = table.kind.ao.unbind(-1)
    gamma = table.kind.weight[:, None] * dm[..., m, n]
    return potential * gamma[..., table.kind.pair[part], None, :]


def slopes(table: HermitePairs, part: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the energy in the expansion and the centres of one class, from Y.

    Args:
        table: the class.
        part: (n,) the primitive pairs that Y is known for; it is zero for the rest.
        potential: (..., n, n_hermite(order + 1), n_prod) Y.

    Returns:
        (..., n_prim, n_hermite(order), n_prod) and (..., n_prim, 3).
    """
    slope, force = torch.zeros_like(table.expansion), torch.zeros_like(table.centre)
    slope[..., part, :, :] = potential[..., : slope.shape[-2], :]
    expansion = table.expansion[..., part, :, :]
    raised = sums(table.kind.order, 1).to(part.device)
    for axis in range(3):
        along = expansion * potential[..., raised[:, 1 + axis], :]
        force[..., part, axis] = along.sum((-1, -2))
    return slope, force


def gradient_of(
    basis: Basis, positions: Tensor, dm: Tensor, hyb: float, potentials: Potentials
) -> Tensor:
    """(..., n_atom, 3) gradient at constant density matrix, Ha/bohr, of a kernel that gives Y.

    potentials(tables, padded density matrix) gives for each class the primitive pairs that matter
    and their Y; without exchange Y has one column, which still lacks the bra's factor.
    """
    padded = padded_density(dm)
    with torch.enable_grad():
        x = positions.detach().requires_grad_()
        tables = hermite_pairs(shell_pairs(basis, x.device), x)
    given = []
    with torch.no_grad():
        for table, (part, potential) in zip(tables, potentials(tables, padded), strict=True):
            if not hyb:
                potential = coulomb_only(table, part, potential, padded)
            given.append(slopes(table, part, potential))
    return from_slopes(tables, x, given)


def cut_of_energy(cut: float, dm: Tensor) -> float:
    """The cut for integrals where `cut` is that of energies: over the largest D^2."""
    return cut / max(float(dm.abs().max()) ** 2, 1e-300)


def from_slopes(
    tables: tuple[HermitePairs, ...], positions: Tensor, given: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """(..., n_atom, 3) gradient in the positions from the slopes of each class, by autograd."""
    outputs = [output for t in tables for output in (t.expansion, t.centre)]
    (gradient,) = torch.autograd.grad(outputs, positions, [s for pair in given for s in pair])
    return gradient
