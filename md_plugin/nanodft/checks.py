"""What is computed and how (`Settings`), and the refusal of what cannot be.

Each refusal is one sentence that says what is wrong and what is supported, before any integral is
made. Settings are checked when they are made, molecules when they arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from md_plugin.devices import choose_device
from md_plugin.nanodft.errors import UnsupportedSystem
from md_plugin.nanodft.functionals import get_functional
from md_plugin.nanodft.grid import check_level
from md_plugin.nanodft.integrals import get_backend

CLOSEST = 0.1  # Å; no two nuclei of a molecule are nearer


@dataclass(frozen=True)
class Settings:
    """A method of computation.

    Attributes:
        charge: of the molecule, in elementary charges.
        xc: "hf", "svwn" (Slater, VWN5), "b3lyp" (with VWN's RPA fit) or "b3lyp5" (with VWN5).
        basis: "sto-3g", "6-31g", or another set of s and p shells that PySCF knows.
        grid_level: 0 to 9, PySCF's; below 3 energies depend visibly on the orientation.
        grid_response: forces are the exact derivative of the energy on its moving grid.
        device: "cpu", "cuda", "cuda:1" ..., or "auto".
        backend: of the two-electron integrals: "auto", "torch", "numba", "triton" or "libcint".
        conv_tol: largest change of the energy in the last cycle, Ha.
        conv_tol_grad: largest element of the orbital gradient, Ha.
        max_cycle: Fock matrices at most.
        max_memory_mb: bound for integrals and grid tables, MB of 10^6 bytes.

    Raises:
        ValueError: a setting is unknown or out of range, or the device is absent.
        BackendError: the backend is unknown, absent or unfit for the device.
    """

    charge: int = 0
    xc: str = "b3lyp"
    basis: str = "6-31g"
    grid_level: int = 3
    grid_response: bool = True
    device: str | torch.device = "cpu"
    backend: str = "auto"
    conv_tol: float = 1e-10
    conv_tol_grad: float = 1e-7
    max_cycle: int = 60
    max_memory_mb: float = 1024

    def __post_init__(self) -> None:
        if not _is_integer(self.charge):
            raise ValueError(f"charge must be an integer, got {self.charge!r}")
        get_functional(self.xc)
        if not isinstance(self.basis, str):
            raise ValueError(f"basis must be the name of a basis set, got {self.basis!r}")
        check_level(self.grid_level)
        if not isinstance(self.grid_response, bool):
            raise ValueError(f"grid_response must be True or False, got {self.grid_response!r}")
        get_backend(self.backend, choose_device(self.device))
        for name in ("conv_tol", "conv_tol_grad", "max_memory_mb"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < float(value) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not _is_integer(self.max_cycle) or self.max_cycle < 1:
            raise ValueError(f"max_cycle must be a positive integer, got {self.max_cycle!r}")

    @property
    def method(self) -> str:
        """What was computed, such as "b3lyp/6-31g, grid level 3, charge 1"."""
        name = f"{self.xc.lower()}/{self.basis.lower()}"
        charge = f", charge {self.charge}" if self.charge else ""
        if get_functional(self.xc).density_functional is None:
            return name + charge
        without = "" if self.grid_response else ", no grid response"
        return f"{name}, grid level {self.grid_level}{without}{charge}"


def _is_integer(value: Any) -> bool:
    """Whether it is an integer; True and False are answers to another question."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_numbers(numbers: ArrayLike) -> tuple[int, ...]:
    """(n_atom,) atomic numbers as integers.

    Raises:
        ValueError: no atoms, not a list of integers, dummy or ghost atoms.
    """
    array = np.asarray(numbers)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(
            f"numbers must be a list of integers, got shape {array.shape} of {array.dtype}"
        )
    if not array.size:
        raise ValueError("there are no atoms")
    if (array < 1).any():
        k = int(np.argmax(array < 1))
        raise ValueError(
            f"atom {k} has atomic number {array[k]}: dummy and ghost atoms are not supported"
        )
    return tuple(array.tolist())


def check_positions(positions: Any, n_atom: int) -> NDArray[np.float64]:
    """(n_atom, 3) positions in Å.

    Raises:
        ValueError: wrong shape, no real numbers, not finite, atoms at the same place, or a tensor
            with a graph.
    """
    if isinstance(positions, torch.Tensor):
        if positions.requires_grad:
            raise ValueError(
                "positions require a gradient, but nothing here is differentiable by autograd: "
                "take forces from the result and pass positions.detach()"
            )
        positions = positions.cpu().numpy()
    try:
        x = np.asarray(positions).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError) as error:
        raise ValueError(f"positions must be real numbers in Å: {error}") from error
    if x.shape != (n_atom, 3):
        raise ValueError(f"positions have shape {x.shape}, but {n_atom} atoms need ({n_atom}, 3)")
    if not np.isfinite(x).all():
        raise ValueError(
            f"positions are not finite: atom {int(np.argmin(np.isfinite(x).all(1)))} is at "
            f"{x[~np.isfinite(x).all(1)][0].tolist()} Å"
        )
    i, j = np.triu_indices(n_atom, 1)
    apart = np.linalg.norm(x[i] - x[j], axis=1)
    if (apart < CLOSEST).any():
        k = int(np.argmin(apart))
        raise ValueError(f"atoms {i[k]} and {j[k]} are {apart[k]:.3f} Å apart (limit {CLOSEST} Å)")
    return x


def count_pairs(numbers: tuple[int, ...], charge: int) -> int:
    """Electron pairs of a closed shell.

    Raises:
        UnsupportedSystem: an odd number of electrons, or none.
    """
    n_electron = sum(numbers) - charge
    if n_electron < 1 or n_electron % 2:
        raise UnsupportedSystem(
            f"{n_electron} electrons (charge {charge}) are no closed shell; supported are even "
            "positive numbers of electrons"
        )
    return n_electron // 2


def check_density(dm: Any, n_ao: int) -> torch.Tensor:
    """A density matrix to start from, (n_ao, n_ao) float64.

    Raises:
        ValueError: no matrix, wrong shape or dtype, not finite, or not symmetric.
    """
    try:
        tensor = torch.as_tensor(dm)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"dm0 must be a matrix: {error}") from error
    if tensor.shape != (n_ao, n_ao) or tensor.dtype != torch.float64:
        raise ValueError(
            f"dm0 is {tuple(tensor.shape)} of {tensor.dtype}, but must be ({n_ao}, {n_ao}) of "
            "torch.float64"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError("dm0 is not finite")
    if not torch.allclose(tensor, tensor.T, rtol=0.0, atol=1e-8 * float(tensor.abs().max())):
        raise ValueError("dm0 is not symmetric, as density matrices are")
    return tensor.detach()
