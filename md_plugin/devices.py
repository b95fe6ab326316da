"""Devices by name."""

from __future__ import annotations

import torch


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
