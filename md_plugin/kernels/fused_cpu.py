"""One interaction layer on the CPU, fused: from positions, and nothing per pair is ever stored.

    r_p      = x[sender(p)] + translation(p) - x[receiver(p)]  subtracted in float64, then rounded
    s_nu(r)  = exp(-(sigma_nu (1/r - 1/mu_nu))^2 / 2) cos^2(pi r / (2 rcut)),   0 from rcut on

    forward          env[i, nu, a]   = sum_p s_nu(r_p) z[sender(p), a]
    backward         forces, virial, dE/dz from dE/denv

    F[i] += g_p        F[j] -= g_p        virial -= r_p (x) g_p        g_p = dE/dr_p

A receiver's row of pairs is the unit of work: its radial functions are computed on the way.
Receivers come in blocks, begin .. begin + n_block - 1, so that the tiles of a block stay in cache.

`fused_radial` makes the tables of sensitivities; `fused_row` reads and sorts a row, `fused_tiles`
computes its radial functions, `fused_scalar` sums, `fused_forces` ends a row; `fused_rows` is what
numba compiles. With one thread numba's threads are never started.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from md_plugin.kernels import fused_rows as rows
from md_plugin.kernels.fused_forces import N_SUM
from md_plugin.kernels.fused_radial import RadialTable

__all__ = [
    "Geometry",
    "Gradients",
    "RadialTable",
    "aligned_zeros",
    "backward",
    "forward",
    "geometry",
]


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
    """What every kernel reads. Indices are not checked.

    Args:
        x: (n_send, 3) float64 positions, ghosts after the receivers.
        row_ptr: (n_recv + 1,) int32, rows of the pairs.
        sender: (n_pair,) int32; pairs beyond rcut are skipped.
        translation: (n_pair,) int16, row of `translations` that is added to each sender.
        translations: (n_translation, 3) float64 lattice translations.
        species: (n_send,) int32 index of the species, for a first layer only.
    """
    return Geometry(
        _four(x),
        np.ascontiguousarray(row_ptr, np.int32),
        np.ascontiguousarray(sender, np.int32),
        _contiguous(translation, np.int16),
        _four(np.zeros((1, 3)) if translations is None else translations),
        _contiguous(species, np.int32),
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

    Attributes:
        forces: (n_thread, n_send, 4) float64, the fourth unused.
        messages: (n_thread, n_send, n_feat), dE/dz.
        virials: (n_thread, 10) float64, the virial row by row and the smallest r^2 met.
    """

    def __init__(self, n_send: int, n_feat: int, dtype: type = np.float32, n_thread: int = 1):
        self.forces = np.zeros((n_thread, n_send, 4))
        self.messages = aligned_zeros((n_thread, n_send, n_feat), dtype)
        self.virials = np.zeros((n_thread, N_SUM))
        self.virials[:, -1] = np.inf

    def total(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Forces (n_send, 3), dE/dz (n_send, n_feat) and virial (3, 3)."""
        virial = self.virials.sum(axis=0)[:9].reshape(3, 3)
        forces = self.forces.sum(axis=0)[:, :3]
        if len(self.messages) == 1:
            return forces, self.messages[0], virial
        return forces, self.messages.sum(axis=0), virial

    @property
    def closest(self) -> float:
        """Distance of the closest pair within the cutoff; infinite where there is none."""
        return math.sqrt(self.virials[:, -1].min())


def forward(
    where: Geometry,
    table: RadialTable,
    z: np.ndarray | None,
    env: np.ndarray,
    begin: int = 0,
    n_thread: int = 1,
) -> None:
    """Write env (n_block, n_nu, n_feat) of receivers begin .. begin + n_block - 1.

    z (n_send, n_feat) is None in a one-hot first layer: n_feat is then the number of species.

    Raises:
        TypeError: an array is not of the table's dtype.
        ValueError: an array is not C-contiguous, or too small.
    """
    _check(where, table, env, begin, table.n_nu)
    end = begin + len(env)
    if z is None:
        _check_species(where)
        if n_thread == 1:
            rows.forward_species_range(table.arrays, tuple(where), env, begin, begin, end)
        else:
            rows.forward_species_threads(table.arrays, tuple(where), env, begin, n_thread)
        return
    _check_senders(where, table, z, env.shape[2:])
    if n_thread == 1:
        rows.forward_range(table.arrays, tuple(where), z, env, begin, begin, end)
    else:
        rows.forward_threads(table.arrays, tuple(where), z, env, begin, n_thread)


def backward(
    where: Geometry,
    table: RadialTable,
    z: np.ndarray | None,
    ge: np.ndarray,
    gradients: Gradients,
    begin: int = 0,
) -> None:
    """Add what ge = dE/denv (n_block, n_nu, n_feat) of a block gives to forces, dE/dz, virial.

    Raises:
        TypeError: an array is not of the table's dtype.
        ValueError: an array is not C-contiguous, or too small.
    """
    _check(where, table, ge, begin, table.n_nu)
    g, end, one = gradients, begin + len(ge), len(gradients.forces) == 1
    given = table.arrays, tuple(where)
    if z is None:
        _check_species(where)
        if one:
            rows.backward_species_range(*given, ge, g.forces[0], g.virials[0], begin, begin, end)
        else:
            rows.backward_species_threads(*given, ge, g.forces, g.virials, begin)
        return
    _check_senders(where, table, z, ge.shape[2:])
    _check_senders(where, table, g.messages[0], ge.shape[2:])
    if one:
        sums = g.forces[0], g.messages[0], g.virials[0]
        rows.backward_range(*given, z, ge, *sums, begin, begin, end)
    else:
        rows.backward_threads(*given, z, ge, g.forces, g.messages, g.virials, begin)


def _check(where: Geometry, table: RadialTable, mine: np.ndarray, begin: int, width: int) -> None:
    """Of an array with a tile (width, n_feat) for each receiver of a block."""
    _check_array(table, mine)
    if mine.ndim != 3 or mine.shape[1] != width:
        raise ValueError(f"an array of a block has shape {mine.shape}, not (n_block, {width}, ...)")
    if not 0 <= begin <= begin + len(mine) <= len(where.row_ptr) - 1:
        raise ValueError(
            f"receivers {begin} .. {begin + len(mine) - 1}, but there are {len(where.row_ptr) - 1}"
        )


def _check_senders(
    where: Geometry, table: RadialTable, sent: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Of an array with features of each sender."""
    _check_array(table, sent)
    if sent.shape != (len(where.x), *shape):
        raise ValueError(f"features of senders have shape {sent.shape}, not {len(where.x), *shape}")


def _check_species(where: Geometry) -> None:
    if len(where.species) != len(where.x):
        raise ValueError(f"{len(where.species)} species of {len(where.x)} atoms")


def _check_array(table: RadialTable, array: np.ndarray) -> None:
    if array.dtype != table.dtype:
        raise TypeError(f"an array is {array.dtype}, the table of sensitivities {table.dtype}")
    if not array.flags.c_contiguous:
        raise ValueError("an array is not C-contiguous")
