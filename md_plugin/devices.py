"""Devices by name, and how arrays come to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" takes CUDA if there is one.

    Raises:
        ValueError: no such device, or CUDA was asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device {str(device)!r} is not known to torch; choose auto, cpu, cuda or cuda:1 ..."
        ) from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ValueError(f"device {str(device)!r} was asked for, but torch sees no CUDA device")
        if (chosen.index or 0) >= count:
            raise ValueError(
                f"device {str(device)!r} was asked for, but torch sees {count} CUDA "
                f"device{'s' if count > 1 else ''}, numbered from 0"
            )
    return chosen


class Staging:
    """Host arrays on their way to a device, through page-locked memory that is kept.

    The memory grows where it is needed and never shrinks. A copy does not make the host wait; the
    next one waits until the one before has left the memory, which in a time step it has.

    Args:
        device: where arrays go; on a CPU they are copied as well.

    Attributes:
        device: where arrays go.
        n_bytes: that have been sent so far.
    """

    def __init__(self, device: torch.device):
        self.device, self.n_bytes = device, 0
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._left: Any = None  # event on the device: the last copy is out of the memory

    def __reduce__(self) -> tuple[Any, ...]:
        return Staging, (self.device,)

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The memory as a tensor, to be filled by the host; the next call gives it again."""
        if self._left is not None:
            self._left.synchronize()
        n = math.prod(shape) * dtype.itemsize
        if n > len(self._memory):
            pinned = self.device.type == "cuda"
            self._memory = torch.empty(n, dtype=torch.uint8, pin_memory=pinned)
        return self._memory[:n].view(dtype).view(*shape)

    def send(self, array: Tensor) -> Tensor:
        """A new tensor on the device; the array may change as soon as this returns."""
        return self.leave(self.room(array.shape, array.dtype).copy_(array))

    def leave(self, rows: Tensor, there: Tensor | None = None) -> Tensor:
        """Filled rows of `room`, on the device: in the tensor `there`, or in a new one."""
        if there is None:
            there = torch.empty_like(rows, device=self.device, pin_memory=False)
        there.copy_(rows, non_blocking=True)
        self.n_bytes += rows.nbytes
        if self.device.type == "cuda":
            if self._left is None:
                self._left = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._left.record(torch.cuda.current_stream(self.device))
        return there


def wait(device: torch.device) -> None:
    """Until the device has done what this thread has given to it; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype on another device, in one copy, for which the host waits once."""
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
