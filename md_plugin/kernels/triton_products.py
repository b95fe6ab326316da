"""Sensitivities times tensor components on the GPU with Triton, and what derives from the product.

A program has a block of pairs and goes over their components, of which each row of sensitivities
moves 16 bytes at a time. Every number is read once and written once. Sums over components or
sensitivities stay within a pair: no atomics, so two runs agree to the last bit.

Equations and arguments: `reference`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from md_plugin.kernels.triton_parts import OPTIONS, on_device


@triton.jit
def _rows(row, nu, n_nu, real):
    """Offsets of rows of sensitivities, and which of them are there."""
    return row[:, None] * n_nu + nu[None, :], real[:, None] & (nu < n_nu)[None, :]


@triton.jit(do_not_specialize=["n_pair"])
def _stack(
    components, sense, stacked, n_pair, n_comp, n_nu,
    ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr,
):  # fmt: skip
    n_nu = n_nu // ALIGN * ALIGN
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    nu, real = tl.arange(0, BLOCK_NU), p < n_pair
    place, live = _rows(p, nu, n_nu, real)
    s = tl.load(sense + place, mask=live, other=0.0)
    for c in range(n_comp):
        t = tl.load(components + p * n_comp + c, mask=real, other=0.0)
        place, live = _rows(p * n_comp + c, nu, n_nu, real)
        tl.store(stacked + place, t[:, None] * s, mask=live)


@triton.jit(do_not_specialize=["n_pair"])
def _fold(
    stacked, components, sense, to_components, to_sense, n_pair, n_comp, n_nu,
    ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr,
):  # fmt: skip
    n_nu = n_nu // ALIGN * ALIGN
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    nu, real = tl.arange(0, BLOCK_NU), p < n_pair
    place, live = _rows(p, nu, n_nu, real)
    s = tl.load(sense + place, mask=live, other=0.0)
    total = tl.zeros_like(s)
    for c in range(n_comp):
        t = tl.load(components + p * n_comp + c, mask=real, other=0.0)
        there, _ = _rows(p * n_comp + c, nu, n_nu, real)
        g = tl.load(stacked + there, mask=live, other=0.0)
        total += g * t[:, None]
        tl.store(to_components + p * n_comp + c, tl.sum(g * s, axis=1), mask=real)
    tl.store(to_sense + place, total, mask=live)


@triton.jit(do_not_specialize=["n_pair"])
def _stack_along(
    components, sense, d_components, d_sense, stacked, n_pair, n_comp, n_nu,
    ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr,
):  # fmt: skip
    n_nu = n_nu // ALIGN * ALIGN
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    nu, real = tl.arange(0, BLOCK_NU), p < n_pair
    place, live = _rows(p, nu, n_nu, real)
    s = tl.load(sense + place, mask=live, other=0.0)
    ds = tl.load(d_sense + place, mask=live, other=0.0)
    for c in range(n_comp):
        t = tl.load(components + p * n_comp + c, mask=real, other=0.0)
        dt = tl.load(d_components + p * n_comp + c, mask=real, other=0.0)
        place, live = _rows(p * n_comp + c, nu, n_nu, real)
        tl.store(stacked + place, t[:, None] * ds + dt[:, None] * s, mask=live)


def tiles(name: str, n_nu: int, itemsize: int) -> dict[str, int]:
    """Block sizes of the kernel of one product, and a power of two that divides n_nu.

    All sensitivities of as many pairs as 16 kB hold, at most one for each thread; "fold" also keeps
    a sum of that size and takes half.
    """
    block_nu = triton.next_power_of_2(n_nu)
    room = 8192 if name == "fold" else 16384
    return {
        "ALIGN": math.gcd(n_nu, 16),
        "BLOCK_P": min(max(room // (itemsize * block_nu), 1), 128),
        "BLOCK_NU": block_nu,
    }


def stack(components: Tensor, sense: Tensor) -> Tensor:
    """(n_pair, n_comp), (n_pair, n_nu) -> (n_pair, n_comp n_nu), components outermost."""
    stacked = sense.new_empty(len(sense), components.shape[1] * sense.shape[1])
    _launch("stack", (components, sense, stacked), components, sense)
    return stacked


def fold(stacked: Tensor, components: Tensor, sense: Tensor) -> tuple[Tensor, Tensor]:
    """(n_pair, n_comp n_nu), (n_pair, n_comp), (n_pair, n_nu) -> the shapes of the last two."""
    # An empty sum is zero, and no program writes it.
    make = torch.empty_like if stacked.numel() else torch.zeros_like
    found = make(components), make(sense)
    _launch("fold", (stacked, components, sense, *found), components, sense)
    return found


def stack_along(components: Tensor, sense: Tensor, d_components: Tensor, d_sense: Tensor) -> Tensor:
    """Derivative of `stack` along (d_components, d_sense) -> (n_pair, n_comp n_nu)."""
    stacked = sense.new_empty(len(sense), components.shape[1] * sense.shape[1])
    arrays = (components, sense, d_components, d_sense, stacked)
    _launch("stack_along", arrays, components, sense)
    return stacked


_KERNELS: dict[str, Any] = {"stack": _stack, "fold": _fold, "stack_along": _stack_along}


def _launch(name: str, arrays: tuple[Tensor, ...], components: Tensor, sense: Tensor) -> None:
    (n_pair, n_comp), n_nu = components.shape, sense.shape[1]
    with on_device(sense):
        if n_pair * n_comp * n_nu:
            tile = tiles(name, n_nu, sense.itemsize)
            grid = (triton.cdiv(n_pair, tile["BLOCK_P"]),)
            _KERNELS[name][grid](*arrays, n_pair, n_comp, n_nu, **tile, **OPTIONS)
