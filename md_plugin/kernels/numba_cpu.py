"""The three sums on the CPU with numba: parallel over atoms, no atomics, no sort, no copies.

`envsum` and `sensesum` own a receiver's row: its env tile stays in cache while the row's pairs
stream by. `featsum` does the same and scatters into one buffer per thread, summed at the end; with
more than `MAX_BUFFERS` threads the buffers would cost more than they save, and it owns a sender's
block of the transpose instead, gathering env tiles. Both orders of summation are fixed for a given
number of threads. Compiled code is cached on disk by numba; the first call in a fresh
installation compiles for a few seconds.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from md_plugin.pairs import Pairs

DEVICES = ("cpu",)
MAX_BUFFERS = 8

# fastmath without nnan/ninf: a NaN in the input must come out as NaN, not as noise.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
# error_model="numpy": the Python model would add zero-division checks that stop vectorisation.
_jit = numba.njit(parallel=True, fastmath=_FAST, cache=True, error_model="numpy", nogil=True)


@_jit
def _envsum(sense, features, row_ptr, sender, env):  # type: ignore[no-untyped-def]
    n_recv, n_nu, n_feat = env.shape
    for i in prange(n_recv):
        env[i] = 0.0
        first, last = row_ptr[i], row_ptr[i + 1]
        # Four pairs at a time: one load and one store of the env tile serve four products.
        blocked = first + (last - first) // 4 * 4
        for p in range(first, blocked, 4):
            z0, z1 = features[sender[p]], features[sender[p + 1]]
            z2, z3 = features[sender[p + 2]], features[sender[p + 3]]
            for nu in range(n_nu):
                s0, s1 = sense[p, nu], sense[p + 1, nu]
                s2, s3 = sense[p + 2, nu], sense[p + 3, nu]
                # Far from its centre a Gaussian underflows to an exact zero.
                if s0 != 0.0 or s1 != 0.0 or s2 != 0.0 or s3 != 0.0:
                    for a in range(n_feat):
                        env[i, nu, a] += s0 * z0[a] + s1 * z1[a] + s2 * z2[a] + s3 * z3[a]
        for p in range(blocked, last):
            z = features[sender[p]]
            for nu in range(n_nu):
                s = sense[p, nu]
                if s != 0.0:
                    for a in range(n_feat):
                        env[i, nu, a] += s * z[a]


@_jit
def _sensesum(env, features, row_ptr, sender, sense):  # type: ignore[no-untyped-def]
    n_recv, n_nu, n_feat = env.shape
    for i in prange(n_recv):
        tile = env[i]
        for p in range(row_ptr[i], row_ptr[i + 1]):
            z = features[sender[p]]
            for nu in range(n_nu):
                row = tile[nu]
                total = z.dtype.type(0.0)
                for a in range(n_feat):
                    total += row[a] * z[a]
                sense[p, nu] = total


@_jit
def _featsum_scatter(env, sense, row_ptr, sender, buffers):  # type: ignore[no-untyped-def]
    n_buffer = buffers.shape[0]
    n_recv, n_nu, n_feat = env.shape
    blocked = n_nu // 4 * 4
    for b in prange(n_buffer):
        out = buffers[b]
        out[:, :] = 0.0
        for i in range(n_recv * b // n_buffer, n_recv * (b + 1) // n_buffer):
            tile = env[i]
            for p in range(row_ptr[i], row_ptr[i + 1]):
                j = sender[p]
                for nu in range(0, blocked, 4):
                    s0, s1 = sense[p, nu], sense[p, nu + 1]
                    s2, s3 = sense[p, nu + 2], sense[p, nu + 3]
                    e0, e1, e2, e3 = tile[nu], tile[nu + 1], tile[nu + 2], tile[nu + 3]
                    if s0 != 0.0 or s1 != 0.0 or s2 != 0.0 or s3 != 0.0:
                        for a in range(n_feat):
                            out[j, a] += s0 * e0[a] + s1 * e1[a] + s2 * e2[a] + s3 * e3[a]
                for nu in range(blocked, n_nu):
                    s = sense[p, nu]
                    for a in range(n_feat):
                        out[j, a] += s * tile[nu, a]


@_jit
def _featsum_gather(env, sense, col_ptr, perm, receiver, features):  # type: ignore[no-untyped-def]
    n_send, n_feat = features.shape
    n_nu = sense.shape[1]
    blocked = n_nu // 4 * 4
    for j in prange(n_send):
        features[j] = 0.0
        for k in range(col_ptr[j], col_ptr[j + 1]):
            p = perm[k]
            tile = env[receiver[p]]
            for nu in range(0, blocked, 4):
                s0, s1 = sense[p, nu], sense[p, nu + 1]
                s2, s3 = sense[p, nu + 2], sense[p, nu + 3]
                e0, e1, e2, e3 = tile[nu], tile[nu + 1], tile[nu + 2], tile[nu + 3]
                if s0 != 0.0 or s1 != 0.0 or s2 != 0.0 or s3 != 0.0:
                    for a in range(n_feat):
                        features[j, a] += s0 * e0[a] + s1 * e1[a] + s2 * e2[a] + s3 * e3[a]
            for nu in range(blocked, n_nu):
                s = sense[p, nu]
                for a in range(n_feat):
                    features[j, a] += s * tile[nu, a]


@_jit
def _stack(components, sense, stacked):  # type: ignore[no-untyped-def]
    n_pair, n_comp = components.shape
    n_nu = sense.shape[1]
    for p in prange(n_pair):
        for c in range(n_comp):
            t = components[p, c]
            for nu in range(n_nu):
                stacked[p, c * n_nu + nu] = t * sense[p, nu]


@_jit
def _fold_sense(stacked, components, sense):  # type: ignore[no-untyped-def]
    n_pair, n_comp = components.shape
    n_nu = sense.shape[1]
    for p in prange(n_pair):
        sense[p] = 0.0
        for c in range(n_comp):
            t = components[p, c]
            for nu in range(n_nu):
                sense[p, nu] += t * stacked[p, c * n_nu + nu]


@_jit
def _fold_components(stacked, sense, components):  # type: ignore[no-untyped-def]
    n_pair, n_comp = components.shape
    n_nu = sense.shape[1]
    for p in prange(n_pair):
        for c in range(n_comp):
            total = sense.dtype.type(0.0)
            for nu in range(n_nu):
                total += stacked[p, c * n_nu + nu] * sense[p, nu]
            components[p, c] = total


def _threads() -> int:
    """As many threads as torch has, so that OMP_NUM_THREADS and torch.set_num_threads rule both.

    Starting numba's thread pool overwrites OpenMP's thread count, which torch shares (numba 0.68.1
    with its omp layer): the second half puts it back.
    """
    wanted = torch.get_num_threads()
    n_thread = min(wanted, numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != n_thread:
        numba.set_num_threads(n_thread)
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
    return int(n_thread)


def _view(tensor: Tensor) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise ValueError(
            f"backend 'numba' computes on the CPU, but the tensors are on {tensor.device}; "
            "choose backend='triton' or move the potential to device='cpu'"
        )
    return tensor.detach().numpy()


def envsum(sense: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_pair, n_nu), (n_send, n_feat) -> env (n_recv, n_nu, n_feat)."""
    _threads()
    env = torch.empty(pairs.n_recv, sense.shape[1], features.shape[1], dtype=sense.dtype)
    _envsum(_view(sense), _view(features), _view(pairs.row_ptr), _view(pairs.sender), _view(env))
    return env


def sensesum(env: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_send, n_feat) -> sense (n_pair, n_nu)."""
    _threads()
    sense = torch.empty(pairs.n_pair, env.shape[1], dtype=env.dtype)
    _sensesum(_view(env), _view(features), _view(pairs.row_ptr), _view(pairs.sender), _view(sense))
    return sense


def featsum(env: Tensor, sense: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_pair, n_nu) -> features (n_send, n_feat)."""
    n_thread = _threads()
    if n_thread <= MAX_BUFFERS:
        buffers = torch.empty(n_thread, pairs.n_send, env.shape[2], dtype=env.dtype)
        _featsum_scatter(
            _view(env), _view(sense), _view(pairs.row_ptr), _view(pairs.sender), _view(buffers)
        )
        return buffers[0] if n_thread == 1 else buffers.sum(dim=0)
    features = torch.empty(pairs.n_send, env.shape[2], dtype=env.dtype)
    _featsum_gather(
        _view(env),
        _view(sense),
        _view(pairs.col_ptr),
        _view(pairs.perm),
        _view(pairs.receiver),
        _view(features),
    )
    return features


def stack(components: Tensor, sense: Tensor) -> Tensor:
    """(n_pair, n_comp), (n_pair, n_nu) -> (n_pair, n_comp n_nu), components outermost."""
    _threads()
    n_comp, n_nu = components.shape[1], sense.shape[1]
    stacked = torch.empty(sense.shape[0], n_comp * n_nu, dtype=sense.dtype)
    _stack(_view(components), _view(sense), _view(stacked))
    return stacked


def fold_sense(stacked: Tensor, components: Tensor) -> Tensor:
    """(n_pair, n_comp n_nu), (n_pair, n_comp) -> (n_pair, n_nu)."""
    _threads()
    n_pair, n_comp = components.shape
    sense = torch.empty(n_pair, stacked.shape[1] // n_comp, dtype=stacked.dtype)
    _fold_sense(_view(stacked), _view(components), _view(sense))
    return sense


def fold_components(stacked: Tensor, sense: Tensor) -> Tensor:
    """(n_pair, n_comp n_nu), (n_pair, n_nu) -> (n_pair, n_comp)."""
    _threads()
    n_pair, n_nu = sense.shape
    components = torch.empty(n_pair, stacked.shape[1] // n_nu, dtype=stacked.dtype)
    _fold_components(_view(stacked), _view(sense), _view(components))
    return components
