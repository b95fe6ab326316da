"""Hermite Gaussians: expansion coefficients, and Coulomb integrals between two of them.

McMurchie and Davidson, J. Comput. Phys. 26, 218 (1978), in the notation of Helgaker, Jørgensen and
Olsen, Molecular Electronic-Structure Theory (2000), chapter 9:

    x_A^i x_B^j exp(-a x_A^2 - b x_B^2) = sum_t E_t^ij (d/dP)^t exp(-p x_P^2)
    E_t^{i+1,j} = E_{t-1}^ij / 2p + X_PA E_t^ij + (t + 1) E_{t+1}^ij          p = a + b

    R_tuv = (d/dX)^t (d/dY)^u (d/dZ)^v F_0(alpha R^2)
    R^m_000 = (-2 alpha)^m F_m(alpha R^2)
    R^m_{t+1,u,v} = t R^{m+1}_{t-1,u,v} + X R^{m+1}_tuv                       R = R^0

The triples (t, u, v) are numbered by t + u + v first, so that those of a lower order come first.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from md_plugin.nanodft.boys import boys

Triple = tuple[int, int, int]
MAX_ORDER = 6
TRIPLES: tuple[Triple, ...] = tuple(
    (t, u, order - t - u)
    for order in range(MAX_ORDER + 1)
    for t in range(order, -1, -1)
    for u in range(order - t, -1, -1)
)
NUMBER_OF = {triple: n for n, triple in enumerate(TRIPLES)}


def n_hermite(order: int) -> int:
    """Number of triples with t + u + v <= order: 1, 4, 10, 20, 35, 56."""
    return (order + 1) * (order + 2) * (order + 3) // 6


@cache
def sums(first: int, second: int) -> Tensor:
    """(n_hermite(first), n_hermite(second)) int64, the number of the sum of two triples."""
    rows, columns = TRIPLES[: n_hermite(first)], TRIPLES[: n_hermite(second)]
    return torch.tensor(
        [[NUMBER_OF[r[0] + c[0], r[1] + c[1], r[2] + c[2]] for c in columns] for r in rows]
    )


@cache
def steps(order: int) -> tuple[tuple[int, int, int, int, int], ...]:
    """The recursion of R: (number, axis, its predecessor, the one before, factor of that).

    The axis is the one with the smallest count, which makes most factors zero; then the number of
    the one before is that of the predecessor.
    """
    plan = []
    for number, (t, u, v) in enumerate(TRIPLES[1 : n_hermite(order)], start=1):
        count, axis = min((n, axis) for axis, n in enumerate((t, u, v)) if n)
        x, y, z = (int(axis == d) for d in range(3))
        before = NUMBER_OF[t - x, u - y, v - z]
        second = NUMBER_OF[t - 2 * x, u - 2 * y, v - 2 * z] if count > 1 else before
        plan.append((number, axis, before, second, count - 1))
    return tuple(plan)


def expansion(first: int, second: int, pa: Tensor, pb: Tensor, half: Tensor) -> list[list[Tensor]]:
    """E_t^ij of one dimension without the factor exp(-a b / p X_AB^2).

    Args:
        first, second: highest i and j.
        pa, pb: P - A and P - B, any shape, bohr.
        half: 1 / 2p, of a shape that broadcasts.

    Returns:
        [i * (second + 1) + j][t], t = 0 .. i + j.
    """
    one = torch.ones_like(pa)
    table: dict[tuple[int, int], list[Tensor]] = {(0, 0): [one]}
    for i, j in product(range(first + 1), range(second + 1)):
        if (i, j) == (0, 0):
            continue
        lower, shift = (table[i - 1, j], pa) if i else (table[i, j - 1], pb)
        n = len(lower)
        row = []
        for t in range(n + 1):
            terms = [half * lower[t - 1]] if t else []
            terms += [shift * lower[t]] if t < n else []
            terms += [(t + 1) * lower[t + 1]] if t + 1 < n else []
            row.append(sum(terms[1:], terms[0]))
        table[i, j] = row
    return [table[i, j] for i, j in product(range(first + 1), range(second + 1))]


def coulomb(order: int, alpha: Tensor, distance: Tensor) -> Tensor:
    """R_tuv up to an order.

    Args:
        order: highest t + u + v.
        alpha: reduced exponent, of a shape that broadcasts, 1/bohr^2.
        distance: (..., 3) R, bohr.

    Returns:
        (n_hermite(order), ...).
    """
    components = distance.unbind(-1)
    values = boys(order, alpha * (distance * distance).sum(-1))
    plan = steps(order)
    level: list[Tensor] = []
    for m in range(order, -1, -1):
        above, level = level, [(-2 * alpha) ** m * values[m]]
        for _, axis, before, second, factor in plan[: n_hermite(order - m) - 1]:
            term = components[axis] * above[before]
            level.append(term + factor * above[second] if factor else term)
    return torch.stack(level)
