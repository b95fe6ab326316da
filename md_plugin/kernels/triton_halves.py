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

from math import gcd

import triton
import triton.language as tl
from torch import Tensor, float16, float32, int32

from md_plugin.kernels.triton_parts import on_device, power_of_two
from md_plugin.kernels.triton_parts import split as parts_of

PARTS = 512  # of an array, each by one program: some four for each multiprocessor
BLOCK = 2048  # numbers at once: 16 for each of 128 threads, four loads of 16 bytes


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


@triton.jit(do_not_specialize=["n"])
def largest_kernel(values, largest, n, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """The largest magnitude of every num_programs-th block. ALIGN divides n."""
    n = n // ALIGN * ALIGN
    found = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for k0 in range(first, n, tl.num_programs(0) * BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        found = tl.maximum(found, _magnitude(tl.load(values + k, mask=k < n, other=0.0)))
    tl.store(largest + tl.program_id(0), tl.max(found, axis=0))


@triton.jit(do_not_specialize=["n", "n_part"])
def split_kernel(
    values, largest, halves, power, n, n_part,
    N_HALF: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Halves of a block; the first program writes the power."""
    n = n // ALIGN * ALIGN
    part = tl.arange(0, PARTS)
    parts = tl.load(largest + part, mask=part < n_part, other=0)
    above, inverse = _powers(tl.max(parts, axis=0))
    if tl.program_id(0) == 0:
        tl.store(power, above)
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_x = parts_of(tl.load(values + k, mask=k < n, other=0.0) * inverse, halves, N_HALF)
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
    split = parts_of(of_x * inverse[:, None], halves, N_HALF)
    for half in tl.static_range(N_HALF):
        place = (half * n_row + row)[:, None] * size + column[None, :]
        tl.store(halves + place, split[half], mask=there)


def split(x: Tensor, halves: Tensor, power: Tensor) -> None:
    """Write halves of an array, and its power of two.

    Args:
        x: (n, ...) float32, contiguous.
        halves: (2 or 1, *x.shape) float16, contiguous; is written.
        power: () float32; is written.

    Raises:
        TypeError: an array is of another dtype.
        ValueError: an array has another shape, or is not contiguous.
    """
    _check(x, halves, {"power": (power, ())})
    if not x.numel():
        power.fill_(1.0)
        return
    n_block, shape = triton.cdiv(x.numel(), BLOCK), {"ALIGN": gcd(x[0].numel(), 16), "BLOCK": BLOCK}
    largest = x.new_empty(min(n_block, PARTS), dtype=int32)
    with on_device(x):
        largest_kernel[(len(largest),)](x, largest, x.numel(), **shape)
        split_kernel[(n_block,)](
            x, largest, halves, power, x.numel(), len(largest),
            N_HALF=len(halves), PARTS=PARTS, **shape,
        )  # fmt: skip


def split_rows(x: Tensor, halves: Tensor, scale: Tensor, first: Tensor, second: Tensor) -> None:
    """Write halves, each row (x.shape[1:]) over a power of its own, and scale.

    Args:
        x: (n, ...) float32, contiguous.
        halves: (2 or 1, n, ...) float16, contiguous; is written.
        scale: (2, n) float32; is written: the power of a row times `first`, and that times
            `second`.
        first: () float32.
        second: () float32.

    Raises:
        TypeError: an array is of another dtype.
        ValueError: an array has another shape, or is not contiguous.
    """
    _check(x, halves, {"scale": (scale, (2, len(x))), "first": (first, ()), "second": (second, ())})
    if x.numel():
        size = x[0].numel()
        columns = power_of_two(size, 16, 1 << 20)
        rows = max(1, BLOCK // columns)
        with on_device(x):
            split_rows_kernel[(triton.cdiv(len(x), rows),)](
                x, halves, scale, first, second, len(x), size,
                N_HALF=len(halves), BLOCK_R=rows, BLOCK_C=columns,
            )  # fmt: skip


def _check(x: Tensor, halves: Tensor, others: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (array, shape) in others.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, not {shape}")
    singles = x, *(array for array, _ in others.values())
    if halves.dtype != float16 or any(array.dtype != float32 for array in singles):
        raise TypeError(
            f"halves are float16, and made of float32 with powers in float32, not {halves.dtype} "
            f"of {', '.join(str(array.dtype) for array in singles)}"
        )
    if halves.shape[:1] not in ((1,), (2,)) or halves.shape[1:] != x.shape:
        raise ValueError(f"{tuple(halves.shape)} are not one or two halves of {tuple(x.shape)}")
    if not all(array.is_contiguous() for array in (halves, *singles)):
        raise ValueError("an array is not contiguous")
