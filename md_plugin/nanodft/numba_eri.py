"""Electron repulsion integrals on the CPU, compiled by numba.

    W^mn_h'(k) = sum_{bra primitives, h} E_h^mn theta R_{h+h'}(k)     k: primitive pairs of the kets
    (mn|kl)    = sum_{k, h'} W^mn_h'(k) (-1)^h' E_h'^kl(k)

`two_electron_torch` defines theta, R and E. Contracting the bra first leaves the long sums as
vector operations over the block of kets.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from md_plugin.nanodft.numba_kernels import WIDTH, coulomb, jit, parallel_jit, scratch, take


@jit
def _expand_bra(bra, b, hermite, sums, out):  # type: ignore[no-untyped-def]
    """out[r, h', k] += sum_h E_h^r hermite[h + h', k] of the bra's primitive b."""
    for r in range(out.shape[0]):
        n, h = bra.terms[r, 0], bra.terms[r, 1:]
        e0, e1 = bra.expansion[r, h[0], b], bra.expansion[r, h[1], b]
        e2, e3 = bra.expansion[r, h[2], b], bra.expansion[r, h[3], b] if n == 4 else 0.0
        for j in range(sums.shape[1]):
            s0, s1 = sums[h[0], j], sums[h[1], j]
            if n == 1:
                for k in range(WIDTH):
                    out[r, j, k] += e0 * hermite[s0, k]
            elif n == 2:
                for k in range(WIDTH):
                    out[r, j, k] += e0 * hermite[s0, k] + e1 * hermite[s1, k]
            else:
                s2, s3 = sums[h[2], j], sums[h[3], j]
                for k in range(WIDTH):
                    out[r, j, k] += (
                        e0 * hermite[s0, k] + e1 * hermite[s1, k]
                        + e2 * hermite[s2, k] + e3 * hermite[s3, k]
                    )  # fmt: skip


@jit
def _store(half, ket, place, rows, columns, mirror, packed):  # type: ignore[no-untyped-def]
    """Add sum_{h', k} half[r, h', k] E_h'^c(k) over a place (see `eri_rows`)."""
    k0, n0, count = place[1], place[2], place[3]
    for c in range(ket.terms.shape[0]):
        for r in range(half.shape[0]):
            row, column = rows[r], columns[c]
            if row >= 0 and column >= 0:
                total = 0.0
                for s in range(ket.terms[c, 0]):
                    h = ket.terms[c, s + 1]
                    for k in range(count):
                        total += half[r, h, n0 + k] * ket.expansion[c, h, k0 + k]
                packed[row, column] += total
                if mirror:
                    packed[column, row] += total


@jit
def _meet(bra, i, recursion, space, half):  # type: ignore[no-untyped-def]
    """half[r, h', k]: the bra i contracted, for the kets of a block."""
    half[:] = 0.0
    for b in range(bra.start[i], bra.start[i + 1]):
        coulomb(bra, b, recursion, space)
        _expand_bra(bra, b, space.hermite, recursion.sums, half)


@jit
def eri_rows(bra, ket, same, recursion, rows, columns, packed, first, step):  # type: ignore[no-untyped-def]
    """Add to packed (n, n) the integrals of the bras first, first + step, ... with all kets.

    The expansion of the ket carries the sign (-1)^h', that of the bra does not. same: both classes
    are one, and a bra meets kets up to itself. rows, columns (n_pair, n_prod): numbers of the
    products, -1 for one that is not wanted.
    """
    half = np.empty((bra.terms.shape[0], recursion.sums.shape[1], WIDTH))
    space = scratch(recursion)
    places = np.empty((WIDTH, 4), np.int64)  # ket, first primitive, place in the block, number
    for i in range(first, len(bra.total), step):
        last = i if same else len(ket.total) - 1
        n, n_place = 0, 0
        for j in range(last + 1):
            k, end = ket.start[j], ket.start[j + 1]
            while k < end or (n and j == last):
                count = min(WIDTH - n, end - k)
                for s in range(count):
                    take(ket, k + s, n + s, space)
                places[n_place, 0], places[n_place, 1] = j, k
                places[n_place, 2], places[n_place, 3] = n, count
                n_place, n, k = n_place + 1, n + count, k + count
                if n == WIDTH or (j == last and k == end):
                    _meet(bra, i, recursion, space, half)
                    for place in places[:n_place]:
                        column = columns[place[0]]
                        mirror = not (same and place[0] == i)
                        _store(half, ket, place, rows[i], column, mirror, packed)
                    n, n_place = 0, 0


@parallel_jit
def eri_threads(bra, ket, same, recursion, rows, columns, packed, n_thread):  # type: ignore[no-untyped-def]
    """`eri_rows` of all bras, dealt out like cards."""
    for thread in prange(n_thread):
        eri_rows(bra, ket, same, recursion, rows, columns, packed, thread, n_thread)
