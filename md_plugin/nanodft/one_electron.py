"""One-electron integrals of s and p Gaussians: overlap, kinetic, nuclear attraction, dipole.

With the Hermite expansion E of a product of functions (`shell_pairs`), per pair of primitives

    <m|n>     = (pi / p)^{3/2} E_000
    <m|r|n>   = (pi / p)^{3/2} (P E_000 + (E_100, E_010, E_001))
    <m|V|n>   = -sum_C Z_C (2 pi / p) sum_tuv E_tuv R_tuv(p, P - C)
    <m|T|n>   = 1/2 sum_d <d_d m|d_d n>
    d_x x^i exp(-a x^2) = (i x^{i-1} - 2 a x^{i+1}) exp(-a x^2)

Positions are float64, in bohr, on any device, of one geometry or of many, whose axes (...) come
first in the result; all integrals are differentiable in them, and come in PySCF's spherical order
and normalisation. Helgaker, Jørgensen and Olsen (2000), chapter 9.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.hermite import coulomb, expansion
from md_plugin.nanodft.shell_pairs import (
    HermitePairs,
    PairClass,
    hermite_pairs,
    products,
    shell_pairs,
)


def overlap(basis: Basis, positions: Tensor) -> Tensor:
    """<m|n>, (..., n_ao, n_ao), of positions (..., n_atom, 3) in bohr."""
    tables = _tables(basis, positions)
    return _matrix(basis, tables, [_norm(t)[:, None] * t.expansion[..., 0, :] for t in tables])


def dipole(basis: Basis, positions: Tensor) -> Tensor:
    """<m|r|n>, (..., 3, n_ao, n_ao) in bohr, of positions (..., n_atom, 3) in bohr."""
    tables = _tables(basis, positions)
    matrices = []
    for axis in range(3):
        values = []
        for t in tables:
            moment = t.centre[..., axis, None] * t.expansion[..., 0, :]
            if t.kind.order:
                moment = moment + t.expansion[..., 1 + axis, :]
            values.append(_norm(t)[:, None] * moment)
        matrices.append(_matrix(basis, tables, values))
    return torch.stack(matrices, dim=-3)


def nuclear(basis: Basis, positions: Tensor, charges: Tensor) -> Tensor:
    """<m|-sum_C Z_C / |r - C||n>, (..., n_ao, n_ao) in Hartree.

    Args:
        basis: the functions.
        positions: (..., n_atom, 3) centres of the functions and of the charges, bohr.
        charges: (n_atom,) Z_C.
    """
    tables = _tables(basis, positions)
    charges = charges.to(positions)
    values = []
    for t in tables:
        distance = t.centre[..., None, :] - positions[..., None, :, :]
        integrals = coulomb(t.kind.order, t.exponent[:, None], distance)
        potential = -2 * math.pi / t.exponent * (integrals @ charges)
        values.append(torch.einsum("h...k,...khm->...km", potential, t.expansion))
    return _matrix(basis, tables, values)


def kinetic(basis: Basis, positions: Tensor) -> Tensor:
    """<m|-1/2 nabla^2|n>, (..., n_ao, n_ao) in Hartree, of positions (..., n_atom, 3) in bohr."""
    pairs = shell_pairs(basis, positions.device)
    a, b = pairs.exponent
    p = a + b
    separation = positions[..., pairs.atom[0], :] - positions[..., pairs.atom[1], :]
    pa, pb = (-b / p)[:, None] * separation, (a / p)[:, None] * separation
    # x_A^i x_B^j of each axis: rows 3 i + j
    moments = torch.stack([row[0] for row in expansion(2, 2, pa, pb, (0.5 / p)[:, None])])
    # (power, factor) of the derivatives: d x^0 = -2 a x^1, d x^1 = x^0 - 2 a x^2
    terms = [[((1, -2 * e),), ((0, torch.ones_like(e)), (2, -2 * e))] for e in (a, b)]
    slopes = []  # <d x^i|d x^j>: rows 2 i + j
    for first, second in itertools.product(*terms):
        pairs_of = itertools.product(first, second)
        parts = [(f * g)[:, None] * moments[3 * i + j] for (i, f), (j, g) in pairs_of]
        slopes.append(torch.stack(parts).sum(0))
    slope = torch.stack(slopes)
    factor = 0.5 * (math.pi / p) ** 1.5 * torch.exp(-a * b / p * (separation**2).sum(-1))
    values = []
    for kind in pairs.classes:
        part = slice(kind.first, kind.last)
        i, j = torch.tensor(products(kind.order), device=p.device).permute(1, 2, 0)
        x, y, z = (moments[..., part, d][3 * i[d] + j[d]] for d in range(3))
        dx, dy, dz = (slope[..., part, d][2 * i[d] + j[d]] for d in range(3))
        value = dx * y * z + x * dy * z + x * y * dz  # (n_prod, ..., n_prim)
        values.append(kind.coefficients * (factor[..., part] * value).movedim(0, -1))
    return _scatter(basis, pairs.classes, values)


def _tables(basis: Basis, positions: Tensor) -> tuple[HermitePairs, ...]:
    return hermite_pairs(shell_pairs(basis, positions.device), positions)


def _norm(table: HermitePairs) -> Tensor:
    return (math.pi / table.exponent) ** 1.5


def _matrix(basis: Basis, tables: tuple[HermitePairs, ...], values: list[Tensor]) -> Tensor:
    return _scatter(basis, tuple(t.kind for t in tables), values)


def _scatter(basis: Basis, classes: tuple[PairClass, ...], values: list[Tensor]) -> Tensor:
    """Symmetric (..., n_ao, n_ao) from the (..., n_prim, n_prod) contributions of each class."""
    n, many = basis.n_ao, values[0].shape[:-2]
    # one more row and column take the functions, numbered -1, that the basis lacks
    matrix = values[0].new_zeros((*many, (n + 1) * (n + 1)))
    for kind, value in zip(classes, values, strict=True):
        pair_values = value.new_zeros((*many, len(kind.weight), value.shape[-1]))
        pair_values = pair_values.index_add(-2, kind.pair, value).flatten(-2)
        row, column = (kind.ao % (n + 1)).flatten(0, 1).unbind(-1)
        matrix = matrix.index_copy(-1, row * (n + 1) + column, pair_values)
        matrix = matrix.index_copy(-1, column * (n + 1) + row, pair_values)
    return matrix.view(*many, n + 1, n + 1)[..., :n, :n]
