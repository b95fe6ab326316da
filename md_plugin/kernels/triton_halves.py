"""Arrays of float32 as one or two float16 arrays and a power of two, which is found on the device.

    x = power (hi + lo)      hi = float16(x / power)      lo = float16(x / power - hi)

power is the power of two above max |x|, 1 where that is 0: |hi| <= 1, and what is lost is at most
2^-22 of a number and 2^-25 of the largest. Halves are (n_half, *x.shape), hi first; with n_half 1
lo is left out. A number that is not finite stays so. Nothing makes the host wait for the device.

    split         one power for all: largest numbers of parts, then halves, 2 launches
    split_rows    one power for each row, times those of what its product is made of, 1 launch

Products of halves: `triton_matmul`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float16, float32, int32

from md_plugin.kernels.triton_parts import on_device, power_of_two

PARTS = 512  # of an array, each by one program: some four for each multiprocessor
BLOCK = 2048  # numbers at once: 16 for each of 128 threads, four loads of 16 bytes


@triton.jit
def halves_of(x, N_HALF: tl.constexpr):
    """hi, or hi and lo."""
    hi = x.to(tl.float16)
    if N_HALF == 1:
        return (hi,)
    else:
        return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def _magnitude(x):
    """Bits of |x|: integers in the order of the numbers, infinity and NaN above all of them."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _powers(largest):
    """The power of two above a magnitude, and its inverse, both of them normal numbers."""
    exponent = tl.where(largest == 0, 127, tl.minimum((largest >> 23) + 1, 253))
    power = (exponent << 23).to(tl.float32, bitcast=True)
    return power, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def largest_kernel(values, largest, n, BLOCK: tl.constexpr):
    """The largest magnitude of every num_programs-th block."""
    found = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for k0 in range(first, n, tl.num_programs(0) * BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        found = tl.maximum(found, _magnitude(tl.load(values + k, mask=k < n, other=0.0)))
    tl.store(largest + tl.program_id(0), tl.max(found, axis=0))


@triton.jit(do_not_specialize=["n_part"])
def split_kernel(
    values, largest, halves, power, n, n_part,
    N_HALF: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Halves of a block; the first program writes the power."""
    part = tl.arange(0, PARTS)
    parts = tl.load(largest + part, mask=part < n_part, other=0)
    above, inverse = _powers(tl.max(parts, axis=0))
    if tl.program_id(0) == 0:
        tl.store(power, above)
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_x = halves_of(tl.load(values + k, mask=k < n, other=0.0) * inverse, N_HALF)
    for half in tl.static_range(N_HALF):
        tl.store(halves + (half * n + k), of_x[half], mask=k < n)


@triton.jit(do_not_specialize=["n_row"])
def split_rows_kernel(
    values, halves, scale, first, second, n_row, size,
    N_HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Halves of some rows; (2, n_row) power first, and power first second."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    place = row[:, None] * size + column[None, :]
    there = (row < n_row)[:, None] & (column < size)[None, :]
    of_x = tl.load(values + place, mask=there, other=0.0)
    power, inverse = _powers(tl.max(_magnitude(of_x), axis=1))
    power *= tl.load(first)
    tl.store(scale + row, power, mask=row < n_row)
    tl.store(scale + n_row + row, power * tl.load(second), mask=row < n_row)
    split = halves_of(of_x * inverse[:, None], N_HALF)
    for half in tl.static_range(N_HALF):
        place = (half * n_row + row)[:, None] * size + column[None, :]
        tl.store(halves + place, split[half], mask=there)


def split(x: Tensor, n_half: int) -> tuple[Tensor, Tensor]:
    """Halves (n_half, *x.shape) of an array, and its power of two (), on its device.

    Args:
        x: float32, contiguous, of any shape.
        n_half: 2, or 1 for hi alone.

    Raises:
        TypeError: x is not float32.
        ValueError: x is not contiguous, or n_half is neither 1 nor 2.
    """
    _check(x, n_half)
    halves = x.new_empty(n_half, *x.shape, dtype=float16)
    if not x.numel():
        return halves, x.new_ones(())
    power, n_block = x.new_empty(()), triton.cdiv(x.numel(), BLOCK)
    largest = x.new_empty(min(n_block, PARTS), dtype=int32)
    with on_device(x):
        largest_kernel[(len(largest),)](x, largest, x.numel(), BLOCK=BLOCK)
        split_kernel[(n_block,)](
            x, largest, halves, power, x.numel(), len(largest),
            N_HALF=n_half, PARTS=PARTS, BLOCK=BLOCK,
        )  # fmt: skip
    return halves, power


def split_rows(x: Tensor, n_half: int, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Halves (n_half, *x.shape), each row (x.shape[1:]) over a power of its own, and powers (2, n).

    Args:
        x: (n, ...) float32, contiguous.
        n_half: 2, or 1 for hi alone.
        first: () float32, a power that powers of rows are multiplied by.
        second: () float32, another, for the second row of the powers only.

    Raises:
        TypeError: an array is not float32.
        ValueError: an array is not contiguous, n_half is neither 1 nor 2, or `first` or `second`
            is more than one number.
    """
    for array in (x, first, second):
        _check(array, n_half)
    if first.ndim or second.ndim:
        raise ValueError(f"powers have shapes {tuple(first.shape)}, {tuple(second.shape)}, not ()")
    halves, scale = x.new_empty(n_half, *x.shape, dtype=float16), x.new_empty(2, len(x))
    if x.numel():
        size = x[0].numel()
        columns = power_of_two(size, 16, 1 << 20)
        rows = max(1, BLOCK // columns)
        with on_device(x):
            split_rows_kernel[(triton.cdiv(len(x), rows),)](
                x, halves, scale, first, second, len(x), size,
                N_HALF=n_half, BLOCK_R=rows, BLOCK_C=columns,
            )  # fmt: skip
    return halves, scale


def _check(x: Tensor, n_half: int) -> None:
    if x.dtype != float32:
        raise TypeError(f"halves are made of float32, not of {x.dtype}")
    if not x.is_contiguous():
        raise ValueError("an array is not contiguous")
    if n_half not in (1, 2):
        raise ValueError(f"n_half is {n_half}, not 1 or 2")
