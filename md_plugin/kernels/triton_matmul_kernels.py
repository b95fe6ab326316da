"""The two kernels of products of halves, in Triton; `triton_matmul` launches them.

    out[m, n] = sum_k a[m, k] b[k, n],    a = a_hi + a_lo,    b = b_hi + b_lo

Small terms come first. A sum of BLOCK_K terms is made in the matrix units, which cut off what they
add, and added to others beside them, where additions round.

    product    a program has a tile of out and goes over the terms, or over its share of them
    wide       few terms: a program has some rows of a, all of them, and goes over tiles of out
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from md_plugin.kernels.triton_parts import dot, loaded, split


@triton.jit
def _stored(out, place, size, total, there, OUT_HALF: tl.constexpr):
    """Writes a tile as float32, OUT_HALF 0, or as halves."""
    if OUT_HALF == 0:
        tl.store(out + place, total, mask=there)
    else:
        halves = split(total, out, OUT_HALF)
        for half in tl.static_range(OUT_HALF):
            tl.store(out + (half * size + place), halves[half], mask=there)


@triton.jit
def _sum_of_parts(total, parts, arrived, tile, place, there, size):
    """Whether this program is the last to arrive at a tile, and the sum of all if it is."""
    n_part = tl.num_programs(1)
    tl.store(parts + tl.program_id(1) * size + place, total, mask=there)
    tl.debug_barrier()  # before this program counts as arrived, all its threads have stored
    last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == n_part - 1
    if last:
        total = tl.zeros_like(total)
        for part in range(n_part):  # from the second-level cache: the first is not shared
            at = parts + part * size + place
            total += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        tl.store(arrived + tile, 0)
    return last, total


@triton.jit(do_not_specialize=["n_row", "n_step"])
def product_kernel(
    a, b, out, first, second, parts, arrived, n_row, n_sum, n_col, n_step,
    N_HALF: tl.constexpr, OUT_HALF: tl.constexpr, ALIGN_SUM: tl.constexpr, ALIGN_COL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes a tile, or with `parts` what n_step steps add to it, times two powers unless None.

    ALIGN divides a size, so that rows load in 16 bytes.
    """
    n_sum, n_col = n_sum // ALIGN_SUM * ALIGN_SUM, n_col // ALIGN_COL * ALIGN_COL
    n_tile, tile, many = tl.cdiv(n_col, BLOCK_N), tl.program_id(0), n_row.to(tl.int64)
    row0, col0 = (tile // n_tile).to(tl.int64) * BLOCK_M, tile % n_tile * BLOCK_N
    row, col, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_row, in_col = row < many - row0, col < n_col - col0
    at_a, at_b = row[:, None] * n_sum + k[None, :], k[:, None] * n_col + col[None, :]
    none = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = none
    first_k = tl.program_id(1) * n_step * BLOCK_K
    last_k = tl.minimum(first_k + n_step * BLOCK_K, n_sum)
    for k0 in range(first_k, last_k, BLOCK_K):
        in_k = k < last_k - k0
        in_a, in_b = in_row[:, None] & in_k[None, :], in_k[:, None] & in_col[None, :]
        of_a = loaded(a + (row0 * n_sum + k0), many * n_sum, at_a, in_a, N_HALF)
        of_b = loaded(b + (k0 * n_col + col0), n_sum * n_col, at_b, in_b, N_HALF)
        if N_HALF == 1:  # off by 2^-11 already: where it is added matters little
            total = dot(of_a, of_b, total)
        else:
            total += dot(of_a, of_b, none)
    place = (row0 * n_col + col0) + (row[:, None] * n_col + col[None, :])
    there, last = in_row[:, None] & in_col[None, :], True
    if parts is not None:
        last, total = _sum_of_parts(total, parts, arrived, tile, place, there, many * n_col)
    if last:
        if first is not None:
            total *= tl.load(first) * tl.load(second)
        _stored(out, place, many * n_col, total, there, OUT_HALF)


@triton.jit(do_not_specialize=["n_row", "n_step"])
def wide_kernel(
    a, b, out, first, second, n_row, n_sum, n_col, n_step,
    N_HALF: tl.constexpr, OUT_HALF: tl.constexpr, ALIGN_SUM: tl.constexpr, ALIGN_COL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes n_step tiles, of n_sum <= BLOCK_K terms; else as `product_kernel`."""
    n_sum, n_col = n_sum // ALIGN_SUM * ALIGN_SUM, n_col // ALIGN_COL * ALIGN_COL
    many, row0 = n_row.to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK_M
    row, col, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_row, in_k = row < many - row0, k < n_sum
    in_a, at_a = in_row[:, None] & in_k[None, :], row[:, None] * n_sum + k[None, :]
    at_b, at_out = k[:, None] * n_col + col[None, :], row[:, None] * n_col + col[None, :]
    of_a = loaded(a + row0 * n_sum, many * n_sum, at_a, in_a, N_HALF)
    col0 = tl.program_id(1) * n_step * BLOCK_N
    for n0 in range(col0, tl.minimum(col0 + n_step * BLOCK_N, n_col), BLOCK_N):
        in_col = col < n_col - n0
        in_b, there = in_k[:, None] & in_col[None, :], in_row[:, None] & in_col[None, :]
        of_b = loaded(b + n0, n_sum * n_col, at_b, in_b, N_HALF)
        total = dot(of_a, of_b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if first is not None:
            total *= tl.load(first) * tl.load(second)
        _stored(out, (row0 * n_col + n0) + at_out, many * n_col, total, there, OUT_HALF)
