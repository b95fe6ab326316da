"""Products of halves on matrix units: as good as float32, at three times the cost of float16.

    a b = a_hi b_hi + (a_hi b_lo + a_lo b_hi)      and, with one half, a_hi b_hi

Terms of float16 are added in float32. Matrix units cut off what they add rather than round it
(Fasi, Higham, Mikaitis, Pranesh, PeerJ Comput. Sci. 7, e330 (2021)), so that sums of 2,560 terms
made there are off by 4e-6 to 1e-5. So sums of at most 128 terms are made there, small terms first,
and added up beside them, where additions round: 3e-7.

Programs that have the same rows of a follow each other; b, the weights of a layer, is small enough
to stay in the second-level cache. Where there are too few tiles for the GPU, sums are split as
well: the last program to arrive at a tile adds all its parts, in their order, so that two runs
agree to the last bit. Halves: `triton_halves`; kernels: `triton_matmul_kernels`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from md_plugin.kernels import tuning
from md_plugin.kernels.triton_matmul_kernels import product_kernel, wide_kernel
from md_plugin.kernels.triton_parts import (
    has_warp_groups,
    multiprocessors,
    on_device,
    power_of_two,
)

MOST_TILES = 4096  # whose sums may be split
SHARES = (1, 2, 3, 4, 6, 8, 12, 16)
# What an H100 does per cycle and multiprocessor, about: products of float16, of which an A100
# makes half as many; bytes that come from the second-level cache, or go there. And the cycles
# until the first terms of a program are there.
PRODUCTS, BYTES, START = 2048, 24, 1000


class Tile(NamedTuple):
    """How a product is shared out: a tile of rows and columns, `terms` at once.

    Of the sum each of n_share programs makes its part; or, where all terms are had at once and the
    product is wide, of the columns.
    """

    rows: int
    columns: int
    terms: int
    num_warps: int
    num_stages: int
    n_share: int
    wide: bool = False

    def steps(self, n_sum: int, n_col: int) -> int:
        """Of each program: blocks of terms, or of columns."""
        n_step = triton.cdiv(n_col, self.columns) if self.wide else triton.cdiv(n_sum, self.terms)
        return int(triton.cdiv(n_step, self.n_share))

    def grid(self, n_row: int, n_col: int) -> tuple[int, int]:
        """Programs: tiles, and their shares."""
        n_tile = 1 if self.wide else triton.cdiv(n_col, self.columns)
        return triton.cdiv(n_row, self.rows) * n_tile, self.n_share


def tiles(n_sum: int, n_col: int, n_half: int, hopper: bool) -> Iterator[Tile]:
    """All that come into question: 128 x 128 for a multiprocessor, smaller ones for half of it.

    Shared memory holds them: 224 kB at most with warp groups, 96 kB without. Halves have two
    accumulators: 64 terms at once take more registers than there are where warps have no groups,
    or 64 x 128 numbers each, which without groups are too many in any case.
    """
    for rows, columns, num_warps in ((128, 128, 8), (64, 128, 4), (64, 64, 4)):
        if rows < columns and not hopper:
            continue
        most = 32 if n_half == 2 and (rows < columns or not hopper) else 64
        terms = power_of_two(n_sum, 16, most)
        columns = power_of_two(n_col, 16, columns)
        for n_share in SHARES:
            if n_share <= triton.cdiv(n_sum, terms):
                yield Tile(rows, columns, terms, num_warps, 3, n_share)
    columns = 128 if hopper else 64 // n_half
    for n_share in SHARES if n_sum <= 128 else ():
        if n_share < triton.cdiv(n_col, columns):
            yield Tile(128, columns, power_of_two(n_sum, 16, 128), 8, 2, n_share, wide=True)


def cycles(tile: Tile, shape: tuple[int, int, int], n_half: int, gpu: tuple[bool, int]) -> float:
    """About how long a product takes: what the busiest multiprocessor multiplies, or moves.

    Args:
        tile: one of `tiles`.
        shape: (n_row, n_sum, n_col).
        n_half: of the operands.
        gpu: whether there are warp groups, and how many multiprocessors.
    """
    n_row, n_sum, n_col = shape
    rows, columns, n_step = tile.rows, tile.columns, tile.steps(n_sum, n_col)
    multiply = rows * columns * tile.terms * (2 * n_half - 1) / (PRODUCTS if gpu[0] else 1024)
    a, b, out = (2 * n_half * n for n in (rows * tile.terms, columns * tile.terms, rows * columns))
    if tile.wide:
        each = a / BYTES + n_step * max(multiply, (b + out) / BYTES)
    else:
        each = n_step * max(multiply, (a + b) / BYTES) + out / BYTES
        if tile.n_share > 1:  # the last program reads what all have written
            each += rows * columns * 4 * (tile.n_share + 1) / BYTES
    turns = math.ceil(math.prod(tile.grid(n_row, n_col)) / gpu[1])
    return turns * (each + START)


def _cost(tile: Tile, shape: tuple[int, int, int], n_half: int, gpu: tuple[bool, int]) -> float:
    """`cycles`, where there are counters for the tiles of a sum that is split."""
    split = tile.n_share > 1 and not tile.wide
    if split and tile.grid(shape[0], shape[2])[0] > MOST_TILES:
        return math.inf
    return cycles(tile, shape, n_half, gpu)


@lru_cache(1024)  # the number of rows changes whenever ghosts do
def chosen(shape: tuple[int, int, int], n_half: int, gpu: tuple[bool, int] = (True, 132)) -> Tile:
    """The tile that takes the fewest `cycles`."""
    found = tiles(*shape[1:], n_half, gpu[0])
    return min(found, key=lambda tile: _cost(tile, shape, n_half, gpu))


def key(shape: tuple[int, int, int], n_half: int) -> str:
    """Name of a product in `tuning`: rows as the next power of two."""
    n_row, *others = shape
    return " ".join(map(str, ("product", 1 << (n_row - 1).bit_length(), *others, n_half)))


def tile_of(shape: tuple[int, int, int], n_half: int, device: torch.device) -> Tile:
    """The tile that was measured to be the fastest on a device, else the one that is `chosen`."""
    found = tuning.known(key(shape, n_half), device)
    if not found:
        return chosen(shape, n_half, gpu_of(device))
    return Tile._make(found[name] for name in Tile._fields)


def candidates(shape: tuple[int, int, int], n_half: int, device: torch.device) -> list[Tile]:
    """Tiles worth measuring: those that may take less than twice what the first may."""
    gpu = gpu_of(device)

    def cost(tile: Tile) -> float:
        return _cost(tile, shape, n_half, gpu)

    usual = chosen(shape, n_half, gpu)
    others = sorted(tiles(*shape[1:], n_half, gpu[0]), key=cost)
    return [usual, *(t for t in others if t != usual and cost(t) < 2 * cost(usual))]


@cache
def gpu_of(device: torch.device) -> tuple[bool, int]:
    """Whether it has warp groups, and how many multiprocessors; of an H100 where interpreted."""
    return has_warp_groups(device), multiprocessors(device)


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
        a: (2 or 1, n_row, n_sum) float16, contiguous: one half or two.
        b: (2 or 1, n_sum, n_col) float16, contiguous.
        out: (n_row, n_col) float32, or (2 or 1, n_row, n_col) float16, contiguous; is written.
        counters: see `counters`; zeros, and zeros again afterwards.
        powers: two () float32, on the device; without them out is as a and b are.

    Raises:
        TypeError: an array is of another dtype.
        ValueError: shapes do not fit, or an array is not contiguous.
    """
    _check(a, b, out)
    (n_half, n_row, n_sum), n_col = a.shape, b.shape[2]
    if not out.numel():
        return
    tile = tile_of((n_row, n_sum, n_col), n_half, a.device)
    arrays = [a, b, out, *(powers or (None, None))]
    if tile.n_share > 1 and not tile.wide:
        parts = out.new_empty(tile.n_share, n_row, n_col, dtype=torch.float32)
        arrays += [parts, counters]
    elif not tile.wide:
        arrays += [None, None]
    sizes = n_row, n_sum, n_col, tile.steps(n_sum, n_col)
    kernel = wide_kernel if tile.wide else product_kernel
    with on_device(a):
        kernel[tile.grid(n_row, n_col)](
            *arrays, *sizes, **options(tile, n_sum, n_col, n_half, out.dtype)
        )


def options(tile: Tile, n_sum: int, n_col: int, n_half: int, out: torch.dtype) -> dict[str, Any]:
    """What is compiled in, and how it is launched."""
    return {
        "N_HALF": n_half,
        "OUT_HALF": n_half if out == torch.float16 else 0,
        "ALIGN_SUM": math.gcd(n_sum, 16),
        "ALIGN_COL": math.gcd(n_col, 16),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.terms,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


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
