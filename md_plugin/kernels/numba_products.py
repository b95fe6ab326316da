"""The product of sensitivities and tensor components, and what derives from it, by numba.

`*_range` computes pairs first .. last - 1 in one thread; `*_threads` shares the pairs out in
contiguous blocks. Equations: `reference`.
"""

from __future__ import annotations

from numba import prange

from md_plugin.kernels.compiled import compiled

# fastmath without nnan/ninf: a NaN in the input must come out as NaN, not as noise.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_jit, _parallel_jit = compiled((), fastmath=_FAST), compiled((), fastmath=_FAST, parallel=True)


@_jit
def stack_range(components, sense, stacked, first, last):  # type: ignore[no-untyped-def]
    """Write stacked[first:last]."""
    n_comp, n_nu = components.shape[1], sense.shape[1]
    for p in range(first, last):
        for c in range(n_comp):
            t = components[p, c]
            for nu in range(n_nu):
                stacked[p, c * n_nu + nu] = t * sense[p, nu]


@_jit
def fold_range(stacked, components, sense, to_components, to_sense, first, last):  # type: ignore[no-untyped-def]
    """Write to_components[first:last] and to_sense[first:last]."""
    n_comp, n_nu = components.shape[1], sense.shape[1]
    for p in range(first, last):
        to_sense[p] = 0.0
        for c in range(n_comp):
            t = components[p, c]
            total = sense.dtype.type(0.0)
            for nu in range(n_nu):
                g = stacked[p, c * n_nu + nu]
                total += g * sense[p, nu]
                to_sense[p, nu] += g * t
            to_components[p, c] = total


@_jit
def stack_along_range(components, sense, d_components, d_sense, stacked, first, last):  # type: ignore[no-untyped-def]
    """Write stacked[first:last]."""
    n_comp, n_nu = components.shape[1], sense.shape[1]
    for p in range(first, last):
        for c in range(n_comp):
            t, dt = components[p, c], d_components[p, c]
            for nu in range(n_nu):
                stacked[p, c * n_nu + nu] = t * d_sense[p, nu] + dt * sense[p, nu]


@_parallel_jit
def stack_threads(components, sense, stacked, n_thread):  # type: ignore[no-untyped-def]
    """Write stacked."""
    n = len(sense)
    for k in prange(n_thread):
        stack_range(components, sense, stacked, n * k // n_thread, n * (k + 1) // n_thread)


@_parallel_jit
def fold_threads(stacked, components, sense, to_components, to_sense, n_thread):  # type: ignore[no-untyped-def]
    """Write to_components and to_sense."""
    n = len(sense)
    for k in prange(n_thread):
        first, last = n * k // n_thread, n * (k + 1) // n_thread
        fold_range(stacked, components, sense, to_components, to_sense, first, last)


@_parallel_jit
def stack_along_threads(components, sense, d_components, d_sense, stacked, n_thread):  # type: ignore[no-untyped-def]
    """Write stacked."""
    n = len(sense)
    for k in prange(n_thread):
        first, last = n * k // n_thread, n * (k + 1) // n_thread
        stack_along_range(components, sense, d_components, d_sense, stacked, first, last)
