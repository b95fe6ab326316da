"""What the Triton kernels of two-electron integrals share: places of Gaussians, Coulomb integrals.

    F_m  by a Taylor step from the table     R_{h+h'}  by recursion     (`numba_kernels`, `hermite`)

Hermite orders, index tables and the recursion are compile-time constants, and everything is
unrolled into registers. If TRITON_INTERPRET=1 is in the environment when kernels are imported,
Triton interprets them on CPU tensors instead of compiling: slow, for tests.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, misc"
from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from md_plugin.nanodft import boys
from md_plugin.nanodft.hermite import n_hermite, steps, sums
from md_plugin.nanodft.shell_pairs import HermitePairs
from md_plugin.nanodft.two_electron_parts import terms

# What is unrolled shares a thread's registers, hence few bras.
_TILE = {"BRAS": 1, "BLOCK": 64}
OPTIONS = {"num_warps": 2, "enable_fp_fusion": True}


@triton.jit
def _boys(
    t, table, ORDER: tl.constexpr, STEP: tl.constexpr, LAST: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """F_0 .. F_ORDER."""
    i = tl.minimum(t / STEP + 0.5, LAST).to(tl.int32)
    d = i.to(tl.float64) * STEP - t
    row = table + i * COLUMNS
    taylor = tl.load(row + ORDER + 6)
    decay = d / 6 + 1.0
    for n in tl.static_range(5, -1, -1):
        taylor = tl.load(row + ORDER + n) + d / (n + 1) * taylor
        if n > 0:
            decay = d / n * decay + 1.0
    far = t > LAST * STEP
    inverse = 0.5 / tl.maximum(t, 1.0)
    limit = tl.sqrt(inverse * 1.5707963267948966)
    for m in tl.static_range(ORDER):
        limit = limit * inverse * (2 * m + 1)
    value = tl.where(far, limit, taylor)
    decay = tl.where(far, 0.0, tl.load(row + COLUMNS - 1) * decay)
    values = (value,)
    for n in tl.static_range(ORDER):
        value = (2.0 * t * value + decay) / (2 * (ORDER - n) - 1)
        values = (value,) + values
    return values


@triton.jit
def _raised(level, base, distance, N: tl.constexpr, STEPS: tl.constexpr):
    """R^m_0 .. R^m_{N - 1} from R^{m+1} and R^m_0."""
    raised = (base,)
    for s in tl.static_range(N - 1):
        term = distance[STEPS[s][1]] * level[STEPS[s][2]]
        if STEPS[s][4] > 0:
            term += level[STEPS[s][3]] * STEPS[s][4]
        raised = raised + (term,)
    return raised


@triton.jit
def place_of(places, i, n):
    """Exponent and centre of primitive pairs i, from (4, n); something finite beyond n."""
    place = (tl.load(places + i, mask=i < n, other=1.0),)
    for d in tl.static_range(1, 4):
        place = place + (tl.load(places + d * n + i, mask=i < n, other=0.0),)
    return place


@triton.jit
def coulomb(
    bra, ket, table, ORDER: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, BOYS: tl.constexpr
):
    """R_0 .. R_{N[ORDER] - 1} / (p q sqrt(p + q)): theta without its constant.

    bra and ket: exponent and centre.
    """
    distance = (bra[1] - ket[1], bra[2] - ket[2], bra[3] - ket[3])
    square = distance[0] * distance[0] + distance[1] * distance[1] + distance[2] * distance[2]
    both = bra[0] + ket[0]
    alpha = bra[0] * ket[0] / both
    values = _boys(alpha * square, table, ORDER, BOYS[0], BOYS[1], BOYS[2])
    theta = 1.0 / (bra[0] * ket[0] * tl.sqrt(both))
    scaled = (values[0] * theta,)
    for m in tl.static_range(ORDER):
        theta = -2.0 * alpha * theta
        scaled = scaled + (values[m + 1] * theta,)
    hermite = (scaled[ORDER],)
    for m in tl.static_range(ORDER):
        hermite = _raised(hermite, scaled[ORDER - 1 - m], distance, N[m + 1], STEPS)
    return hermite


INTERPRETED = not isinstance(coulomb, triton.JITFunction)
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def constants(bra: int, ket: int, n_row: int, rows: int) -> dict[str, Any]:
    """What is compiled in for Hermite orders of bra and ket; see `hermite` for the tables.

    n_row: products of a bra that are kept apart; rows: of them, those in the tile of a program.
    """
    # an interpreted program costs the same whatever its tile
    tile = {"BRAS": 16, "BLOCK": 64} if INTERPRETED else _TILE
    return {
        "ORDER": bra + ket,
        "N": tuple(n_hermite(n) for n in range(bra + ket + 1)),
        "STEPS": steps(bra + ket),
        "SUMS": tuple(tuple(row) for row in sums(bra, ket).tolist()),
        "TERMS": tuple(tuple(h in t for h in range(n_hermite(ket))) for t in terms(ket)),
        "BOYS": (boys.TABLE_STEP, round(boys.TABLE_END / boys.TABLE_STEP), boys.TABLE_ORDERS + 1),
        "N_ROW": n_row,
        "ROWS": n_row if INTERPRETED else min(n_row, rows),
        **tile,
    }


def places(table: HermitePairs, part: Tensor) -> Tensor:
    """(..., 4, n) exponents and centres of primitive pairs."""
    centre = table.centre[..., part, :].detach()
    exponent = table.exponent[part].expand(centre.shape[:-1])
    return torch.cat((exponent[..., None], centre), dim=-1).transpose(-1, -2).contiguous()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
