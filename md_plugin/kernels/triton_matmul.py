"""Products of halves on matrix units: as good as float32, at three times the cost of float16.

    a b = a_hi b_hi + (a_hi b_lo + a_lo b_hi)      and, with one half, a_hi b_hi

Terms of float16 are added in float32. Matrix units cut off what they add rather than round it
(Fasi, Higham, Mikaitis, Pranesh, PeerJ Comput. Sci. 7, e330 (2021)), so that sums of 2,560 terms
made there are off by 4e-6 to 1e-5. So sums of BLOCK_K terms are made there, small terms first, and
added up beside them, where additions round: 3e-7.

Programs that have the same rows of a follow each other; b, the weights of a layer, is small enough
to stay in the second-level cache. Where there are too few tiles for the GPU, the sum is split as
well: the last program to arrive at a tile adds all its parts, in their order, so that two runs
agree to the last bit. Halves: `triton_halves`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from md_plugin.kernels.triton_halves import halves_of
from md_plugin.kernels.triton_parts import has_warp_groups, on_device, power_of_two

MOST_TILES = 4096  # whose sums may be split


@triton.jit
def _added(total, a_hi, a_lo, b_hi, b_lo, in_a, in_b, N_HALF: tl.constexpr):
    """total with the product of two tiles."""
    a, b = tl.load(a_hi, mask=in_a, other=0.0), tl.load(b_hi, mask=in_b, other=0.0)
    if N_HALF == 1:
        return tl.dot(a, b, total)
    else:
        part = tl.dot(tl.load(a_lo, mask=in_a, other=0.0), b)
        part = tl.dot(a, tl.load(b_lo, mask=in_b, other=0.0), part)
        return total + tl.dot(a, b, part)


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


@triton.jit(do_not_specialize=["n_row"])
def product_kernel(
    a, b, out, first, second, parts, arrived, n_row, n_sum, n_col,
    N_HALF: tl.constexpr, OUT_HALF: tl.constexpr, ALIGN_SUM: tl.constexpr, ALIGN_COL: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes a tile of the product, or with `parts` its share of DEPTH terms, times two powers.

    OUT_HALF 0 writes float32. ALIGN divides a size, so that rows load in 16 bytes.
    """
    n_sum, n_col = n_sum // ALIGN_SUM * ALIGN_SUM, n_col // ALIGN_COL * ALIGN_COL
    n_tile, tile, many = tl.cdiv(n_col, BLOCK_N), tl.program_id(0), n_row.to(tl.int64)
    row0, col0 = (tile // n_tile).to(tl.int64) * BLOCK_M, tile % n_tile * BLOCK_N
    row, col, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_row, in_col = row < many - row0, col < n_col - col0
    of_a, of_b = a + row0 * n_sum, b + col0
    at_a, at_b = row[:, None] * n_sum + k[None, :], k[:, None] * n_col + col[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_k = tl.program_id(1) * DEPTH
    last_k = tl.minimum(first_k + DEPTH, n_sum)
    for k0 in range(first_k, last_k, BLOCK_K):
        in_k = k < last_k - k0
        total = _added(
            total, of_a + k0 + at_a, of_a + (many * n_sum + k0) + at_a,
            of_b + k0 * n_col + at_b, of_b + (n_sum + k0) * n_col + at_b,
            in_row[:, None] & in_k[None, :], in_k[:, None] & in_col[None, :], N_HALF,
        )  # fmt: skip
    place = (row0 * n_col + col0) + (row[:, None] * n_col + col[None, :])
    there, last = in_row[:, None] & in_col[None, :], True
    if parts is not None:
        last, total = _sum_of_parts(total, parts, arrived, tile, place, there, many * n_col)
    if last:
        if first is not None:
            total *= tl.load(first) * tl.load(second)
        if OUT_HALF == 0:
            tl.store(out + place, total, mask=there)
        else:
            split = halves_of(total, OUT_HALF)
            for half in tl.static_range(OUT_HALF):
                tl.store(out + (half * many * n_col + place), split[half], mask=there)


class Tile(NamedTuple):
    """How a product is shared out: a tile of rows and columns, `terms` at once."""

    rows: int
    columns: int
    terms: int
    num_warps: int
    n_split: int


def tiles(n_sum: int, n_col: int, n_half: int, hopper: bool) -> Iterator[Tile]:
    """All that come into question: 128 x 128 for a multiprocessor, smaller ones for half of it.

    What three stages take of shared memory is at most 192 kB with warp groups, 96 kB without.
    Halves have two accumulators: with more than 32 terms at once they take more registers than
    there are, where warps have no groups or 64 x 128 numbers each.
    """
    for rows, columns, num_warps in ((128, 128, 8), (64, 128, 4), (64, 64, 4)):
        most = 32 if n_half == 2 and (rows < columns or not hopper) else 64
        terms = power_of_two(n_sum, 16, most)
        for n_split in (1, 2, 4, 8, 16):
            if n_split <= triton.cdiv(n_sum, terms):
                yield Tile(rows, power_of_two(n_col, 16, columns), terms, num_warps, n_split)


def cycles(
    tile: Tile, shape: tuple[int, int, int], n_half: int, hopper: bool, n_processor: int
) -> float:
    """About how long a product takes: what the busiest multiprocessor multiplies, or fetches.

    2,048 products of float16 (1,024 on A100) and 24 bytes from the second-level cache per cycle
    and multiprocessor; 1,000 cycles until a program's first terms are there; and parts, which are
    written, and read again by one program.

    Args:
        tile: one of `tiles`.
        shape: (n_row, n_sum, n_col).
        n_half: of the operands.
        hopper: whether there are warp groups.
        n_processor: multiprocessors.
    """
    n_row, n_sum, n_col = shape
    n_program = triton.cdiv(n_row, tile.rows) * triton.cdiv(n_col, tile.columns) * tile.n_split
    multiply = tile.rows * tile.columns * (2 * n_half - 1) / (2048 if hopper else 1024)
    fetch = (tile.rows + tile.columns) * 2 * n_half / 24
    each = depth(tile, n_sum) * max(multiply, fetch) + 1000
    parts = tile.rows * tile.columns * 4 * (tile.n_split + 1) / 24 if tile.n_split > 1 else 0
    return float(triton.cdiv(n_program, n_processor) * each + parts)


def depth(tile: Tile, n_sum: int) -> int:
    """Terms of each part of a sum."""
    blocks: int = triton.cdiv(triton.cdiv(n_sum, tile.n_split), tile.terms)
    return blocks * tile.terms


@cache
def chosen(
    shape: tuple[int, int, int], n_half: int, hopper: bool = True, n_processor: int = 132
) -> Tile:
    """The tile that takes the fewest `cycles`."""
    n_row, n_sum, n_col = shape

    def cost(tile: Tile) -> float:
        n_tile = triton.cdiv(n_row, tile.rows) * triton.cdiv(n_col, tile.columns)
        if tile.n_split > 1 and n_tile > MOST_TILES:
            return math.inf
        return cycles(tile, shape, n_half, hopper, n_processor)

    return min(tiles(n_sum, n_col, n_half, hopper), key=cost)


def counters(device: torch.device) -> Tensor:
    """What programs of a split sum count with; products that run at once need their own."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    counters: Tensor,
    powers: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write a b, times two powers where given.

    Args:
        a: (n_half, n_row, n_sum) float16, contiguous.
        b: (n_half, n_sum, n_col) float16, contiguous.
        out: (n_row, n_col) float32, or (n_half, n_row, n_col) float16, contiguous; is written.
        counters: see `counters`.
        powers: two () float32, on the device; without them out is as a and b are.

    Raises:
        TypeError: an array is of another dtype.
        ValueError: shapes do not fit, or an array is not contiguous.
    """
    n_half, n_row, n_sum = a.shape
    n_col = b.shape[2]
    _check(a, b, out)
    if not out.numel():
        return
    tile = chosen((n_row, n_sum, n_col), n_half, *_gpu(a.device))
    split = tile.n_split > 1
    parts = out.new_empty(tile.n_split, n_row, n_col, dtype=torch.float32) if split else None
    n_tile = triton.cdiv(n_row, tile.rows) * triton.cdiv(n_col, tile.columns)
    with on_device(a):
        product_kernel[(n_tile, tile.n_split)](
            a, b, out, *(powers or (None, None)), parts, counters if split else None,
            n_row, n_sum, n_col, **options(tile, n_sum, n_col, n_half, out.dtype),
        )  # fmt: skip


def options(tile: Tile, n_sum: int, n_col: int, n_half: int, out: torch.dtype) -> dict[str, Any]:
    """What is compiled in, and how it is launched."""
    return {
        "N_HALF": n_half,
        "OUT_HALF": n_half if out == torch.float16 else 0,
        "ALIGN_SUM": math.gcd(n_sum, 16),
        "ALIGN_COL": math.gcd(n_col, 16),
        "DEPTH": depth(tile, n_sum),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.terms,
        "num_warps": tile.num_warps,
        "num_stages": 3,
    }


@cache
def _gpu(device: torch.device) -> tuple[bool, int]:
    """Whether it has warp groups, and how many multiprocessors; of an H100 where interpreted."""
    if device.type != "cuda":
        return True, 132
    return has_warp_groups(device), torch.cuda.get_device_properties(device).multi_processor_count


def _check(a: Tensor, b: Tensor, out: Tensor) -> None:
    (n_half, n_row, n_sum), n_col = a.shape, b.shape[2]
    shapes = {torch.float32: (n_row, n_col), torch.float16: (n_half, n_row, n_col)}
    if a.dtype != torch.float16 or b.dtype != torch.float16 or out.dtype not in shapes:
        raise TypeError(
            f"a product of {a.dtype} and {b.dtype} into {out.dtype}: only halves, float16, are "
            "multiplied, into float32 or halves"
        )
    if n_half not in (1, 2) or b.shape[:2] != (n_half, n_sum) or out.shape != shapes[out.dtype]:
        raise ValueError(
            f"halves of shapes {tuple(a.shape)} and {tuple(b.shape)} have no product of shape "
            f"{tuple(out.shape)}"
        )
    if not (a.is_contiguous() and b.is_contiguous() and out.is_contiguous()):
        raise ValueError("an array is not contiguous")
