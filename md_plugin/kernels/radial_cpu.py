"""Sensitivities on the CPU with numba: value, slope and curvature, one pass over pairs each.

Pairs are cut into chunks of `CHUNK`, which threads share. Sums over pairs are taken in the dtype of
the network within `RUN` pairs, and in float64 across runs and chunks, in the order of the pairs:
results do not depend on the number of threads. Loops: `radial_kernels`. One thread calls them
directly; compiled code is cached on disk by numba.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numba import prange

from md_plugin.kernels.compiled import compiled
from md_plugin.kernels.radial_ir import CENTRE, MAX_LANES, N_ROW, SIGMA
from md_plugin.kernels.radial_kernels import curvature_kernel, slope_kernel, value_kernel
from md_plugin.kernels.radial_reference import Cutoff
from md_plugin.kernels.simd import flush_denormals, restore_denormals

CHUNK, RUN = 4096, 64
SCRATCH = (N_ROW + MAX_LANES, MAX_LANES)
# Of lanes beyond the last sensitivity: so far away that their Gaussian is zero.
_NOWHERE = -1e3

_FILES = ("simd", "vector_ir", "vector_math", "radial_ir", "radial_kernels")
_WRITERS = [Path(__file__).parent / f"{name}.py" for name in _FILES]
_jit, _parallel_jit = compiled(_WRITERS), compiled(_WRITERS, parallel=True)


@_jit
def _value(r, constants, table, sense, first, last):  # type: ignore[no-untyped-def]
    scratch = np.empty(SCRATCH, r.dtype)
    n, width = sense.shape[1], table.shape[1]
    state = flush_denormals()
    value_kernel((r, constants, table, scratch, sense, n, width, first, last))
    restore_denormals(state)


@_parallel_jit
def _value_threads(r, constants, table, sense):  # type: ignore[no-untyped-def]
    for chunk in prange((len(r) + CHUNK - 1) // CHUNK):
        first = chunk * CHUNK
        _value(r, constants, table, sense, first, min(first + CHUNK, len(r)))


@_jit
def _add(sums, totals):  # type: ignore[no-untyped-def]
    """Add sums to totals, and empty them."""
    for k in range(sums.shape[0]):
        for nu in range(sums.shape[1]):
            totals[k, nu] += sums[k, nu]
            sums[k, nu] = 0.0


@_jit
def _slope(r, constants, table, grad, grad_r, totals, trained, chunk):  # type: ignore[no-untyped-def]
    scratch, sums = np.empty(SCRATCH, r.dtype), np.zeros_like(table[:3])
    n, width = grad.shape[1], table.shape[1]
    end = min((chunk + 1) * CHUNK, len(r))
    state = flush_denormals()
    for first in range(chunk * CHUNK, end, RUN):
        last = min(first + RUN, end)
        common = (r, constants, table, scratch, grad, grad_r, sums)
        slope_kernel((*common, trained, n, width, first, last))
        _add(sums, totals[chunk])
    restore_denormals(state)


@_jit
def _slope_chunks(r, constants, table, grad, grad_r, totals, trained):  # type: ignore[no-untyped-def]
    for chunk in range(len(totals)):
        _slope(r, constants, table, grad, grad_r, totals, trained, chunk)


@_parallel_jit
def _slope_threads(r, constants, table, grad, grad_r, totals, trained):  # type: ignore[no-untyped-def]
    for chunk in prange(len(totals)):
        _slope(r, constants, table, grad, grad_r, totals, trained, chunk)


@_jit
def _curvature(r, rho, constants, table, grad, h, grad_r, totals, chunk):  # type: ignore[no-untyped-def]
    scratch, sums = np.empty(SCRATCH, r.dtype), np.zeros_like(table[:3])
    n, width = grad.shape[1], table.shape[1]
    end = min((chunk + 1) * CHUNK, len(r))
    state = flush_denormals()
    for first in range(chunk * CHUNK, end, RUN):
        last = min(first + RUN, end)
        common = (r, rho, constants, table, scratch, grad, h, grad_r, sums)
        curvature_kernel((*common, n, width, first, last))
        _add(sums, totals[chunk])
    restore_denormals(state)


@_jit
def _curvature_chunks(r, rho, constants, table, grad, h, grad_r, totals):  # type: ignore[no-untyped-def]
    for chunk in range(len(totals)):
        _curvature(r, rho, constants, table, grad, h, grad_r, totals, chunk)


@_parallel_jit
def _curvature_threads(r, rho, constants, table, grad, h, grad_r, totals):  # type: ignore[no-untyped-def]
    for chunk in prange(len(totals)):
        _curvature(r, rho, constants, table, grad, h, grad_r, totals, chunk)


Outputs = tuple[np.ndarray, np.ndarray]


class Gaussians:
    """Parameters of sensitivities in the form in which the kernels take them.

    Args:
        mu: (n_nu,) centres, Å.
        sigma: (n_nu,) inverse widths, Å.
        cutoff: where all ends.
        alpha: (n_nu,) of a direction; the curvature needs one.
        beta: (n_nu,) likewise.
    """

    def __init__(
        self,
        mu: np.ndarray,
        sigma: np.ndarray,
        cutoff: Cutoff,
        alpha: np.ndarray | None = None,
        beta: np.ndarray | None = None,
    ):
        n, dtype = len(mu), mu.dtype
        centre = 1.0 / mu.astype(np.float64)
        self.centre, self.sigma = centre, sigma.astype(np.float64)
        self.table = np.zeros((5, -(-n // MAX_LANES) * MAX_LANES), dtype)
        self.table[CENTRE], self.table[SIGMA] = _NOWHERE, 1.0
        high = centre.astype(dtype)
        self.table[:3, :n] = high, centre - high, sigma
        self.alpha = np.zeros(n) if alpha is None else alpha.astype(np.float64)
        self.beta = np.zeros(n) if beta is None else beta.astype(np.float64)
        self.table[3:, :n] = self.alpha * centre**2, self.beta
        k = math.pi / cutoff.rcut
        self.constants = np.array([1.0 / cutoff.rcut, cutoff.end, k, 0.5 * k * k], dtype)
        self.n = n

    def value(self, r: np.ndarray, sense: np.ndarray, n_thread: int) -> None:
        """Write s (n_pair, n_nu)."""
        if n_thread == 1 or len(r) <= CHUNK:
            _value(r, self.constants, self.table, sense, 0, len(r))
        else:
            _value_threads(r, self.constants, self.table, sense)

    def slope(
        self, grad: np.ndarray, r: np.ndarray, grad_r: np.ndarray, trained: bool, n_thread: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Write the gradient of sum g s in r; those in mu and sigma, zero where not `trained`."""
        totals = self._totals(r)
        run = _slope_chunks if n_thread == 1 or len(totals) <= 1 else _slope_threads
        run(r, self.constants, self.table, grad, grad_r, totals, int(trained))
        first, second, _ = totals.sum(axis=0)[:, : self.n]
        return -((self.sigma * self.centre) ** 2) * first, -self.sigma * second

    def curvature(
        self, grad: np.ndarray, r: np.ndarray, rho: np.ndarray, out: Outputs, n_thread: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Write h (n_pair, n_nu) and the gradient of sum g h in r; those in mu and sigma."""
        totals = self._totals(r)
        run = _curvature_chunks if n_thread == 1 or len(totals) <= 1 else _curvature_threads
        run(r, rho, self.constants, self.table, grad, *out, totals)
        steep, flat, of_sigma = totals.sum(axis=0)[:, : self.n]
        twist = self.beta - 2.0 * self.alpha * self.sigma * self.centre
        return -(self.centre**2) * (self.sigma * steep + twist * flat), -of_sigma

    def _totals(self, r: np.ndarray) -> np.ndarray:
        return np.zeros((-(-len(r) // CHUNK), 3, self.table.shape[1]))
