"""Files and folders that hippynn writes, and settings in JSON.

`unpickled` executes code that is in the files and needs hippynn; the others do neither.
"""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from md_plugin.hippynn_io.settings import HippynnError


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a network, see `md_plugin.hippynn_io.settings`.

    Raises:
        HippynnError: not readable, or not JSON.
    """
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise HippynnError(f"cannot read settings {path}: {error.strerror}") from error
    except ValueError as error:
        raise HippynnError(f"settings {path} are not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise HippynnError(f"settings {path} must be an object with network and module_kwargs")
    return settings


# What `export_hippynn` writes.
EXPORTED = ("network.pt", "energy.pt", "settings.json")


def read_state(path: Path) -> dict[str, Any]:
    """The state dict in a file, an experiment folder, or a folder of `export_hippynn`.

    No code in the files is executed.

    Raises:
        HippynnError: not readable, or more than a state dict.
    """
    if path.is_dir():
        if (path / "best_model.pt").exists():
            return read_state(path / "best_model.pt")
        parts = {name: read_state(path / f"{name}.pt") for name in ("network", "energy")}
        return {f"{name}.{key}": v for name, part in parts.items() for key, v in part.items()}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise HippynnError(f"cannot read {path}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise HippynnError(
            f"{path} holds more than tensors, or is damaged; with settings it must be a state "
            f"dict, as in best_model.pt ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise HippynnError(f"{path} is not a state dict")
    return state


def unpickled(path: Path) -> tuple[Any, dict[str, Any]]:
    """The object in a file or experiment folder, and a summary of its training.

    Raises:
        HippynnError: not readable, or nothing that hippynn writes.
        ImportError: hippynn is not installed.
    """
    try:
        with warnings.catch_warnings():  # torch's, about sparse tensors in hippynn
            warnings.simplefilter("ignore")
            import hippynn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "hippynn is needed to read its files: pip install 'md-plugin[hippynn]'"
        ) from error
    if path.is_dir():
        return _experiment(path)
    thing = _load(path)
    if isinstance(thing, dict):
        raise HippynnError(
            f"{path} holds no trained model but {', '.join(map(str, list(thing)[:4]))} ...: give "
            "the experiment folder, or a state dict with its settings (--settings)"
        )
    return thing, {}


def _experiment(folder: Path) -> tuple[Any, dict[str, Any]]:
    structure_file = folder / "experiment_structure.pt"
    if not structure_file.exists():
        raise HippynnError(f"{folder} is no experiment of hippynn: no experiment_structure.pt")
    model = _load(structure_file)["training_modules"][0]
    weights = [folder / name for name in ("best_model.pt", "best_checkpoint.pt")]
    found = [path for path in weights if path.exists()]
    if not found:
        raise HippynnError(
            f"{folder} has neither best_model.pt nor best_checkpoint.pt: was it trained?"
        )
    state = _load(found[0])
    model.load_state_dict(state.get("model", state))
    training = {}
    if weights[1].exists():
        metrics = getattr(_load(weights[1]).get("metric_tracker"), "best_metric_values", {})
        training = {split: dict(values) for split, values in metrics.items()}
    return model, json.loads(json.dumps(training, default=float))


def _load(path: Path) -> Any:
    try:
        if path.read_bytes()[:2] == b"PK":
            return torch.load(path, map_location="cpu", weights_only=False)
        with path.open("rb") as stream:
            return pickle.load(stream)
    except (ImportError, AttributeError) as error:
        raise HippynnError(
            f"{path} refers to something that is not here ({error}): install it, or import the "
            "state dict with settings (--settings, see docs/hippynn.md)"
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise HippynnError(f"cannot read {path}: {error}") from error
