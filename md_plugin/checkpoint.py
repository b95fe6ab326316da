"""Checkpoint: the `.hipnn` file, safetensors with a JSON header. Loading executes no code.

    safetensors            parameters by name, in the dtype in which they were trained
    header["md_plugin"]    JSON: format_version, units, config (HipnnConfig), info (training
                           summary, closest distance, origin), hash (SHA-256 of all this and of
                           the tensors). A sum of networks has a list "networks" of such configs
                           in place of "config".

A file of a newer format is refused; one of an older format is brought up by the functions in
`_UPDATES`, one per version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from md_plugin.committee import Committee
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn, HipnnSum
from md_plugin.potential import Potential

FORMAT_VERSION = 2
_KEY = "md_plugin"
# Version 2 added fields to HipnnConfig, whose defaults are what version 1 meant, and sums.
_UPDATES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: lambda header: header}


class CheckpointError(ValueError):
    """A model file is missing, damaged, of a newer format, or not a model file at all."""


def save_model(
    path: str | Path, model: Potential | Hipnn | HipnnSum, info: Mapping[str, Any] | None = None
) -> None:
    """Write a `.hipnn` file, whole or not at all.

    Args:
        path: where to.
        model: a potential (whose info is kept) or a bare network.
        info: JSON-serialisable entries, added to the potential's own.
    """
    path = Path(path)
    data = model_bytes(model, info)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def model_bytes(
    model: Potential | Hipnn | HipnnSum, info: Mapping[str, Any] | None = None
) -> bytes:
    """The content of a `.hipnn` file, which holds one model."""
    from safetensors.torch import save

    if isinstance(model, Committee):
        raise ValueError("a .hipnn file holds one model: save the members of a committee each")
    network = model.model if isinstance(model, Potential) else model
    merged = {**(model.info if isinstance(model, Potential) else {}), **(info or {})}
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    header = {
        "format_version": FORMAT_VERSION,
        "units": {"energy": "eV", "length": "angstrom"},
        **_architecture(network),
        "info": merged,
    }
    header = json.loads(json.dumps(header))  # what a reader will see: lists, string keys
    header["hash"] = _content_hash(header, tensors)
    data: bytes = save(tensors, metadata={_KEY: json.dumps(header)})
    return data


def load_model(
    source: str | Path | Potential | Sequence[str | Path | Potential],
    *,
    device: str | torch.device = "auto",
    dtype: str = "mixed",
    backend: str | None = None,
) -> Potential:
    """Load a potential, or several as a committee.

    Args:
        source: path of a `.hipnn` file, name of a bundled model (see `bundled_models`), or a
            loaded potential, which is returned as it is; or a list of these, which become a
            `Committee`.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        dtype: "mixed" (float64 geometry, float32 network), "float64", "float32" or "fast"; see
            `Potential`.
        backend: kernels; see `md_plugin.kernels.registry` for how None is resolved.

    Raises:
        CheckpointError: missing, truncated, changed, or of a newer format.
        ValueError: the models of a committee do not fit together.
    """
    if isinstance(source, Potential):
        return source
    if isinstance(source, list | tuple):
        members = [load_model(s, device=device, dtype=dtype, backend=backend) for s in source]
        return members[0] if len(members) == 1 else Committee(members)
    assert isinstance(source, str | Path)
    path, data = _read(source)
    return load_model_bytes(data, name=str(path), device=device, dtype=dtype, backend=backend)


def load_model_bytes(
    data: bytes,
    *,
    name: str = "model",
    device: str | torch.device = "auto",
    dtype: str = "mixed",
    backend: str | None = None,
) -> Potential:
    """Like `load_model`, from the content of a file; `name` is used in messages only."""
    header = _parse_header(data, name)
    from safetensors.torch import load

    try:
        tensors = load(data)
    except Exception as error:
        raise CheckpointError(f"model file {name} is damaged: {error}") from error
    if _content_hash(header, tensors) != header.get("hash"):
        raise CheckpointError(
            f"model file {name} was changed after it was written (wrong hash); copy it again"
        )
    header = _updated(header)
    with torch.random.fork_rng(devices=[]):  # initial weights are overwritten: draw no numbers
        network = _network(header, backend)
    # In the dtype of the file: float32 parameters would round what was trained in float64.
    dtypes = [tensor.dtype for name, tensor in tensors.items() if "readouts" in name]
    network.to(max(dtypes, key=lambda dtype: dtype.itemsize)).load_state_dict(tensors)
    network.eval().requires_grad_(False)
    return Potential(network, device=device, dtype=dtype, info=header["info"])


def _architecture(network: Hipnn | HipnnSum) -> dict[str, Any]:
    if isinstance(network, HipnnSum):
        return {"networks": [part.config.to_dict() for part in network.parts]}
    return {"config": network.config.to_dict()}


def _network(header: Mapping[str, Any], backend: str | None) -> Hipnn | HipnnSum:
    if "networks" not in header:
        return Hipnn(HipnnConfig(**header["config"]), backend=backend)
    return HipnnSum([Hipnn(HipnnConfig(**c), backend=backend) for c in header["networks"]])


def read_header(source: str | Path) -> dict[str, Any]:
    """The JSON header of a `.hipnn` file: format_version, units, config, info, hash."""
    path, data = _read(source)
    return _updated(_parse_header(data, str(path)))


def bundled_models() -> dict[str, Path]:
    """Name -> path of the models that come with the package."""
    folder = Path(str(resources.files("md_plugin") / "data"))
    return {path.stem: path for path in sorted(folder.glob("*.hipnn"))}


def _read(source: str | Path) -> tuple[Path, bytes]:
    path = _find(source)
    try:
        return path, path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read model file {path}: {error.strerror}") from error


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    bundled = bundled_models()
    if str(source) in bundled:
        return bundled[str(source)]
    names = ", ".join(map(repr, bundled)) or "none"
    raise CheckpointError(
        f"no model file {str(source)!r}, and no bundled model of that name (bundled: {names})"
    )


def _parse_header(data: bytes, name: str) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise CheckpointError(
            f"model file {name} is truncated or not a .hipnn file ({len(data)} bytes); "
            "copy it again"
        )
    try:
        text = json.loads(data[8 : 8 + size])["__metadata__"][_KEY]
        header: dict[str, Any] = json.loads(text)
        version = int(header["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name} is not a .hipnn model file of md_plugin, or its header is damaged"
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"model file {name} has format version {version}; this md_plugin reads up to "
            f"{FORMAT_VERSION}: upgrade md_plugin"
        )
    return header


def _updated(header: dict[str, Any]) -> dict[str, Any]:
    for old in range(int(header["format_version"]), FORMAT_VERSION):
        header = _UPDATES[old](header)
    return header


def _content_hash(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps({k: v for k, v in header.items() if k != "hash"}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
