"""The sums, products and sensitivities on the GPU by kernels in Python, which numba compiles.

For CUDA devices without Triton and cupy. The kernels, in `numba_cuda_sums` and `numba_cuda_radial`,
are those in CUDA C again; what is allocated and launched: `cuda_launch`. A kernel is compiled at
its first use in a process, for each dtype; numba reads and writes torch's own memory, on torch's
current stream: nothing is copied, and nobody waits.

With NUMBA_ENABLE_CUDASIM=1 in the environment when numba is imported, numba's simulator runs the
kernels in Python, on CPU tensors too: very slowly, for tests.
"""

from __future__ import annotations

import warnings
from typing import Any

import numba
import torch
from numba import cuda
from numba.core.errors import NumbaPerformanceWarning
from torch import Tensor

from md_plugin.kernels import numba_cuda_radial, numba_cuda_sums
from md_plugin.kernels.cuda_launch import CudaKernels, Sizes

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
DEVICES = ("cuda", "cpu") if SIMULATED else ("cuda",)
RADIAL = ("sensitivity", "slope", "curvature")

if not cuda.is_available():
    raise RuntimeError(
        f"numba finds no CUDA: {cuda.cuda_error()}; the package numba-cuda, "
        "pip install 'numba-cuda[cu12]' or 'numba-cuda[cu13]', brings what it needs beside a driver"
    )


def _array(x: Any) -> Any:
    """A tensor as the kernels take it; numbers as they are."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().numpy() if x.device.type == "cpu" else cuda.as_cuda_array(x.detach())


def _launch(name: str, grid: Sizes, block: Sizes, shared: int, arguments: tuple[Any, ...]) -> None:
    like: Tensor = arguments[0]
    if like.device.type not in DEVICES:
        raise ValueError(
            f"backend 'numba_cuda' computes on CUDA devices, but the tensors are on {like.device}; "
            "choose backend='numba' or 'torch', or move the potential to device='cuda'"
        )
    kernel = getattr(numba_cuda_radial if name in RADIAL else numba_cuda_sums, name)
    n_byte = shared * like.element_size()
    if like.device.type == "cpu":
        kernel[grid, block, 0, n_byte](*map(_array, arguments))
        return
    with cuda.gpus[like.device.index]:
        stream = cuda.external_stream(torch.cuda.current_stream(like.device).cuda_stream)
        with warnings.catch_warnings():  # a small system does not fill a GPU, and may say so
            warnings.simplefilter("ignore", NumbaPerformanceWarning)
            configured = kernel[grid, block, stream, n_byte]
        configured(*map(_array, arguments))


_kernels = CudaKernels(_launch)
envsum, sensesum, featsum = _kernels.envsum, _kernels.sensesum, _kernels.featsum
stack, fold, stack_along = _kernels.stack, _kernels.fold, _kernels.stack_along
sensitivity = _kernels.sensitivity
sensitivity_slope = _kernels.sensitivity_slope
sensitivity_curvature = _kernels.sensitivity_curvature
