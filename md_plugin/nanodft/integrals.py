"""Integrals of nanodft: one-electron matrices, electron repulsion, and its nuclear gradient.

    E_2 = 1/2 sum_ijkl D_ij D_kl (ij|kl) - hyb/4 sum_ijkl D_ik D_jl (ij|kl)

Everything takes positions in bohr, float64, of one geometry or of many, whose axes (...) come first
in the result, and gives Hartree in PySCF's spherical order. The one-electron integrals are torch,
and differentiable. The repulsion has backends:

    torch     own integrals on any device: the reference; its gradient is autograd, block by block
    numba     own integrals, fused kernels on the CPU
    triton    own integrals, fused kernels on CUDA
    libcint   PySCF's integrals and derivative integrals on the host, streamed in blocks
    auto      CPU: numba, torch where numba is absent; CUDA: triton, else torch

An explicit choice that cannot be met raises and says what exists. torch, numba and triton call no
libcint integral at all. The first use of a kernel on a device compares it with torch on H2 with
p functions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md_plugin.kernels.registry import BackendError, absence, inventory, triton_interpreted
from md_plugin.nanodft.basis import Basis, integers
from md_plugin.nanodft.one_electron import dipole, kinetic, nuclear, overlap

__all__ = [
    "BACKENDS",
    "dipole",
    "eri",
    "get_backend",
    "kinetic",
    "list_backends",
    "nuclear",
    "overlap",
    "two_electron_gradient",
]

logger = logging.getLogger("md_plugin")

BACKENDS = {
    "torch": "md_plugin.nanodft.two_electron_torch",
    "numba": "md_plugin.nanodft.two_electron_numba",
    "triton": "md_plugin.nanodft.triton_gpu",
    "libcint": "md_plugin.nanodft.two_electron_libcint",
}
AUTO_ORDER = {"cpu": ("numba", "torch"), "cuda": ("triton", "torch")}
DEVICES = {"torch": ("cpu", "cuda"), "numba": ("cpu",), "libcint": ("cpu", "cuda")}
ONE_BY_ONE = ("numba", "libcint")  # they take one geometry: on CPUs a call costs next to nothing
MB = 1_000_000


def list_backends() -> dict[str, str]:
    """Name of each backend -> "" where it is available, else the reason why it is absent."""
    return {name: _absence(name) for name in BACKENDS}


def get_backend(name: str, device: torch.device | str = "cpu") -> str:
    """The backend's name, "auto" resolved for a device.

    Raises:
        BackendError: unknown, absent, or unfit for the device; the message says what exists.
    """
    kind = torch.device(device).type
    if kind not in AUTO_ORDER:
        raise BackendError(f"nanodft computes on {' and '.join(AUTO_ORDER)}, not on {kind}")
    if name == "auto":
        return _auto(kind)
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}. {inventory(list_backends())}")
    if reason := _absence(name):
        raise BackendError(
            f"backend {name!r} is not available: {reason}. {inventory(list_backends())}"
        )
    if kind not in (devices := _devices(name)):
        raise BackendError(
            f"backend {name!r} computes on {' and '.join(devices)}, not on {kind}; "
            "choose backend='auto' or another device"
        )
    return name


def eri(
    numbers: Sequence[int] | np.ndarray | Tensor,
    positions: Tensor,
    basis: Basis | str,
    backend: str = "auto",
    *,
    max_memory_mb: float = 1024,
) -> Tensor:
    """Electron repulsion integrals (ij|kl), Mulliken's notation.

    Args:
        numbers: (n_atom,) atomic numbers.
        positions: (..., n_atom, 3) float64, bohr: one geometry, or many.
        basis: a Basis, or the name of a set.
        backend: "torch", "numba", "triton", "libcint" or "auto".
        max_memory_mb: bound on what is held at once, the result included.

    Returns:
        (..., n_ao, n_ao, n_ao, n_ao) in Hartree, on the device of the positions, without gradient.

    Raises:
        MemoryError: the result does not fit; raised before anything is allocated.
        BackendError: the backend cannot be had.
        ValueError, UnsupportedSystem: wrong positions; a basis that is not supported.
    """
    basis = _basis(numbers, basis)
    _check_positions(basis, positions)
    name = get_backend(backend, positions.device)
    n, many = basis.n_ao, math.prod(positions.shape[:-2])
    need = many * eri_bytes(n)
    if need > max_memory_mb * MB:
        raise MemoryError(
            f"the (ij|kl) of {n} basis functions need {need / MB:.0f} MB, "
            f"more than max_memory_mb = {max_memory_mb:g}; raise it or take a smaller molecule"
        )
    _self_check(name, positions.device.type)
    left = max(int(max_memory_mb * MB) - need, MB)
    return _unpacked(_of_all(name, "eri", basis, (positions.detach(),), left), n)


def eri_bytes(n_ao: int) -> int:
    """Memory that the (ij|kl) of a geometry take: they and the unique ones, they are made from."""
    return 8 * (n_ao**4 + (n_ao * (n_ao + 1) // 2) ** 2)


def two_electron_gradient(
    numbers: Sequence[int] | np.ndarray | Tensor,
    positions: Tensor,
    dm: Tensor,
    *,
    basis: Basis | str,
    hyb: float,
    backend: str = "auto",
    max_memory_mb: float = 1024,
) -> Tensor:
    """Gradient of E_2 in the nuclear positions at constant density matrix D.

    No array of derivative integrals exists: they are made and contracted in place.

    Args:
        numbers: (n_atom,) atomic numbers.
        positions: (..., n_atom, 3) float64, bohr: one geometry, or many.
        dm: (..., n_ao, n_ao) float64 symmetric density matrices, occupations included.
        basis: a Basis, or the name of a set.
        hyb: fraction of exact exchange; 0 skips exchange.
        backend: "torch", "numba", "triton", "libcint" or "auto".
        max_memory_mb: bound on intermediate arrays.

    Returns:
        (..., n_atom, 3) Ha/bohr, on the device of the positions.

    Raises:
        ValueError: wrong shapes or dtypes, a density matrix that is not symmetric, hyb < 0.
        BackendError: the backend cannot be had.
    """
    basis = _basis(numbers, basis)
    _check_positions(basis, positions)
    name = get_backend(backend, positions.device)
    expected = (*positions.shape[:-2], basis.n_ao, basis.n_ao)
    if dm.shape != expected or dm.dtype != torch.float64:
        raise ValueError(
            f"the density matrix is {tuple(dm.shape)} {dm.dtype}, not {expected} torch.float64"
        )
    # Roundings of an SCF are far below; a transposed factor or one triangle only is far above.
    if not torch.allclose(dm, dm.mT, rtol=0.0, atol=1e-8 * float(dm.abs().max())):
        raise ValueError("the density matrix is not symmetric")
    if not hyb >= 0.0:
        raise ValueError(f"hyb = {hyb} is no fraction of exact exchange")
    _self_check(name, positions.device.type)
    each = (positions.detach(), dm.detach().to(positions.device))
    limit = int(max_memory_mb * MB)
    return _of_all(name, "two_electron_gradient", basis, each, float(hyb), limit)


def _of_all(name: str, call: str, basis: Basis, each: tuple[Tensor, ...], *more: float) -> Tensor:
    """A backend's call for all geometries; each: positions and densities, two axes of each last."""
    function, many = getattr(_module(name), call), each[0].shape[:-2]
    if not many or name not in ONE_BY_ONE:
        result: Tensor = function(basis, *each, *more)
        return result
    rows = zip(*(tensor.flatten(0, -3) for tensor in each), strict=True)
    results = torch.stack([function(basis, *row, *more) for row in rows])
    return results.view(*many, *results.shape[1:])


def _unpacked(packed: Tensor, n: int) -> Tensor:
    """(..., n, n, n, n) from the integrals of unique products i >= j, row by row."""
    index = torch.arange(n, device=packed.device)
    high, low = torch.maximum(index[:, None], index), torch.minimum(index[:, None], index)
    product = high * (high + 1) // 2 + low
    many = packed.shape[:-2]
    values = packed.new_empty((*many, n, n, n, n))
    for i in range(n):
        rows = packed[..., product[i, : i + 1], :][..., product.flatten()]
        rows = rows.view(*many, i + 1, n, n)
        values[..., i, : i + 1, :, :] = rows
        values[..., :i, i, :, :] = rows[..., :i, :, :]
    return values


def _basis(numbers: Sequence[int] | np.ndarray | Tensor, basis: Basis | str) -> Basis:
    """The basis of that name, or the one given.

    Raises:
        ValueError: the one given is of other atoms.
    """
    if isinstance(basis, str):
        return Basis.build(numbers, basis)
    if (given := integers(numbers)) != basis.numbers:
        raise ValueError(f"the basis is of atoms {list(basis.numbers)}, not of {list(given)}")
    return basis


def _check_positions(basis: Basis, positions: Tensor) -> None:
    if not isinstance(positions, Tensor):
        raise ValueError(f"positions must be a torch.Tensor, got {type(positions).__name__}")
    if positions.shape[-2:] != (basis.n_atom, 3) or positions.dtype != torch.float64:
        raise ValueError(
            f"positions are {tuple(positions.shape)} {positions.dtype}, "
            f"not (..., {basis.n_atom}, 3) torch.float64"
        )
    if not bool(positions.isfinite().all()):  # kernels look T up in a table
        raise ValueError("positions are not finite")


@cache
def _self_check(name: str, kind: str) -> None:
    """Compare a backend's kernels with torch, once per device.

    Raises:
        BackendError: the gradient or an integral is wrong.
    """
    if name not in ("numba", "triton"):
        return
    basis = Basis.build((1, 1), "def2-svp")  # every class, and few primitives
    x = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.5, 2.8]], dtype=torch.float64, device=kind)
    index = torch.arange(basis.n_ao, dtype=torch.float64, device=kind)
    dm = torch.cos(torch.outer(index + 1, index + 1))  # symmetric, and nothing else
    wrong = []
    for call, arguments in (("eri", (basis, x)), ("two_electron_gradient", (basis, x, dm, 0.5))):
        got, want = (getattr(_module(n), call)(*arguments, 64 * MB) for n in (name, "torch"))
        # Screening leaves out 1e-11 of numbers of order one.
        wrong += [call] if not torch.allclose(got, want, rtol=0.0, atol=1e-9) else []
    if wrong:
        raise BackendError(
            f"backend {name!r} computes a wrong {' and '.join(wrong)} on {kind}; "
            "do not use it on this machine, and report this with your versions"
        )


def _module(name: str) -> Any:
    return import_module(BACKENDS[name])


def _devices(name: str) -> tuple[str, ...]:
    if name == "triton":
        return ("cuda", "cpu") if triton_interpreted() else ("cuda",)
    return DEVICES[name]


@cache
def _absence(name: str) -> str:
    if name == "libcint":
        return absence("pyscf", lambda: _module(name), extra="dft")
    return absence(name, lambda: _module(name))


@cache
def _auto(kind: str) -> str:
    for name in AUTO_ORDER[kind]:
        if not _absence(name) and kind in _devices(name):
            logger.info("nanodft's backend 'auto' chose %r on %s", name, kind)
            return name
    raise AssertionError("unreachable: torch is always there")
