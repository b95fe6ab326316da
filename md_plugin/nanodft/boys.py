"""The Boys function of Coulomb integrals over Gaussians.

    F_m(T) = int_0^1 t^2m exp(-T t^2) dt,    F_m' = -F_{m+1}
    F_m(T) = gamma(m + 1/2, T) / (2 T^{m + 1/2})              lower incomplete gamma function
    F_m(T) = (2 T F_{m+1}(T) + exp(-T)) / (2 m + 1)           downward recursion, stable

T. Helgaker, P. Jørgensen, J. Olsen, Molecular Electronic-Structure Theory (2000), section 9.8.
Relative error under 1e-13 for 0 <= T <= 1e4 and m <= 6. Kernels read `table` instead.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# F_m(T) differs from F_m(0) by less than a rounding below this T, where the quotient is 0 / 0.
SMALLEST = 1e-15

# Table for seven-term Taylor steps: the first term left out is 0.025^7 / 7! = 1e-15 of F_m. Above
# its end exp(-T) < 5e-20, which upward recursion from F_0 = sqrt(pi / T) / 2 may leave out.
TABLE_STEP = 0.05
TABLE_END = 45.0
TABLE_ORDERS = 13  # orders 0 .. 6, and six more for the Taylor terms of the last


def boys(order: int, argument: Tensor) -> Tensor:
    """F_0 .. F_order of T; differentiable once.

    Args:
        order: highest m.
        argument: any shape, T >= 0, float64.

    Returns:
        (order + 1, ...) F_m(T).
    """
    values: Tensor = _Boys.apply(order, argument)  # type: ignore[no-untyped-call]
    return values


class _Boys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: int, argument: Tensor) -> Tensor:
        values = _values(order + 1, argument)  # one more, for the derivative
        ctx.save_for_backward(values)
        return values[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (values,) = ctx.saved_tensors
        return None, -(gradient * values[1:]).sum(0)


def _values(order: int, argument: Tensor) -> Tensor:
    t = argument.clamp(min=SMALLEST)
    values = t.new_empty((order + 1, *t.shape))
    a = order + 0.5
    top = torch.special.gammainc(torch.full_like(t, a), t)
    torch.mul(top, math.gamma(a) / 2 / t**a, out=values[order])
    decay = torch.exp(-t)
    for m in range(order - 1, -1, -1):
        torch.div(2 * t * values[m + 1] + decay, 2 * m + 1, out=values[m])
    return values


@cache
def table() -> Tensor:
    """(n, 13) F_m at T = 0, 0.05, ... 45, and exp(-T) in a 14th column."""
    t = TABLE_STEP * torch.arange(round(TABLE_END / TABLE_STEP) + 1, dtype=torch.float64)
    values = _values(TABLE_ORDERS - 1, t)
    return torch.cat([values, torch.exp(-t)[None]]).T.contiguous()
