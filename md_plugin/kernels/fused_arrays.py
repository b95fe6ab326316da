"""What the fused kernels are given, positions and pairs, and what they find: gradients."""

from __future__ import annotations

import math
from copy import copy
from typing import NamedTuple

import numpy as np

from md_plugin.kernels.fused_forces import N_SUM


class Geometry(NamedTuple):
    """Positions and pairs as the kernels take them; see `geometry`."""

    x: np.ndarray
    row_ptr: np.ndarray
    sender: np.ndarray
    translation: np.ndarray
    translations: np.ndarray
    species: np.ndarray


def geometry(
    x: np.ndarray,
    row_ptr: np.ndarray,
    sender: np.ndarray,
    translation: np.ndarray | None = None,
    translations: np.ndarray | None = None,
    species: np.ndarray | None = None,
) -> Geometry:
    """What every kernel reads. Indices are not checked for how large they are.

    Args:
        x: (n_send, 3) float64 positions, ghosts after the receivers.
        row_ptr: (n_recv + 1,) int32, rows of the pairs.
        sender: (n_pair,) int32; pairs beyond rcut are skipped.
        translation: (n_pair,) int16, row of `translations` that is added to each sender.
        translations: (n_translation, 3) float64 lattice translations.
        species: (n_send,) int32 index of the species, for a first layer only.

    Raises:
        ValueError: a species has a negative index.
    """
    kinds = _contiguous(species, np.int32)
    if len(kinds) and kinds.min() < 0:
        raise ValueError(f"atom {int(kinds.argmin())} is of none of the species of the network")
    return Geometry(
        _four(x),
        np.ascontiguousarray(row_ptr, np.int32),
        np.ascontiguousarray(sender, np.int32),
        _contiguous(translation, np.int16),
        _four(np.zeros((1, 3)) if translations is None else translations),
        kinds,
    )


def _four(vectors: np.ndarray) -> np.ndarray:
    """(n, 3) -> (n, 4), so that one vector load takes a row."""
    padded = np.zeros((len(vectors), 4))
    padded[:, :3] = vectors
    return padded


def _contiguous(numbers: np.ndarray | None, dtype: type) -> np.ndarray:
    return np.empty(0, dtype) if numbers is None else np.ascontiguousarray(numbers, dtype)


def aligned_zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that start on a cache line: numpy's own arrays make every vector straddle two."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class Gradients:
    """What backward passes add to: one buffer per thread, summed at the end.

    Args:
        n_send: atoms, ghosts included.
        n_feat: numbers per atom of the layer's input; 0 for a first layer.
        dtype: of the network.
        n_thread: buffers; results are bitwise reproducible for a fixed number.
        per_atom: whether virials of atoms are wanted.

    Attributes:
        forces: (n_thread, n_send, 4) float64, the fourth unused.
        messages: (n_thread, n_send, n_feat), dE/dz.
        virials: (n_thread, 10) float64, the virial row by row and the smallest r^2 met.
        of_atoms: (n_thread, n_send, 3, 4) float64, half of each pair's virial to each of its atoms,
            the fourth column unused; (n_thread, 0, 3, 4) where they are not wanted.
    """

    def __init__(
        self,
        n_send: int,
        n_feat: int,
        dtype: type = np.float32,
        n_thread: int = 1,
        per_atom: bool = False,
    ):
        self.forces = np.zeros((n_thread, n_send, 4))
        self.messages = aligned_zeros((n_thread, n_send, n_feat), dtype)
        self.virials = np.zeros((n_thread, N_SUM))
        self.virials[:, -1] = np.inf
        self.of_atoms = np.zeros((n_thread, n_send if per_atom else 0, 3, 4))

    def part(self, t: int) -> Gradients:
        """The buffers of thread t alone."""
        one = copy(self)
        one.forces, one.messages = self.forces[t : t + 1], self.messages[t : t + 1]
        one.virials, one.of_atoms = self.virials[t : t + 1], self.of_atoms[t : t + 1]
        return one

    def target(self, t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the kernels of thread t add to, besides messages."""
        return self.forces[t], self.virials[t], self.of_atoms[t]

    def total(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Forces (n_send, 3), dE/dz (n_send, n_feat) and virial (3, 3)."""
        virial = self.virials.sum(axis=0)[:9].reshape(3, 3)
        forces = self.forces[..., :3].sum(axis=0)
        if len(self.messages) == 1:
            return forces, self.messages[0], virial
        return forces, self.messages.sum(axis=0), virial

    @property
    def atom_virials(self) -> np.ndarray:
        """(n_send, 3, 3) float64; no rows where they are not wanted."""
        atoms: np.ndarray = self.of_atoms[..., :3].sum(axis=0)
        return atoms

    @property
    def closest(self) -> float:
        """Distance of the closest pair within the cutoff; infinite where there is none."""
        return math.sqrt(self.virials[:, -1].min())
