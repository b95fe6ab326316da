"""The gradient of the two-electron energy on the CPU, compiled by numba.

    G^mn_h'(k) = sum_kl Gamma_mnkl (-1)^h' E_h'^kl(k)         k: primitive pairs of the kets
    Y^mn_h     = sum_{k, h'} G^mn_h'(k) theta R_{h+h'}(k)     per primitive pair of the bra

`two_electron_torch` defines theta, R and E. Y is the derivative of the energy in the bra's E_h; the
derivative in its centre is E_h Y_{h+1}. The integrals are never there: G takes Gamma from the
density matrix on the fly.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from md_plugin.nanodft.numba_kernels import WIDTH, coulomb, jit, parallel_jit, scratch, take


@jit
def _gamma(bra, i, ket, j, dm, hyb, gamma):  # type: ignore[no-untyped-def]
    """gamma[kl, mn], the weights of both pairs included; returns its largest magnitude.

    Without exchange Gamma is a product, and the bra's factor is left out: one row, n_row = 1.
    """
    largest = 0.0
    weight = ket.weight[j]
    n_row = gamma.shape[1]
    for c in range(ket.ao.shape[1]):
        k, l = ket.ao[j, c, 0], ket.ao[j, c, 1]
        if hyb == 0.0:
            gamma[c, 0] = weight * dm[k, l]
            largest = max(largest, abs(gamma[c, 0]))
        else:
            for r in range(n_row):
                m, n = bra.ao[i, r, 0], bra.ao[i, r, 1]
                exchange = dm[m, k] * dm[n, l] + dm[m, l] * dm[n, k]
                value = dm[m, n] * dm[k, l] - 0.25 * hyb * exchange
                gamma[c, r] = weight * bra.weight[i] * value
                largest = max(largest, abs(gamma[c, r]))
    return largest


@jit
def _contract(weights, hermite, sums, gathered, out):  # type: ignore[no-untyped-def]
    """out[h, r] += sum_{h', k} weights[r, h' k] hermite[h + h', k], two h and four r at a time."""
    n_row, n = weights.shape
    for h in range(0, sums.shape[0], 2):
        for j in range(sums.shape[1]):
            one, two = sums[h, j], sums[h + 1, j]
            for k in range(WIDTH):
                gathered[0, j * WIDTH + k] = hermite[one, k]
                gathered[1, j * WIDTH + k] = hermite[two, k]
        if n_row == 1:
            a0 = b0 = 0.0
            for k in range(n):
                a0 += weights[0, k] * gathered[0, k]
                b0 += weights[0, k] * gathered[1, k]
            out[h, 0] += a0
            out[h + 1, 0] += b0
            continue
        for r in range(0, n_row, 4):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = 0.0
            for k in range(n):
                a, b = gathered[0, k], gathered[1, k]
                w0, w1, w2, w3 = (
                    weights[r, k], weights[r + 1, k], weights[r + 2, k], weights[r + 3, k]
                )  # fmt: skip
                a0, a1, a2, a3 = a0 + w0 * a, a1 + w1 * a, a2 + w2 * a, a3 + w3 * a
                b0, b1, b2, b3 = b0 + w0 * b, b1 + w1 * b, b2 + w2 * b, b3 + w3 * b
            out[h, r], out[h + 1, r] = out[h, r] + a0, out[h + 1, r] + b0
            out[h, r + 1], out[h + 1, r + 1] = out[h, r + 1] + a1, out[h + 1, r + 1] + b1
            out[h, r + 2], out[h + 1, r + 2] = out[h, r + 2] + a2, out[h + 1, r + 2] + b2
            out[h, r + 3], out[h + 1, r + 3] = out[h, r + 3] + a3, out[h + 1, r + 3] + b3


@jit
def _weigh(gamma, ket, k, n, weights):  # type: ignore[no-untyped-def]
    """weights[r, h' n] = sum_c gamma[c, r] E_h'^c(k) at place n."""
    weights[:, n::WIDTH] = 0.0
    for c in range(gamma.shape[0]):
        for s in range(ket.terms[c, 0]):
            h = ket.terms[c, s + 1]
            value = ket.expansion[c, h, k]
            for r in range(gamma.shape[1]):
                weights[r, h * WIDTH + n] += gamma[c, r] * value


@jit
def _meet(bra, i, limit, recursion, space, weights, gathered, out):  # type: ignore[no-untyped-def]
    """Y of the bra i from one block; primitives with a bound up to limit are left out."""
    for b in range(bra.start[i], bra.start[i + 1]):
        if bra.bound[b] > limit:
            coulomb(bra, b, recursion, space)
            _contract(weights, space.hermite, recursion.sums, gathered, out[b])


@jit
def gradient_rows(bra, ket, dm, hyb, threshold, recursion, out, first, step):  # type: ignore[no-untyped-def]
    """Add to Y, out (n_prim, n_hermite, n_row), for the bras first, first + step, ...

    The ket's expansion carries the sign (-1)^h'. dm has one more row and column of zeros. n_row is
    n_prod, or 1 without exchange: then Y is the potential of all kets, without the bra's factor of
    Gamma. Quartets of primitives whose part of the energy is under the threshold are left out.
    """
    n_row, n = out.shape[2], recursion.sums.shape[1] * WIDTH
    weights, gathered = np.empty((n_row, n)), np.empty((2, n))
    gamma = np.empty((ket.ao.shape[1], n_row))
    space = scratch(recursion)
    for i in range(first, len(bra.total), step):
        place, reach = 0, 0.0
        for j in range(len(ket.total)):
            largest = _gamma(bra, i, ket, j, dm, hyb, gamma)
            if bra.total[i] * largest * ket.total[j] <= threshold:
                continue
            for k in range(ket.start[j], ket.start[j + 1]):
                size = largest * ket.bound[k]
                if bra.total[i] * size > threshold:
                    take(ket, k, place, space)
                    _weigh(gamma, ket, k, place, weights)
                    place, reach = place + 1, max(reach, size)
                if place == WIDTH:
                    _meet(bra, i, threshold / reach, recursion, space, weights, gathered, out)
                    place, reach = 0, 0.0
        if place:
            for p in range(place, WIDTH):
                weights[:, p::WIDTH] = 0.0
            _meet(bra, i, threshold / reach, recursion, space, weights, gathered, out)


@parallel_jit
def gradient_threads(bra, ket, dm, hyb, threshold, recursion, out, n_thread):  # type: ignore[no-untyped-def]
    """`gradient_rows` of all bras, dealt out like cards."""
    for thread in prange(n_thread):
        gradient_rows(bra, ket, dm, hyb, threshold, recursion, out, thread, n_thread)
