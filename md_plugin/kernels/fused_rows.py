"""The fused kernels compiled by numba; `fused_cpu` calls them.

Each works on receivers first .. last - 1 of a block that starts with receiver `begin`.
"""

from __future__ import annotations

import numpy as np

from md_plugin.kernels.compiled import compiled
from md_plugin.kernels.fused_radial import N_BIN, NU_BLOCK
from md_plugin.kernels.fused_row import AHEAD, FILES, PAD, SENSE
from md_plugin.kernels.fused_scalar import (
    backward_rows,
    backward_species_rows,
    forward_rows,
    forward_species_rows,
)

_jit = compiled(FILES)
_LINE = 64  # bytes of the widest vector


@_jit
def space_of(table, where, span, layer, rows, n_key, by_species):  # type: ignore[no-untyped-def]
    """Work space of one thread, and sizes: see Row.

    span: first and last + 1 of its rows; layer: n_nu, n_feat; rows: of sensitivities, of `part`.
    """
    gaussian, row_ptr, kind = table[0], where[1], table[0].dtype
    longest = 0
    for i in range(span[0], span[1]):
        longest = max(longest, row_ptr[i + 1] - row_ptr[i])
    capacity = (longest + 2 * PAD + AHEAD) // PAD * PAD
    floats = np.zeros((SENSE + rows[0], capacity), kind)
    integers = np.zeros((2, capacity), np.int32)
    records = np.zeros((2, capacity, 4), kind)
    starts = np.zeros(n_key + 3, np.int32)
    part = np.zeros((rows[1], capacity, _LINE // gaussian.itemsize), kind)
    work = floats, integers, records, starts, part
    shifted = len(where[3])
    return work + (gaussian.shape[1], layer[0], layer[1], n_key, capacity, shifted, by_species)


@_jit
def forward_range(table, where, z, env, begin, first, last):  # type: ignore[no-untyped-def]
    """Write env."""
    space = space_of(table, where, (first, last), env.shape[1:], (NU_BLOCK, 0), N_BIN, 0)
    forward_rows(table, where, space, (z, env, begin, first, last))


@_jit
def backward_range(table, where, z, ge, dz, target, begin, first, last):  # type: ignore[no-untyped-def]
    """Add to dz and the target: forces, sums, virials of atoms."""
    n_row = 2 * ge.shape[1], 1
    space = space_of(table, where, (first, last), ge.shape[1:], n_row, N_BIN, 0)
    wanted = (len(target[2]),)
    backward_rows(table, where, space, target + wanted, (z, ge, dz, begin, first, last))


@_jit
def forward_species_range(table, where, env, begin, first, last):  # type: ignore[no-untyped-def]
    """Write env of one-hot features."""
    n_key = N_BIN * env.shape[2]
    space = space_of(table, where, (first, last), env.shape[1:], (0, 0), n_key, 1)
    forward_species_rows(table, where, space, (env, begin, first, last))


@_jit
def backward_species_range(table, where, ge, target, begin, first, last):  # type: ignore[no-untyped-def]
    """Add to the target: forces, sums, virials of atoms."""
    n_key = N_BIN * ge.shape[2]
    space = space_of(table, where, (first, last), ge.shape[1:], (0, 0), n_key, 1)
    wanted = (len(target[2]),)
    backward_species_rows(table, where, space, target + wanted, (ge, begin, first, last))
