"""What the Triton kernels share: where they run, and the functions of a distance.

    x = r / rcut        c = cos^2(pi x / 2)        c' = -(pi / rcut) sin(pi x / 2) cos(pi x / 2)
                        c'' = (pi^2 / (2 rcut^2)) (sin^2(pi x / 2) - cos^2(pi x / 2))

all of them exactly 0 from `end` on. Numbers that float64 must not lose are compiled in: Triton
passes Python's floats on as float32.

The kernels run on CUDA devices. If TRITON_INTERPRET=1 is in the environment when this module is
imported, Triton interprets them instead, on CPU tensors too: slow, for tests.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import contextlib
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of launches; set, not left to Triton: versions differ in the default, and with it in speed and
# last bits. One stage: a row has two to four tiles of pairs, too few to fetch ahead, which costs
# half as many instructions again; other programs compute while one waits.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
# Of tl.dot: products of float32 as three of tf32, which is as good; "ieee" would leave them to
# the vector units.
PRECISION = {torch.float32: "tf32x3", torch.float64: "ieee"}
# Terms of the Taylor series of sin on [0, pi / 2]: the next one is below 7e-10, or 6e-21.
SIN_TERMS = {torch.float32: 7, torch.float64: 12}


@triton.jit
def sin_half_pi(x, TERMS: tl.constexpr):
    """sin(pi x / 2) for 0 <= x <= 1, relative accuracy up to x = 0.

    tl.sin and tl.cos would reduce any argument, in a slow path with a stack frame.
    """
    y = x * 1.5707963267948966
    square = y * y
    series = 1.0
    for k in tl.static_range(TERMS - 1, 0, -1):
        series = 1.0 - square * (1.0 / (2 * k * (2 * k + 1))) * series
    return y * series


@triton.jit
def cosine_cutoff(r, RCUT, END, TERMS: tl.constexpr):
    """c, c' and c'' at distances r; RCUT and END compiled in, or loaded, in the dtype of r.

    No constant has a name of its own: Triton would make it float32.
    """
    x = r * (1.0 / RCUT)
    sine, cosine = sin_half_pi(x, TERMS), sin_half_pi(1.0 - x, TERMS)
    inside = r < END
    c = tl.where(inside, cosine * cosine, 0.0)
    c1 = tl.where(inside, sine * cosine * (-3.141592653589793 / RCUT), 0.0)
    bend = sine * sine - cosine * cosine
    c2 = tl.where(inside, bend * (4.934802200544679 / (RCUT * RCUT)), 0.0)
    return c, c1, c2


@triton.jit
def loaded(array, size, place, live, N_PART: tl.constexpr):
    """Tiles of the parts of an array, `size` numbers each."""
    parts = ()
    for k in tl.static_range(N_PART):
        parts = parts + (tl.load(array + size * k + place, mask=live, other=0.0),)
    return parts


@triton.jit
def split(x, like, N_PART: tl.constexpr):
    """Parts that add up to x, as `like` has them."""
    high = x.to(like.dtype.element_ty)
    if N_PART == 1:
        return (high,)
    else:
        return high, (x - high.to(x.dtype)).to(high.dtype)


@triton.jit
def turned(parts):
    """Transposes."""
    found = ()
    for k in tl.static_range(len(parts)):
        found = found + (tl.trans(parts[k]),)
    return found


@triton.jit
def dot(a, b, total):
    """total + a b, of parts; what two low parts give is below rounding."""
    for k in tl.static_range(len(a) - 1, -1, -1):
        for m in tl.static_range(len(b) - 1, -1, -1):
            if k == 0 or m == 0:
                total = tl.dot(a[k], b[m], total, input_precision="ieee", out_dtype=total.dtype)
    return total


INTERPRETED = not isinstance(cosine_cutoff, triton.JITFunction)
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context to launch in.

    Raises:
        ValueError: the kernels cannot reach the tensor's device.
    """
    if tensor.device.type not in DEVICES:
        raise ValueError(
            f"backend 'triton' computes on CUDA devices, but the tensors are on {tensor.device}; "
            "choose backend='numba' or 'torch', move the potential to device='cuda', or set "
            "TRITON_INTERPRET=1 before the start to interpret the kernels on the CPU (slow)"
        )
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def fixed_order() -> bool:
    """Whether torch is asked for results that do not change from run to run."""
    return torch.are_deterministic_algorithms_enabled()


def has_warp_groups(device: torch.device) -> bool:
    """Whether four warps together multiply 64 rows (wgmma), as on H100 and H200 only."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; those of an H100 where kernels are interpreted."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest one that `size` fits into, within bounds."""
    return min(max(int(triton.next_power_of_2(size)), least), most)
