"""export_mliap: writes the one file that every LAMMPS coupling reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lammps_interface.mliap import HipnnMLIAP
from md_plugin.checkpoint import load_model, model_bytes


def export_mliap(
    model: Any,
    output: str | Path,
    *,
    dtype: str = "mixed",
    device: str = "auto",
    backend: str | None = None,
    units: str = "metal",
) -> None:
    """Writes the file that `pair_style mliap unified FILE 0` reads.

    Args:
        model: path or name of a model, or a loaded `Potential`; or a sequence of these, which
            become a committee.
        output: file to write; must end in .pt or .pth, by which LAMMPS chooses its loader.
        dtype: precision in LAMMPS.
        device: where to compute in LAMMPS.
        backend: kernels in LAMMPS; None or "auto" chooses there.
        units: unit style of the scripts, for hosts that cannot be asked for it.

    Raises:
        ValueError: unusable model, name or setting.
    """
    path = Path(output)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"the output must end in .pt or .pth for LAMMPS to read it, got {path}")
    potential = load_model(model, device="cpu", dtype="float64")
    unified = HipnnMLIAP(
        [model_bytes(member) for member in getattr(potential, "members", (potential,))],
        dtype=dtype,
        device=device,
        backend=None if backend == "auto" else backend,
        units=units,
    )
    partial = path.with_name(path.name + ".partial")
    torch.save(unified, partial)
    partial.replace(path)
