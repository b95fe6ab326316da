"""The sums, products and sensitivities on the GPU by CUDA C, which cupy compiles and launches.

For CUDA devices without Triton. The source is `cuda_sums.cu` and `cuda_radial.cu`, once in float32
and once in float64; it is compiled at its first use in a process and on a device, and cupy keeps
the code on disk (`~/.cupy/kernel_cache`, or `CUPY_CACHE_DIR`). Kernels read and write torch's own
memory through pointers, on torch's current stream: nothing is copied, and nobody waits. What is
allocated and launched: `cuda_launch`.
"""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch
from torch import Tensor

from md_plugin.kernels.cuda_launch import CudaKernels, Sizes

DEVICES = ("cuda",)
SOURCES = ("cuda_sums.cu", "cuda_radial.cu")
OPTIONS = {
    torch.float32: ("--std=c++17", "-DREAL=float"),
    torch.float64: ("--std=c++17", "-DREAL=double"),
}


def source() -> str:
    """The text that is compiled."""
    return "\n".join(Path(__file__).with_name(name).read_text("utf-8") for name in SOURCES)


@cache
def _module(dtype: torch.dtype) -> Any:
    return cupy.RawModule(code=source(), options=OPTIONS[dtype])


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return _module(dtype).get_function(name)


def on_stream(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Cupy launches on the tensor's device and torch's current stream there.

    Raises:
        ValueError: the tensor is not on a CUDA device.
    """
    if tensor.device.type != "cuda":
        raise ValueError(
            f"backend 'cupy' computes on CUDA devices, but the tensors are on {tensor.device}; "
            "choose backend='numba' or 'torch', or move the potential to device='cuda'"
        )
    stream = torch.cuda.current_stream(tensor.device)
    contexts = contextlib.ExitStack()
    contexts.enter_context(cupy.cuda.Device(tensor.device.index))
    if hasattr(cupy.cuda.Stream, "from_external"):  # since cupy 14
        contexts.enter_context(cupy.cuda.Stream.from_external(stream))
    else:
        contexts.enter_context(cupy.cuda.ExternalStream(stream.cuda_stream))
    return contexts


def _value(x: Tensor | int | float) -> np.generic:
    """An argument as the kernel's signature has it."""
    if isinstance(x, Tensor):
        return np.uint64(x.data_ptr())
    return np.int32(x) if isinstance(x, int) else np.float64(x)


def _launch(name: str, grid: Sizes, block: Sizes, shared: int, arguments: tuple[Any, ...]) -> None:
    like = arguments[0]
    with on_stream(like):
        _kernel(name, like.dtype)(
            grid, block, tuple(map(_value, arguments)), shared_mem=shared * like.element_size()
        )


_kernels = CudaKernels(_launch)
envsum, sensesum, featsum = _kernels.envsum, _kernels.sensesum, _kernels.featsum
stack, fold, stack_along = _kernels.stack, _kernels.fold, _kernels.stack_along
sensitivity = _kernels.sensitivity
sensitivity_slope = _kernels.sensitivity_slope
sensitivity_curvature = _kernels.sensitivity_curvature
