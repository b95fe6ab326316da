"""Norms of vectors and quadrupoles of a tensor layer, and their gradient, each in one pass.

    out[i, b] = m[i, 0, b] + v[b] sqrt(|m[i, 1:4, b]|^2 + cusp) + w[b] sqrt(Q:Q + cusp)

Q is traceless and symmetric, stored as xx, xy, xz, yy, yz in m[i, 4:9]:
Q:Q = 2 (xx^2 + xy^2 + xz^2 + yy^2 + yz^2 + xx yy); see `md_plugin.model.interaction`. The loops
over features are plain: LLVM makes vector instructions of them.
"""

from __future__ import annotations

import numpy as np

from md_plugin.kernels.compiled import compiled

_jit = compiled((), fastmath={"contract"})


@_jit
def _forward(m, scales, cusp, out, slopes):  # type: ignore[no-untyped-def]
    n, _, n_feat = m.shape
    order = len(scales)
    for i in range(n):
        for b in range(n_feat):
            x, y, z = m[i, 1, b], m[i, 2, b], m[i, 3, b]
            norm = np.sqrt(x * x + y * y + z * z + cusp)
            out[i, b] = m[i, 0, b] + scales[0, b] * norm
            slopes[0, i, b] = scales[0, b] / norm
        if order == 2:
            for b in range(n_feat):
                xx, xy, xz, yy, yz = m[i, 4, b], m[i, 5, b], m[i, 6, b], m[i, 7, b], m[i, 8, b]
                half = xx * xx + xy * xy + xz * xz + yy * yy + yz * yz + xx * yy
                norm = np.sqrt(half + half + cusp)
                out[i, b] += scales[1, b] * norm
                slopes[1, i, b] = scales[1, b] / norm


@_jit
def _backward(m, slopes, g, gm):  # type: ignore[no-untyped-def]
    n, _, n_feat = m.shape
    order = len(slopes)
    for i in range(n):
        for b in range(n_feat):
            gm[i, 0, b] = g[i, b]
            t = g[i, b] * slopes[0, i, b]
            gm[i, 1, b], gm[i, 2, b], gm[i, 3, b] = t * m[i, 1, b], t * m[i, 2, b], t * m[i, 3, b]
        if order == 2:
            for b in range(n_feat):
                t = g[i, b] * slopes[1, i, b]
                xx, yy = m[i, 4, b], m[i, 7, b]
                gm[i, 4, b], gm[i, 7, b] = t * (xx + xx + yy), t * (yy + yy + xx)
                t += t
                gm[i, 5, b], gm[i, 6, b], gm[i, 8, b] = (
                    t * m[i, 5, b],
                    t * m[i, 6, b],
                    t * m[i, 8, b],
                )


def norms(m: np.ndarray, scales: np.ndarray, cusp: float) -> tuple[np.ndarray, np.ndarray]:
    """Sums of norms, and what `norms_gradient` needs.

    Args:
        m: (n, 4 | 9, n_feat), C-contiguous.
        scales: (1 | 2, n_feat), of vectors and of quadrupoles, in the dtype of m.
        cusp: added to the squares.

    Returns:
        out (n, n_feat) and slopes (1 | 2, n, n_feat), the scales over the norms.
    """
    n, _, n_feat = m.shape
    out, slopes = np.empty((n, n_feat), m.dtype), np.empty((len(scales), n, n_feat), m.dtype)
    _forward(m, scales, m.dtype.type(cusp), out, slopes)
    return out, slopes


def norms_gradient(m: np.ndarray, slopes: np.ndarray, g: np.ndarray) -> np.ndarray:
    """dE/dm (n, 4 | 9, n_feat) from g = dE/dout (n, n_feat)."""
    gm = np.empty_like(m)
    _backward(m, slopes, g, gm)
    return gm
