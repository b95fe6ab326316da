"""The three sums on the GPU with Triton.

    envsum    one program per receiver, block of features and block of nu: features^T (features,
              pairs) x sense (pairs, nu), over tiles of the row's pairs
    sensesum  one program per receiver and block of nu: features (pairs, features) x env^T
    featsum   one program per receiver and block of features: sense (pairs, nu) x env, which is
              added to the senders by atomics; its last bits change from run to run
    featsum   where torch.use_deterministic_algorithms(True): the same product is written, n_feat
              numbers per pair, and added up by one program per sender and block of features, over
              the sender's block of the transpose (col_ptr, perm), without atomics

What a receiver has of env is read once per tile of pairs, not once per pair. Float64 is multiplied
as such. A float32 product is three of tf32, of operands split into a high and a low part:

    a b ~ a_hi b_hi + a_hi b_lo + a_lo b_hi,    off by 3 2^-22 |a b| at most, 6 roundings of float32

and is added up in float32. Pair indices and offsets are 64-bit inside the kernels: n_pair n_nu and
n_recv n_nu n_feat may exceed 2^31. Sizes are runtime values and only block sizes are compiled in,
so a new neighbour list never compiles anything.

The sensitivities are in `triton_radial`, their products with tensor components in
`triton_products`; where the kernels run, in `triton_parts`. What was counted: docs/gpu_kernels.md.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from md_plugin.kernels.triton_parts import (
    DEVICES,
    OPTIONS,
    PRECISION,
    fixed_order,
    has_warp_groups,
    on_device,
    power_of_two,
)
from md_plugin.kernels.triton_products import fold, stack, stack_along
from md_plugin.kernels.triton_radial import (
    sensitivity,
    sensitivity_curvature,
    sensitivity_slope,
)
from md_plugin.pairs import Pairs

__all__ = [
    "DEVICES",
    "envsum",
    "featsum",
    "fold",
    "sensesum",
    "sensitivity",
    "sensitivity_curvature",
    "sensitivity_slope",
    "stack",
    "stack_along",
    "tiles",
]


@triton.jit
def _rows(array, row, n_row, column, n_column):
    """A tile of a matrix, zero where it has no such row or column."""
    live = (row < n_row)[:, None] & (column < n_column)[None, :]
    return tl.load(array + row[:, None] * n_column + column[None, :], mask=live, other=0.0)


@triton.jit
def _sent(features, sender, p, end, f, n_feat):
    """Features of the senders of a tile of pairs, zero beyond the end; any rows by an index."""
    j = tl.load(sender + p, mask=p < end, other=0).to(tl.int64)
    live = (p < end)[:, None] & (f < n_feat)[None, :]
    return tl.load(features + j[:, None] * n_feat + f[None, :], mask=live, other=0.0)


@triton.jit
def _envsum(
    sense, features, row_ptr, sender, env, n_nu, n_feat,
    PRECISION: tl.constexpr, ALIGN_NU: tl.constexpr, ALIGN_F: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    n_nu, n_feat = n_nu // ALIGN_NU * ALIGN_NU, n_feat // ALIGN_F * ALIGN_F
    i = tl.program_id(0).to(tl.int64)
    start, end = tl.load(row_ptr + i).to(tl.int64), tl.load(row_ptr + i + 1).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    nu = tl.program_id(2) * BLOCK_NU + tl.arange(0, BLOCK_NU)
    total = tl.zeros((BLOCK_F, BLOCK_NU), dtype=env.dtype.element_ty)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        s = _rows(sense, p, end, nu, n_nu)
        z = _sent(features, sender, p, end, f, n_feat)
        total = tl.dot(tl.trans(z), s, total, input_precision=PRECISION, out_dtype=total.dtype)
    tl.store(
        env + (i * n_nu + nu[None, :]) * n_feat + f[:, None],
        total,
        mask=(nu < n_nu)[None, :] & (f < n_feat)[:, None],
    )


@triton.jit
def _sensesum(
    env, features, row_ptr, sender, sense, n_nu, n_feat,
    PRECISION: tl.constexpr, ALIGN_NU: tl.constexpr, ALIGN_F: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    n_nu, n_feat = n_nu // ALIGN_NU * ALIGN_NU, n_feat // ALIGN_F * ALIGN_F
    i = tl.program_id(0).to(tl.int64)
    start, end = tl.load(row_ptr + i).to(tl.int64), tl.load(row_ptr + i + 1).to(tl.int64)
    nu = tl.program_id(1) * BLOCK_NU + tl.arange(0, BLOCK_NU)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        total = tl.zeros((BLOCK_P, BLOCK_NU), dtype=sense.dtype.element_ty)
        for f0 in range(0, n_feat, BLOCK_F):
            f = f0 + tl.arange(0, BLOCK_F)
            z = _sent(features, sender, p, end, f, n_feat)
            e = _rows(env + i * n_nu * n_feat, nu, n_nu, f, n_feat)
            total = tl.dot(z, tl.trans(e), total, input_precision=PRECISION, out_dtype=total.dtype)
        tl.store(
            sense + p[:, None] * n_nu + nu[None, :],
            total,
            mask=(p < end)[:, None] & (nu < n_nu)[None, :],
        )


@triton.jit
def _featsum(
    env, sense, row_ptr, sender, features, n_nu, n_feat,
    BY_PAIR: tl.constexpr, PRECISION: tl.constexpr, ALIGN_NU: tl.constexpr, ALIGN_F: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Adds to features of senders, or writes those of pairs."""
    n_nu, n_feat = n_nu // ALIGN_NU * ALIGN_NU, n_feat // ALIGN_F * ALIGN_F
    i = tl.program_id(0).to(tl.int64)
    start, end = tl.load(row_ptr + i).to(tl.int64), tl.load(row_ptr + i + 1).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        total = tl.zeros((BLOCK_P, BLOCK_F), dtype=features.dtype.element_ty)
        for nu0 in range(0, n_nu, BLOCK_NU):
            nu = nu0 + tl.arange(0, BLOCK_NU)
            s = _rows(sense, p, end, nu, n_nu)
            e = _rows(env + i * n_nu * n_feat, nu, n_nu, f, n_feat)
            total = tl.dot(s, e, total, input_precision=PRECISION, out_dtype=total.dtype)
        live = (p < end)[:, None] & (f < n_feat)[None, :]
        if BY_PAIR:
            tl.store(features + p[:, None] * n_feat + f[None, :], total, mask=live)
        else:
            j = tl.load(sender + p, mask=p < end, other=0).to(tl.int64)
            place = features + j[:, None] * n_feat + f[None, :]
            tl.atomic_add(place, total, mask=live, sem="relaxed")


@triton.jit
def _by_sender(
    messages, col_ptr, perm, features, n_feat,
    ALIGN_F: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    n_feat = n_feat // ALIGN_F * ALIGN_F
    j = tl.program_id(0).to(tl.int64)
    start, end = tl.load(col_ptr + j).to(tl.int64), tl.load(col_ptr + j + 1).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_P, BLOCK_F), dtype=features.dtype.element_ty)
    for k0 in range(start, end, BLOCK_P):
        total += _sent(messages, perm, k0 + tl.arange(0, BLOCK_P), end, f, n_feat)
    tl.store(features + j * n_feat + f, tl.sum(total, axis=0), mask=f < n_feat)


def tiles(
    name: str, n_nu: int, n_feat: int, dtype: torch.dtype, groups: bool = True
) -> dict[str, int]:
    """Block sizes of the kernel of one sum, and powers of two that divide n_nu and n_feat.

    tl.dot takes no side below 16, and a group of four warps multiplies 64 rows at once: features in
    envsum, pairs in the others. Chosen by counting instructions per pair in what compiles without
    spilling. Knowing that rows start at multiples of 16 bytes, a thread moves 16 bytes at a time.

    Args:
        name: "envsum", "sensesum", "featsum" or "by_sender".
        n_nu: sensitivities, times tensor components.
        n_feat: features.
        dtype: float32 or float64.
        groups: whether the device has instructions of warp groups (sm_90).
    """
    if name == "by_sender":
        block_f = power_of_two(n_feat, 16, 64)
        return {"ALIGN_F": math.gcd(n_feat, 16), "BLOCK_P": 32, "BLOCK_F": block_f}
    single = dtype == torch.float32
    wide = 64 if groups and single else 32
    block_p, most_nu, most_f = {
        "envsum": (32 if single else 16, wide, 64),
        "sensesum": (64 if single else 32, wide, 32),
        "featsum": (wide, 32, 64 if single else 32),
    }[name]
    return {
        "ALIGN_NU": math.gcd(n_nu, 16),
        "ALIGN_F": math.gcd(n_feat, 16),
        "BLOCK_P": block_p,
        "BLOCK_NU": power_of_two(n_nu, 16, most_nu),
        "BLOCK_F": power_of_two(n_feat, 16, most_f),
    }


def envsum(sense: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_pair, n_nu), (n_send, n_feat) -> env (n_recv, n_nu, n_feat)."""
    n_nu, n_feat = sense.shape[1], features.shape[1]
    with on_device(sense):
        if pairs.n_pair * n_nu * n_feat == 0:
            return sense.new_zeros(pairs.n_recv, n_nu, n_feat)
        env = sense.new_empty(pairs.n_recv, n_nu, n_feat)
        tile = _tiles("envsum", env, n_nu, n_feat)
        grid = (
            pairs.n_recv,
            triton.cdiv(n_feat, tile["BLOCK_F"]),
            triton.cdiv(n_nu, tile["BLOCK_NU"]),
        )
        _envsum[grid](
            sense, features, pairs.row_ptr, pairs.sender, env, n_nu, n_feat,
            PRECISION=PRECISION[env.dtype], **tile, **OPTIONS,
        )  # fmt: skip
    return env


def sensesum(env: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_send, n_feat) -> sense (n_pair, n_nu)."""
    n_nu, n_feat = env.shape[1:]
    with on_device(env):
        if pairs.n_pair * n_nu * n_feat == 0:
            return env.new_zeros(pairs.n_pair, n_nu)
        sense = env.new_empty(pairs.n_pair, n_nu)
        tile = _tiles("sensesum", env, n_nu, n_feat)
        _sensesum[(pairs.n_recv, triton.cdiv(n_nu, tile["BLOCK_NU"]))](
            env, features, pairs.row_ptr, pairs.sender, sense, n_nu, n_feat,
            PRECISION=PRECISION[env.dtype], **tile, **OPTIONS,
        )  # fmt: skip
    return sense


def featsum(env: Tensor, sense: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_pair, n_nu) -> features (n_send, n_feat).

    By atomics, unless torch is asked for deterministic algorithms at the time of the call: that
    takes n_pair n_feat numbers of memory.
    """
    n_nu, n_feat = env.shape[1:]
    with on_device(env):
        features = env.new_zeros(pairs.n_send, n_feat)
        if pairs.n_pair * n_nu * n_feat == 0:
            return features
        by_pair = fixed_order()
        found = env.new_empty(pairs.n_pair, n_feat) if by_pair else features
        tile = _tiles("featsum", env, n_nu, n_feat)
        _featsum[(pairs.n_recv, triton.cdiv(n_feat, tile["BLOCK_F"]))](
            env, sense, pairs.row_ptr, pairs.sender, found, n_nu, n_feat,
            BY_PAIR=by_pair, PRECISION=PRECISION[env.dtype], **tile, **OPTIONS,
        )  # fmt: skip
        if by_pair:
            tile = _tiles("by_sender", env, n_nu, n_feat)
            _by_sender[(pairs.n_send, triton.cdiv(n_feat, tile["BLOCK_F"]))](
                found, pairs.col_ptr, pairs.perm, features, n_feat, **tile, **OPTIONS
            )
    return features


def _tiles(name: str, env: Tensor, n_nu: int, n_feat: int) -> dict[str, int]:
    return tiles(name, n_nu, n_feat, env.dtype, has_warp_groups(env.device))
