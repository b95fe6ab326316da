"""Recording work of a GPU once and replaying it: CUDA graphs, and what cannot be recorded.

    warm_up(call)    runs it on a side stream, as torch asks before a capture
    capture(call)    records it without running it; gives what replays it, and its result

A replay launches the same kernels on the same memory, and nothing of Python runs: numbers that
Python knew are frozen, and results stand where those of the capture stood. So inputs are copied to
where they were, and results are copied away. Work in which the host waits for the device, or asks
it for a number, cannot be recorded: `Watch` tells which operator does. Source: CUDA semantics,
section CUDA Graphs, of the documentation of torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

# Operators whose result, or the shape of it, the host has to read from the device.
ASKING = frozenset(
    {
        *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
        *("unique_consecutive", "unique_dim", "_unique2", "_unique", "repeat_interleave.Tensor"),
    }
)


class Recorder(Protocol):
    """Records calls and replays them."""

    def warm_up(self, call: Callable[[], T]) -> T:
        """Its result; everything that happens at a first time has happened then."""
        ...

    def capture(self, call: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """What replays the call, and the result that each replay writes anew."""
        ...


class CudaRecorder:
    """Graphs of one device, which share their memory: replay them one after the other.

    A graph shares with the last one that still exists. Torch refuses a pool of graphs that are all
    gone while a result of theirs is still somewhere.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: Callable[[], torch.cuda.CUDAGraph | None] = lambda: None

    def warm_up(self, call: Callable[[], T]) -> T:
        """See `Recorder`."""
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            result = call()
        now.wait_stream(self.stream)
        return result

    def capture(self, call: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """See `Recorder`.

        Raises:
            RuntimeError: of torch, where something cannot be captured.
        """
        graph, last = torch.cuda.CUDAGraph(), self._last()
        pool = None if last is None else last.pool()
        with (
            torch.cuda.device(self.device),
            # A capture that fails leaves torch on the side stream.
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            # Threads of others, of an engine say, may go on as they like.
            torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"),
        ):
            result = call()
        self._last = weakref.ref(graph)
        return graph.replay, result


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block of code: how many operators compute something, and which make the host wait.

    Attributes:
        launches: operators that are not mere views; kernels of Triton are not seen.
        waits: names of the operators for which the host waits, with the reason.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        reason = _why_waiting(func, given, result)
        if reason:
            self.waits.append(f"{func.__name__} {reason}")
        self.launches += not func.is_view
        return result


def _why_waiting(func: Any, given: list[Tensor], result: Any) -> str:
    """Why the host waits for an operator, or may; "" where it does not."""
    name = func.__name__
    if name in ASKING or name.partition(".")[0] in ASKING:
        return "asks the device for a number"
    if name.startswith(("index.", "index_put")) and any(_is_mask(x) for x in given[1:]):
        return "counts a mask"
    tensors = [x for x in (*given, *tree_leaves(result)) if isinstance(x, Tensor)]
    if not name.startswith(("_to_copy", "copy_")):  # others take numbers of the host along
        tensors = [x for x in tensors if x.ndim or x.device.type != "cpu"]
    devices = sorted({str(x.device) for x in tensors})
    return f"copies between {' and '.join(devices)}" if len(devices) > 1 else ""


def _is_mask(x: Tensor) -> bool:
    return x.dtype in (torch.bool, torch.uint8)
