"""Hermite Coulomb integrals on the CPU, compiled by numba: what both two-electron kernels share.

A kernel gives one pair of shells, the bra, to one task, which meets all kets in blocks of `WIDTH`
pairs of primitives. Whatever is done to a block is a loop over its contiguous last axis, which LLVM
turns into vector instructions; a block is filled from several pairs of shells, so that the vectors
are full also where contractions are short. Nothing is shared between tasks: no atomics, and memory
is linear in the number of pairs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from md_plugin.kernels.compiled import compiled
from md_plugin.nanodft import boys
from md_plugin.nanodft.boys import TABLE_END, TABLE_STEP

WIDTH = 32
# What `numba_eri` and `numba_gradient` compile holds this file's functions and the table's numbers.
_FILES = (Path(__file__), Path(boys.__file__))
# Sums may be reordered, or they are not vectorised.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
jit = compiled(_FILES, fastmath=_FAST)
parallel_jit = compiled(_FILES, fastmath=_FAST, parallel=True)

_PER_STEP = 1.0 / TABLE_STEP
_LAST = round(TABLE_END / TABLE_STEP)
_THETA = 2.0 * math.pi**2.5


class Pairs(NamedTuple):
    """Pairs of one class, as the kernels read them.

    start (n_pair + 1,), ao (n_pair, n_prod, 2), weight (n_pair,), exponent (n_prim,), centre
    (3, n_prim), expansion (n_prod, n_hermite, n_prim), bound (n_prim,) about the square root of a
    primitive pair's own repulsion, total (n_pair,) its sum over each pair, terms (n_prod, 5) the
    number of Hermite indices with a coefficient and which, padded with the last.
    """

    start: np.ndarray
    ao: np.ndarray
    weight: np.ndarray
    exponent: np.ndarray
    centre: np.ndarray
    expansion: np.ndarray
    bound: np.ndarray
    total: np.ndarray
    terms: np.ndarray


class Recursion(NamedTuple):
    """Constants of a class of bras and one of kets.

    order: of the Boys function; steps (n, 5) of the recursion of R; sums (n_bra, n_ket) numbers of
    h + h'; boys: the table.
    """

    order: int
    steps: np.ndarray
    sums: np.ndarray
    boys: np.ndarray


class Scratch(NamedTuple):
    """Work space of one task.

    ket (4, WIDTH): exponents and centres of a block; work (13, WIDTH): P - Q, T, -2 alpha, theta,
    exp(-T), then F_m; hermite (n_hermite, WIDTH): theta R.
    """

    ket: np.ndarray
    work: np.ndarray
    hermite: np.ndarray


@jit
def scratch(recursion):  # type: ignore[no-untyped-def]
    """Work space; unused places of a block hold something finite."""
    ket = np.ones((4, WIDTH))
    return Scratch(ket, np.empty((13, WIDTH)), np.empty((recursion.steps.shape[0] + 1, WIDTH)))


@jit
def take(ket, k, n, space):  # type: ignore[no-untyped-def]
    """Put a primitive pair of the ket at place n of the block."""
    space.ket[0, n] = ket.exponent[k]
    for axis in range(3):
        space.ket[1 + axis, n] = ket.centre[axis, k]


@jit
def _boys(order, argument, table, values, decay):  # type: ignore[no-untyped-def]
    """values[m, k] = F_m(argument[k]), decay[k] = exp(-argument[k]).

    A Taylor step from the table, (2 m - 1)!! / (2 T)^m sqrt(pi / T) / 2 beyond it, then downward.
    """
    for k in range(WIDTH):
        decay[k] = 0.5 / max(argument[k], 1.0)
        values[order, k] = math.sqrt(0.5 * math.pi * decay[k])
    for m in range(order):
        for k in range(WIDTH):
            values[order, k] *= (2 * m + 1) * decay[k]
    for k in range(WIDTH):
        t = argument[k]
        i = int(min(t * _PER_STEP + 0.5, _LAST))
        d = i * TABLE_STEP - t
        f = table[i, order + 5] + d * (1.0 / 6.0) * table[i, order + 6]
        f = table[i, order + 4] + d * (1.0 / 5.0) * f
        f = table[i, order + 3] + d * (1.0 / 4.0) * f
        f = table[i, order + 2] + d * (1.0 / 3.0) * f
        f = table[i, order + 1] + d * (1.0 / 2.0) * f
        f = table[i, order] + d * f
        e = 1.0 + d * (1.0 / 5.0) * (1.0 + d * (1.0 / 6.0))
        e = 1.0 + d * (1.0 / 3.0) * (1.0 + d * (1.0 / 4.0) * e)
        e = table[i, 13] * (1.0 + d * (1.0 + d * (1.0 / 2.0) * e))
        far = t > TABLE_END
        values[order, k] = values[order, k] if far else f
        decay[k] = 0.0 if far else e
    for m in range(order - 1, -1, -1):
        factor = 1.0 / (2 * m + 1)
        for k in range(WIDTH):
            values[m, k] = factor * (2.0 * argument[k] * values[m + 1, k] + decay[k])


@jit
def coulomb(bra, b, recursion, space):  # type: ignore[no-untyped-def]
    """space.hermite[h, k] = theta R_h(alpha, P_b - Q_k) for the kets of the block."""
    block, work, hermite = space.ket, space.work, space.hermite
    p = bra.exponent[b]
    x, y, z = bra.centre[0, b], bra.centre[1, b], bra.centre[2, b]
    for k in range(WIDTH):
        q = block[0, k]
        alpha = p * q / (p + q)
        dx, dy, dz = x - block[1, k], y - block[2, k], z - block[3, k]
        work[0, k], work[1, k], work[2, k] = dx, dy, dz
        work[3, k] = alpha * (dx * dx + dy * dy + dz * dz)
        work[4, k] = -2.0 * alpha
        work[5, k] = _THETA / (p * q * math.sqrt(p + q))
    order = recursion.order
    boys = work[7:]
    _boys(order, work[3], recursion.boys, boys, work[6])
    for m in range(order + 1):
        for k in range(WIDTH):
            boys[m, k] *= work[5, k]
            work[5, k] *= work[4, k]
    hermite[0] = boys[order]
    # In place: entries of one level replace those of the level above, highest order first.
    for m in range(order - 1, -1, -1):
        left = order - m
        for s in range((left + 1) * (left + 2) * (left + 3) // 6 - 2, -1, -1):
            number, axis, before, second, factor = recursion.steps[s]
            if factor:
                for k in range(WIDTH):
                    hermite[number, k] = (
                        work[axis, k] * hermite[before, k] + factor * hermite[second, k]
                    )
            else:
                for k in range(WIDTH):
                    hermite[number, k] = work[axis, k] * hermite[before, k]
        hermite[0] = boys[m]
