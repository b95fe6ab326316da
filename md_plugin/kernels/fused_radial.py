"""Sensitivities in the form in which the fused kernels take them, and which pairs each touches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

N_BIN = 32  # of r^2, from 0 to where pairs end
NU_BLOCK = 4  # sensitivities in one register tile of the forward pass

# By size in bytes: a Gaussian below exp(-reach^2 / 2) of its top does not count.
REACH = {4: 6.1, 8: 9.0}
_EXP2_SCALE = math.sqrt(0.5 / math.log(2.0))  # exp(-t^2 / 2) = 2^-(t scale)^2


@dataclass(frozen=True, eq=False)
class RadialTable:
    """What the kernels need of mu, sigma and rcut; built once per model, or per optimiser step.

    Attributes:
        n_nu: sensitivities.
        gaussian: (3, n_nu padded) scale, offset and slope: s = 2^-y^2 with y = scale / r - offset,
            ds/dr = s slope y / r^2.
        constants: (4,) 1 / rcut, pi / rcut, bins per squared length, 2 rcut.
        window: (2, N_BIN + 1) int32, first sensitivity of each bin of r^2 and one past the last;
            nothing beyond the cutoff.
        reach: (2, n_nu) int32, first bin of each sensitivity and one past the last.
        block_reach: (2, n_block) int32, the same of each block of NU_BLOCK sensitivities.
    """

    n_nu: int
    gaussian: np.ndarray
    constants: np.ndarray
    window: np.ndarray
    reach: np.ndarray
    block_reach: np.ndarray

    @classmethod
    def build(
        cls,
        mu: np.ndarray,
        sigma: np.ndarray,
        rcut: float,
        dtype: type = np.float32,
        *,
        end: float | None = None,
        reach: float | None = None,
    ) -> RadialTable:
        """Tables for centres mu and inverse widths sigma (n_nu,).

        Pairs end at `end`, at most rcut, which it is where None. reach=inf touches everything.
        """
        end = rcut if end is None else end
        mu, sigma = np.asarray(mu, np.float64), np.abs(np.asarray(sigma, np.float64))
        n_nu = len(mu)
        scale = sigma * _EXP2_SCALE
        padded = -(-n_nu // NU_BLOCK) * NU_BLOCK
        gaussian: np.ndarray = np.zeros((3, padded), dtype)
        gaussian[:, :n_nu] = scale, scale / mu, sigma / _EXP2_SCALE
        per_bin = N_BIN / end**2
        constants: np.ndarray = np.array([1 / rcut, math.pi / rcut, per_bin, 2 * rcut], dtype)
        reach = REACH[np.dtype(dtype).itemsize] if reach is None else reach
        half_width = reach / np.maximum(sigma, 1e-300)
        touches = _touching(1.0 / mu - half_width, 1.0 / mu + half_width, end)
        window = np.concatenate([_hull(touches), [[0], [0]]], axis=1).astype(np.int32)
        window[0, window[1] == 0] = n_nu
        nu = np.arange(n_nu)
        inside = (nu >= window[0, :-1, None]) & (nu < window[1, :-1, None])
        blocks = [inside[:, k : k + NU_BLOCK].any(axis=1) for k in range(0, n_nu, NU_BLOCK)]
        return cls(n_nu, gaussian, constants, window, _hull(inside.T), _hull(np.stack(blocks)))

    @property
    def dtype(self) -> np.dtype:
        """Of the network."""
        return self.gaussian.dtype

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """As the kernels take them."""
        return self.gaussian, self.constants, self.window, self.reach, self.block_reach


def _touching(low: np.ndarray, high: np.ndarray, end: float) -> np.ndarray:
    """(N_BIN, n_nu): which intervals low .. high of 1/r meet each bin of r^2."""
    edges = np.arange(N_BIN + 1) * end**2 / N_BIN
    margin = 1e-5 * end**2
    far = 1.0 / np.sqrt(edges[1:] + margin)
    with np.errstate(divide="ignore"):
        near = 1.0 / np.sqrt(np.maximum(edges[:-1] - margin, 0.0))
    touches: np.ndarray = (low < near[:, None]) & (high > far[:, None])
    touches[0, np.argmax(high)] = True  # NaN distances land in bin 0 and must show
    return touches


def _hull(touches: np.ndarray) -> np.ndarray:
    """(n, m) booleans -> (2, n) int32, the first true of each row and one past the last."""
    n, m = touches.shape
    some = touches.any(axis=1)
    first = np.where(some, touches.argmax(axis=1), 0)
    last = np.where(some, m - touches[:, ::-1].argmax(axis=1), 0)
    return np.ascontiguousarray(np.stack([first, last]).astype(np.int32)).reshape(2, n)
