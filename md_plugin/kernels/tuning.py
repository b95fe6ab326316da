"""How fused kernels are launched: block sizes, warps and stages, by kernel, shape and GPU.

The first of these that knows a kernel at a shape wins:

    1. what `md-plugin tune` measured on this GPU, in $XDG_CACHE_HOME/md_plugin/tuning
    2. `data/tuning.json`: for GPUs of some compute capabilities, what compiles without spilling
       registers into memory, fewest instructions first
    3. the heuristic of `md_plugin.kernels.triton_fused.tiles`

So are tiles of products with V, whose heuristic is `md_plugin.kernels.triton_matmul.chosen`, and
how many receivers make a block; of these nothing ships.

Nothing is measured during a simulation. A file of 1 holds for one GPU, one version of torch and
Triton and one source of the kernels, 2 for one source; others are not used, and of 1 that is
logged, once. A shape is known by its class: n_nu and n_feat as the next powers of two.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("md_plugin")

Options = Mapping[str, int]
NAMES = ("BLOCK_P", "BLOCK_NU", "BLOCK_F", "num_warps", "num_stages")
LEAST = {"BLOCK_P": 16, "BLOCK_NU": 16, "BLOCK_F": 16, "num_warps": 1, "num_stages": 1}
MOST = {"BLOCK_P": 64, "BLOCK_NU": 64, "BLOCK_F": 128, "num_warps": 8, "num_stages": 4}
TILE = {"rows": (16, 256), "columns": (16, 256), "terms": (16, 256), "num_warps": (1, 8)}
TILE |= {"num_stages": (1, 4), "n_share": (1, 64), "wide": (0, 1)}
LAYER = {name: (LEAST[name], MOST[name]) for name in NAMES}
# What is known of each kind, within bounds.
KINDS = {"forward": LAYER, "backward": LAYER, "product": TILE, "block": {"receivers": (1, 1 << 24)}}
POWERS = ("BLOCK_P", "BLOCK_NU", "BLOCK_F", "rows", "columns", "terms", "num_warps")
SOURCES = ("triton_layer.py", "triton_pairs.py")  # of what ships
MEASURED = (*SOURCES, "triton_matmul_kernels.py")
SHIPPED = Path(__file__).parent.parent / "data" / "tuning.json"

_trial: ContextVar[Options | None] = ContextVar("md_plugin_trial", default=None)


def key(kernel: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """Name of a kernel at a class of shapes.

    Args:
        kernel: "forward" or "backward"; "block" for how many receivers make one.
        shape: (n_block, n_comp, n_nu, n_feat) of env.
        dtype: what env is as good as; see `triton_arrays.grade`.
    """
    _, n_comp, n_nu, n_feat = shape
    classes = (1 << max(n - 1, 0).bit_length() for n in (n_nu, n_feat))
    return " ".join(map(str, (kernel, n_comp, *classes, str(dtype).removeprefix("torch."))))


def chosen(kernel: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Options:
    """What is known of a kernel on a device; empty where the heuristic decides."""
    return known(key(kernel, shape, dtype), device)


def known(name: str, device: torch.device) -> Options:
    """The same by name."""
    trial = _trial.get()
    if trial is not None and set(trial) <= set(KINDS[name.split()[0]]):
        return trial
    measured = _measured(device, os.environ.get("XDG_CACHE_HOME")).get(name)
    return measured or next(iter(shipped(device).get(name, ())), {})


@contextmanager
def trying(options: Options) -> Iterator[None]:
    """A block of code in which kernels of the kind that has these options are launched so."""
    token = _trial.set(options)
    try:
        yield
    finally:
        _trial.reset(token)


def candidates(name: str, default: Options, device: torch.device) -> list[Options]:
    """Options worth measuring: the default, those that ship, and what is one step away."""
    usual = {k: default[k] for k in NAMES}
    found: list[Options] = []
    for options in (usual, *shipped(device).get(name, ()), *neighbours(usual)):
        if options not in found:
            found.append(options)
    return found


def neighbours(options: Options) -> list[Options]:
    """Half and twice of each option, within bounds."""
    found: list[Options] = []
    for name in NAMES:
        for value in (options[name] // 2, options[name] * 2):
            if LEAST[name] <= value <= MOST[name]:
                found.append({**options, name: value})
    return found


@cache
def identity(device: torch.device) -> dict[str, str]:
    """What measurements hold for."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": version("triton"),
        "kernels": checksum(MEASURED),
    }


@cache
def checksum(sources: tuple[str, ...] = SOURCES) -> str:
    """Of the source of the kernels."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / s).read_bytes() for s in sources)).hexdigest()[:16]


def file_of(device: torch.device) -> Path:
    """Where measurements of a GPU are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", identity(device)["gpu"].lower()).strip("-")
    return Path(home) / "md_plugin" / "tuning" / f"{name}.json"


def save(found: Mapping[str, Options], device: torch.device) -> Path:
    """Write measurements, beside those of other shapes that still hold; all or nothing.

    Raises:
        OSError: the folder cannot be written.
    """
    path = file_of(device)
    table = {**_measured(device, os.environ.get("XDG_CACHE_HOME")), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"identity": identity(device), "options": table}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".json") as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
    _measured.cache_clear()
    return path


@cache
def _measured(device: torch.device, home: str | None) -> Mapping[str, Options]:
    """What was measured on a GPU, below that home; none, and a warning, where it is of no use."""
    path = file_of(device)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        if not (isinstance(content, dict) and isinstance(content.get("identity"), dict)):
            raise ValueError("it does not say what it holds for")
        known = identity(device).items()
        others = [name for name, value in known if content["identity"].get(name) != value]
        if others:
            raise ValueError(f"it was measured with another {' and '.join(others)}")
        table = content.get("options")
        if not isinstance(table, dict):
            raise ValueError("it has no options")
        return {name: _checked(options, name) for name, options in table.items()}
    except (OSError, ValueError) as error:
        logger.warning(
            "%s is not used: %s; `md-plugin tune` measures again (until then kernels are launched "
            "as usual)",
            path,
            error,
        )
        return {}


def _checked(options: Any, name: str = "forward") -> Options:
    """The options themselves.

    Raises:
        ValueError: they are not numbers within bounds, one for each name, and powers of two where
            these are needed.
    """
    bounds = KINDS.get(name.split()[0], LAYER)
    if not isinstance(options, dict) or set(options) != set(bounds):
        raise ValueError(f"options are {options!r}, not one number for each of {', '.join(bounds)}")
    for option, value in options.items():
        least, most = bounds[option]
        if not (isinstance(value, int) and least <= value <= most):
            raise ValueError(f"{option} is {value!r}")
        if option in POWERS and value & (value - 1):
            raise ValueError(f"{option} is {value!r}")
    return options


def shipped(device: torch.device) -> Mapping[str, Sequence[Options]]:
    """Of `data/tuning.json`, for the compute capability of a device and these kernels."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return shipped_for(f"sm_{major}{minor}")


@cache
def shipped_for(capability: str) -> Mapping[str, Sequence[Options]]:
    """The same for a capability by name, "sm_90"."""
    content = json.loads(SHIPPED.read_text())
    if content["kernels"] != checksum():
        return {}
    table: Mapping[str, Sequence[Options]] = content["options"].get(capability, {})
    return table
