"""Backends: who computes the three sums, chosen by name, as a frozen value.

A choice is looked up in this order; the first that says something wins:

    1. the call            envsum(..., backend="numba"), model(..., backend="numba")
    2. a block of code     with use_backend("torch"): ...
    3. the model           Hipnn(config, backend="triton"), load_model(..., backend=...)
    4. the environment     MD_PLUGIN_BACKEND=numba
    5. a settings file     backend = "numba" in md_plugin.toml (working folder), else in
                           $XDG_CONFIG_HOME/md_plugin/settings.toml
    6. "auto"              GPU: triton, cupy, numba_cuda; CPU: numba; torch where nothing else is

4 and 5 are read when a model is made, never at import. An explicit choice that cannot be met
raises and says what exists and why the rest does not; only "auto" may choose, and logs its choice
once. The first use of a backend on a device runs a small self-check against the reference, and a
failing kernel is an error, never a slow path.
"""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from md_plugin.kernels import radial_reference
from md_plugin.kernels.closure import EnvSum, FeatSum, SenseSum, Stack, SumKernels, check_shapes
from md_plugin.kernels.radial_reference import Cutoff
from md_plugin.kernels.self_check import FAMILIES
from md_plugin.kernels.sensitivity import Sensitivity, check_radial
from md_plugin.pairs import Pairs

logger = logging.getLogger("md_plugin")

BACKENDS = {
    "torch": "md_plugin.kernels.reference",
    "numba": "md_plugin.kernels.numba_cpu",
    "triton": "md_plugin.kernels.triton_gpu",
    "cupy": "md_plugin.kernels.cupy_gpu",
    "numba_cuda": "md_plugin.kernels.numba_cuda",
}
AUTO_ORDER = {"cuda": ("triton", "cupy", "numba_cuda", "torch"), "cpu": ("numba", "torch")}
# Those for GPUs -> the variable of the environment that runs them slowly on the CPU, for tests.
SIMULATORS = {"triton": "TRITON_INTERPRET", "cupy": "", "numba_cuda": "NUMBA_ENABLE_CUDASIM"}
INSTALL = {"triton": "'md-plugin[gpu]'", "cupy": "cupy-cuda12x, or cupy-cuda13x for CUDA 13"}
ENVIRONMENT_VARIABLE = "MD_PLUGIN_BACKEND"

_block: ContextVar[str | None] = ContextVar("md_plugin_backend", default=None)


class BackendError(RuntimeError):
    """A backend is unknown, absent, unfit for a device, or computes wrong sums."""


@dataclass(frozen=True)
class Backend:
    """The three differentiable sums of one backend.

    Attributes:
        name: "torch", "numba", "triton", "cupy" or "numba_cuda".
        devices: device types that it computes on.
        kernels: the raw sums, without autograd.
    """

    name: str
    devices: tuple[str, ...]
    kernels: SumKernels

    def envsum(self, sense: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
        """(n_pair, n_nu), (n_send, n_feat) -> env (n_recv, n_nu, n_feat); any derivative."""
        self._ready("envsum", sense, features, pairs)
        env: Tensor = EnvSum.apply(self.kernels, sense, features, pairs)
        return env

    def sensesum(self, env: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
        """(n_recv, n_nu, n_feat), (n_send, n_feat) -> sense (n_pair, n_nu); any derivative."""
        self._ready("sensesum", env, features, pairs)
        sense: Tensor = SenseSum.apply(self.kernels, env, features, pairs)
        return sense

    def featsum(self, env: Tensor, sense: Tensor, pairs: Pairs) -> Tensor:
        """(n_recv, n_nu, n_feat), (n_pair, n_nu) -> features (n_send, n_feat); any derivative."""
        self._ready("featsum", env, sense, pairs)
        features: Tensor = FeatSum.apply(self.kernels, env, sense, pairs)
        return features

    def stack(self, components: Tensor, sense: Tensor) -> Tensor:
        """(n_pair, n_comp), (n_pair, n_nu) -> (n_pair, n_comp n_nu); any derivative."""
        self_check(self, sense.device.type, "products")
        stacked: Tensor = Stack.apply(self.kernels, components, sense)
        return stacked

    def sensitivity(self, r: Tensor, mu: Tensor, sigma: Tensor, cutoff: Cutoff) -> Tensor:
        """(n_pair,), (n_nu,), (n_nu,), Å -> sense (n_pair, n_nu); any derivative."""
        check_radial(r, mu, sigma)
        if self.kernels.sensitivity is radial_reference.sensitivity:
            return radial_reference.sensitivity(r, mu, sigma, cutoff)
        self_check(self, r.device.type, "sensitivities")
        sense: Tensor = Sensitivity.apply(self.kernels, r, mu, sigma, cutoff)
        return sense

    def _ready(self, name: str, first: Tensor, second: Tensor, pairs: Pairs) -> None:
        check_shapes(name, first, second, pairs)
        self_check(self, pairs.device.type)

    def __repr__(self) -> str:
        return f"Backend({self.name!r}, devices={self.devices})"


def list_backends() -> dict[str, str]:
    """Name of each backend -> "" where it is available, else the reason why it is absent."""
    return {name: _absence(name) for name in BACKENDS}


def get_backend(name: str, device: torch.device | str = "cpu") -> Backend:
    """The backend of that name.

    Args:
        name: "torch", "numba", "triton", "cupy", "numba_cuda" or "auto".
        device: for "auto" only: the device that the sums will run on.

    Raises:
        BackendError: unknown or absent; the message lists what exists and why the rest does not.
    """
    if name == "auto":
        return _auto(torch.device(device).type)
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}. {inventory(list_backends())}")
    if _absence(name):
        raise BackendError(
            f"backend {name!r} is not available: {_absence(name)}. {inventory(list_backends())}"
        )
    return _load(name)


def backend_choice(explicit: str | None = None) -> str:
    """The name that a new model holds: explicit, block, environment, settings file or "auto"."""
    choice = explicit or _block.get() or os.environ.get(ENVIRONMENT_VARIABLE) or _settings_choice()
    choice = choice or "auto"
    if choice != "auto":
        get_backend(choice)
    return choice


def resolve(call: str | None, model: str | None, device: torch.device) -> Backend:
    """The backend of one call: the call's own choice, else the block's, else the model's.

    Without a model, the environment and the settings file are asked at each call.
    """
    return get_backend(call or _block.get() or model or backend_choice(), device)


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Every call and every new model inside the block uses this backend.

    Raises:
        BackendError: at once, where the backend is unknown or absent.
    """
    backend = get_backend(name)
    token = _block.set(name)
    try:
        yield backend
    finally:
        _block.reset(token)


def self_check(backend: Backend, device: str, family: str = "sums") -> None:
    """Compare kernels with the reference on a tiny problem, once per device and process.

    Args:
        backend: whose kernels; those of "torch" are the reference.
        device: where.
        family: "sums", "products" or "sensitivities".

    Raises:
        BackendError: it does not compute on this device, or a kernel is wrong.
    """
    if backend.name != "torch":
        # A kernel may have another form where torch is asked for a fixed order of additions.
        _self_check(backend, device, family, torch.are_deterministic_algorithms_enabled())


@cache
def _self_check(backend: Backend, device: str, family: str, _deterministic: bool) -> None:
    if device not in backend.devices:
        raise BackendError(
            f"backend {backend.name!r} computes on {' and '.join(backend.devices)}, "
            f"not on {device}; choose backend='auto' or another device"
        )
    for dtype in (torch.float32, torch.float64):
        for name, got, want in FAMILIES[family](backend.kernels, device, dtype):
            # Sums of at most 84 products of order one: 64 roundings of the largest are generous.
            atol = 64 * torch.finfo(dtype).eps * float(want.abs().max())
            if not torch.allclose(got.double(), want, rtol=0.0, atol=atol):
                raise BackendError(
                    f"backend {backend.name!r} computes a wrong {name} in {dtype} on {device} "
                    f"(largest difference {float((got - want).abs().max()):.1e}); "
                    "do not use it on this machine, and report this with your versions"
                )


@cache
def _load(name: str) -> Backend:
    module: Any = import_module(BACKENDS[name])
    # A backend without products of its own takes the reference's, which run on any device.
    names = [f.name for f in fields(SumKernels) if hasattr(module, f.name)]
    kernels = SumKernels(**{name: getattr(module, name) for name in names})
    devices: tuple[str, ...] = getattr(module, "DEVICES", ("cpu", "cuda"))
    return Backend(name, devices, kernels)


@cache
def _absence(name: str) -> str:
    if name == "torch":
        return ""
    return absence(name, lambda: _load(name))


def absence(name: str, load: Callable[[], object], extra: str = "") -> str:
    """Why kernels that need a package cannot be had; "" where they can.

    Args:
        name: of the backend, which is that of the package that it imports; "_cuda" is left out.
        load: imports them.
        extra: of this project that installs the package; its own name where empty.
    """
    package = name.removesuffix("_cuda")
    if find_spec(package) is None:
        wanted = f"'md-plugin[{extra}]'" if extra else INSTALL.get(package, package)
        return f"the package {package} is not installed (pip install {wanted})"
    if name in SIMULATORS and not (torch.cuda.is_available() or _simulated(name)):
        variable = SIMULATORS[name]
        hint = f" ({variable}=1 runs it slowly on the CPU, for tests)" if variable else ""
        return f"no CUDA device was found{hint}"
    try:
        load()
    except Exception as error:  # a broken installation is a reason, told in full
        return f"importing it failed: {type(error).__name__}: {error}"
    return ""


def triton_interpreted() -> bool:
    """Whether the environment asks for Triton's interpreter."""
    return _simulated("triton")


def _simulated(name: str) -> bool:
    return os.environ.get(SIMULATORS[name], "").lower() in ("1", "true", "on", "yes")


def inventory(state: Mapping[str, str]) -> str:
    """A sentence of what `list_backends` says."""
    present = ", ".join(name for name, reason in state.items() if not reason)
    absent = "; ".join(f"{name}: {reason}" for name, reason in state.items() if reason)
    return f"Available: {present}." + (f" Absent: {absent}." if absent else "")


@cache
def _auto(device: str) -> Backend:
    for name in AUTO_ORDER.get(device, ("torch",)):
        if not _absence(name) and device in _load(name).devices:
            logger.info("backend 'auto' chose %r on %s", name, device)
            return _load(name)
    raise AssertionError("unreachable: the torch reference is always there")


def _settings_choice() -> str | None:
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    for path in (Path("md_plugin.toml"), Path(config) / "md_plugin" / "settings.toml"):
        if path.is_file():
            try:
                choice = tomllib.loads(path.read_text()).get("backend")
            except tomllib.TOMLDecodeError as error:
                raise BackendError(f"settings file {path} is not valid TOML: {error}") from error
            if choice is not None:
                return str(choice)
    return None
