"""The fused kernels compiled by numba, for ranges of rows and for threads; `fused_cpu` calls them.

`*_range` works on receivers first .. last - 1 in one thread. `*_threads` shares a block of
receivers, the first of which is `begin`, out among numba's threads, in contiguous ranges; each
scatters into a buffer of its own, so that sums are in fixed order for a fixed number of buffers.
`source` is never given: see `fused_row.SOURCE`.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import prange

from md_plugin.kernels.fused_radial import N_BIN, NU_BLOCK
from md_plugin.kernels.fused_row import AHEAD, PAD, SENSE, SOURCE
from md_plugin.kernels.fused_scalar import (
    backward_rows,
    backward_species_rows,
    forward_rows,
    forward_species_rows,
)

_OPTIONS = {"cache": True, "error_model": "numpy", "nogil": True}
_jit, _parallel_jit = numba.njit(**_OPTIONS), numba.njit(parallel=True, **_OPTIONS)
_LINE = 64  # bytes of the widest vector


@_jit
def work_space(row_ptr, first, last, n_sense, n_key, n_part, kind, source=SOURCE):  # type: ignore[no-untyped-def]
    """Of one thread, see Row: floats, integers, records, starts, part."""
    longest = 0
    for i in range(first, last):
        longest = max(longest, row_ptr[i + 1] - row_ptr[i])
    capacity = (longest + 2 * PAD + AHEAD) // PAD * PAD
    floats = np.zeros((SENSE + n_sense, capacity), kind.dtype)
    integers = np.zeros((2, capacity), np.int32)
    records = np.zeros((2, capacity, 4), kind.dtype)
    part = np.zeros((n_part, capacity, _LINE // kind.itemsize), kind.dtype)
    return floats, integers, records, np.zeros(n_key + 3, np.int32), part


@_jit
def forward_range(table, where, z, env, begin, first, last, source=SOURCE):  # type: ignore[no-untyped-def]
    """Write env."""
    _, n_nu, n_feat = env.shape
    work = work_space(where[1], first, last, NU_BLOCK, N_BIN, 0, table[0])
    sizes = (table[0].shape[1], n_nu, n_feat, N_BIN, work[0].shape[1], len(where[3]), 0)
    forward_rows(table, where, work, sizes, (z, env, begin, first, last))


@_jit
def backward_range(table, where, z, ge, forces, dz, sums, begin, first, last, source=SOURCE):  # type: ignore[no-untyped-def]
    """Add to forces, dz and sums."""
    _, n_nu, n_feat = ge.shape
    work = work_space(where[1], first, last, 2 * n_nu, N_BIN, 1, table[0])
    sizes = (table[0].shape[1], n_nu, n_feat, N_BIN, work[0].shape[1], len(where[3]), 0)
    backward_rows(table, where, work, sizes, (z, ge, forces, dz, sums, begin, first, last))


@_jit
def forward_species_range(table, where, env, begin, first, last, source=SOURCE):  # type: ignore[no-untyped-def]
    """Write env of one-hot features."""
    _, n_nu, n_feat = env.shape
    n_key = N_BIN * n_feat
    work = work_space(where[1], first, last, 0, n_key, 0, table[0])
    sizes = (table[0].shape[1], n_nu, n_feat, n_key, work[0].shape[1], len(where[3]), 1)
    forward_species_rows(table, where, work, sizes, (env, begin, first, last))


@_jit
def backward_species_range(table, where, ge, forces, sums, begin, first, last, source=SOURCE):  # type: ignore[no-untyped-def]
    """Add to forces and sums."""
    _, n_nu, n_feat = ge.shape
    n_key = N_BIN * n_feat
    work = work_space(where[1], first, last, 0, n_key, 0, table[0])
    sizes = (table[0].shape[1], n_nu, n_feat, n_key, work[0].shape[1], len(where[3]), 1)
    backward_species_rows(table, where, work, sizes, (ge, forces, sums, begin, first, last))


@_jit
def part_of(begin, n_block, t, n_thread):  # type: ignore[no-untyped-def]
    """Rows of thread t: first and last + 1."""
    return begin + n_block * t // n_thread, begin + n_block * (t + 1) // n_thread


@_parallel_jit
def forward_threads(table, where, z, env, begin, n_thread, source=SOURCE):  # type: ignore[no-untyped-def]
    """Write env."""
    for t in prange(n_thread):
        first, last = part_of(begin, len(env), t, n_thread)
        forward_range(table, where, z, env, begin, first, last)


@_parallel_jit
def backward_threads(table, where, z, ge, forces, dz, sums, begin, source=SOURCE):  # type: ignore[no-untyped-def]
    """Add to forces[t], dz[t] and sums[t]."""
    for t in prange(len(forces)):
        first, last = part_of(begin, len(ge), t, len(forces))
        backward_range(table, where, z, ge, forces[t], dz[t], sums[t], begin, first, last)


@_parallel_jit
def forward_species_threads(table, where, env, begin, n_thread, source=SOURCE):  # type: ignore[no-untyped-def]
    """Write env of one-hot features."""
    for t in prange(n_thread):
        first, last = part_of(begin, len(env), t, n_thread)
        forward_species_range(table, where, env, begin, first, last)


@_parallel_jit
def backward_species_threads(table, where, ge, forces, sums, begin, source=SOURCE):  # type: ignore[no-untyped-def]
    """Add to forces[t] and sums[t]."""
    for t in prange(len(forces)):
        first, last = part_of(begin, len(ge), t, len(forces))
        backward_species_range(table, where, ge, forces[t], sums[t], begin, first, last)
