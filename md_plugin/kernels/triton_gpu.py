"""The three sums on the GPU with Triton: no atomics, so two runs agree to the last bit.

    envsum    one program per receiver, block of nu and block of features: a small matrix product
              sense^T (nu, pairs) x features (pairs, features), over tiles of the row's pairs
    sensesum  one program per receiver and block of nu: features (pairs, features) x env^T; the
              receiver's env tile is read once per tile of pairs, not once per pair
    featsum   one program per sender and block of features, over the sender's block of the
              transpose (col_ptr, perm)

float32 accumulates in float32 (never tf32), float64 in float64. Pair indices and offsets are
64-bit inside the kernels: n_pair n_nu and n_recv n_nu n_feat may exceed 2^31. Sizes are runtime
values and only block sizes are compiled in, so a new neighbour list never compiles anything.

The sensitivities are in `triton_radial`; where the kernels run, in `triton_parts`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from md_plugin.kernels.triton_parts import DEVICES, OPTIONS, on_device, power_of_two
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
    "sensesum",
    "sensitivity",
    "sensitivity_curvature",
    "sensitivity_slope",
    "tiles",
]


@triton.jit
def _envsum(
    sense, features, row_ptr, sender, env, n_nu, n_feat,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    start = tl.load(row_ptr + i).to(tl.int64)
    end = tl.load(row_ptr + i + 1).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    nu = tl.program_id(2) * BLOCK_NU + tl.arange(0, BLOCK_NU)
    acc = tl.zeros((BLOCK_NU, BLOCK_F), dtype=env.dtype.element_ty)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P).to(tl.int64)
        j = tl.load(sender + p, mask=p < end, other=0).to(tl.int64)
        s = tl.load(
            sense + p[None, :] * n_nu + nu[:, None],
            mask=(p < end)[None, :] & (nu < n_nu)[:, None],
            other=0.0,
        )
        z = tl.load(
            features + j[:, None] * n_feat + f[None, :],
            mask=(p < end)[:, None] & (f < n_feat)[None, :],
            other=0.0,
        )
        acc = tl.dot(s, z, acc, input_precision="ieee", out_dtype=acc.dtype)
    tl.store(
        env + (i * n_nu + nu[:, None]) * n_feat + f[None, :],
        acc,
        mask=(nu < n_nu)[:, None] & (f < n_feat)[None, :],
    )


@triton.jit
def _sensesum(
    env, features, row_ptr, sender, sense, n_nu, n_feat,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    start = tl.load(row_ptr + i).to(tl.int64)
    end = tl.load(row_ptr + i + 1).to(tl.int64)
    nu = tl.program_id(1) * BLOCK_NU + tl.arange(0, BLOCK_NU)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P).to(tl.int64)
        j = tl.load(sender + p, mask=p < end, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_P, BLOCK_NU), dtype=sense.dtype.element_ty)
        for f0 in range(0, n_feat, BLOCK_F):
            f = f0 + tl.arange(0, BLOCK_F)
            z = tl.load(
                features + j[:, None] * n_feat + f[None, :],
                mask=(p < end)[:, None] & (f < n_feat)[None, :],
                other=0.0,
            )
            e = tl.load(
                env + (i * n_nu + nu[None, :]) * n_feat + f[:, None],
                mask=(nu < n_nu)[None, :] & (f < n_feat)[:, None],
                other=0.0,
            )
            acc = tl.dot(z, e, acc, input_precision="ieee", out_dtype=acc.dtype)
        tl.store(
            sense + p[:, None] * n_nu + nu[None, :],
            acc,
            mask=(p < end)[:, None] & (nu < n_nu)[None, :],
        )


@triton.jit
def _featsum(
    env, sense, col_ptr, perm, receiver, features, n_nu, n_feat,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64)
    start = tl.load(col_ptr + j).to(tl.int64)
    end = tl.load(col_ptr + j + 1).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    # Pair and nu share one axis of the tile: (pair 0, nu 0 .. BLOCK_NU - 1), (pair 1, ...).
    row = tl.arange(0, BLOCK_P * BLOCK_NU)
    acc = tl.zeros((BLOCK_P * BLOCK_NU, BLOCK_F), dtype=features.dtype.element_ty)
    for k0 in range(start, end, BLOCK_P):
        k = k0 + (row // BLOCK_NU).to(tl.int64)
        p = tl.load(perm + k, mask=k < end, other=0).to(tl.int64)
        i = tl.load(receiver + p, mask=k < end, other=0).to(tl.int64)
        for nu0 in range(0, n_nu, BLOCK_NU):
            nu = nu0 + row % BLOCK_NU
            live = (k < end) & (nu < n_nu)
            s = tl.load(sense + p * n_nu + nu, mask=live, other=0.0)
            e = tl.load(
                env + ((i * n_nu + nu) * n_feat)[:, None] + f[None, :],
                mask=live[:, None] & (f < n_feat)[None, :],
                other=0.0,
            )
            acc += s[:, None] * e
    tl.store(features + j * n_feat + f, tl.sum(acc, axis=0), mask=f < n_feat)


def tiles(name: str, n_nu: int, n_feat: int) -> dict[str, int]:
    """Block sizes of the kernel of one sum.

    tl.dot takes no side below 16, and unrolls the summed one in registers (pairs in envsum,
    features in sensesum): 16 terms at a time stay under 150 registers per thread in both dtypes.
    """
    block_nu, block_f = power_of_two(n_nu, 16, 32), power_of_two(n_feat, 16, 64)
    block_p = {"envsum": 16, "sensesum": 32, "featsum": 32 // block_nu}[name]
    if name == "sensesum":
        block_f = 16
    return {"BLOCK_P": block_p, "BLOCK_NU": block_nu, "BLOCK_F": block_f}


def envsum(sense: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_pair, n_nu), (n_send, n_feat) -> env (n_recv, n_nu, n_feat)."""
    n_nu, n_feat = sense.shape[1], features.shape[1]
    with on_device(sense):
        if pairs.n_pair * n_nu * n_feat == 0:
            return sense.new_zeros(pairs.n_recv, n_nu, n_feat)
        env = sense.new_empty(pairs.n_recv, n_nu, n_feat)
        tile = tiles("envsum", n_nu, n_feat)
        grid = (
            pairs.n_recv,
            triton.cdiv(n_feat, tile["BLOCK_F"]),
            triton.cdiv(n_nu, tile["BLOCK_NU"]),
        )
        _envsum[grid](
            sense, features, pairs.row_ptr, pairs.sender, env, n_nu, n_feat, **tile, **OPTIONS
        )
    return env


def sensesum(env: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_send, n_feat) -> sense (n_pair, n_nu)."""
    n_nu, n_feat = env.shape[1:]
    with on_device(env):
        if pairs.n_pair * n_nu * n_feat == 0:
            return env.new_zeros(pairs.n_pair, n_nu)
        sense = env.new_empty(pairs.n_pair, n_nu)
        tile = tiles("sensesum", n_nu, n_feat)
        _sensesum[(pairs.n_recv, triton.cdiv(n_nu, tile["BLOCK_NU"]))](
            env, features, pairs.row_ptr, pairs.sender, sense, n_nu, n_feat, **tile, **OPTIONS
        )
    return sense


def featsum(env: Tensor, sense: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_pair, n_nu) -> features (n_send, n_feat)."""
    n_nu, n_feat = env.shape[1:]
    with on_device(env):
        if pairs.n_pair * n_nu * n_feat == 0:
            return env.new_zeros(pairs.n_send, n_feat)
        features = env.new_empty(pairs.n_send, n_feat)
        tile = tiles("featsum", n_nu, n_feat)
        index = (pairs.col_ptr, pairs.perm, pairs.receiver)
        _featsum[(pairs.n_send, triton.cdiv(n_feat, tile["BLOCK_F"]))](
            env, sense, *index, features, n_nu, n_feat, **tile, **OPTIONS
        )
    return features
