"""The three sums on the CPU with numba: parallel over atoms, no atomics, no sort, no copies.

`envsum` and `sensesum` own a receiver's row: its env tile stays in cache while the row's pairs
stream by. `featsum` does the same and scatters into one buffer per thread, summed at the end; with
more than `MAX_BUFFERS` threads the buffers would cost more than they save, and it owns a sender's
block of the transpose instead, gathering env tiles. Both orders of summation are fixed for a given
number of threads. The loops are `numba_rows`, their vector instructions `tiles`.

One thread calls them directly: numba's threads are then never started, and nothing parallel is
compiled. Compiled code is cached on disk by numba; the first use in a fresh installation compiles
for 3 s, with several threads for 10 s.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from md_plugin.kernels import numba_rows as rows
from md_plugin.pairs import Pairs

DEVICES = ("cpu",)
MAX_BUFFERS = 8

# fastmath without nnan/ninf: a NaN in the input must come out as NaN, not as noise.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
# error_model="numpy": the Python model would add zero-division checks that stop vectorisation.
_jit = numba.njit(parallel=True, fastmath=_FAST, cache=True, error_model="numpy", nogil=True)


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


def threads() -> int:
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
    return tensor.detach().contiguous().numpy()  # kernels know shapes, not strides


def envsum(sense: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_pair, n_nu), (n_send, n_feat) -> env (n_recv, n_nu, n_feat)."""
    n_thread = threads()
    env = torch.empty(pairs.n_recv, sense.shape[1], features.shape[1], dtype=sense.dtype)
    arrays = [_view(x) for x in (sense, features, pairs.row_ptr, pairs.sender, env)]
    if n_thread == 1:
        rows.envsum_rows(*arrays, 0, pairs.n_recv)
    else:
        rows.envsum(*arrays, n_thread)
    return env


def sensesum(env: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_send, n_feat) -> sense (n_pair, n_nu)."""
    n_thread = threads()
    sense = torch.empty(pairs.n_pair, env.shape[1], dtype=env.dtype)
    arrays = [_view(x) for x in (env, features, pairs.row_ptr, pairs.sender, sense)]
    if n_thread == 1:
        rows.sensesum_rows(*arrays, 0, pairs.n_recv)
    else:
        rows.sensesum(*arrays, n_thread)
    return sense


def featsum(env: Tensor, sense: Tensor, pairs: Pairs) -> Tensor:
    """(n_recv, n_nu, n_feat), (n_pair, n_nu) -> features (n_send, n_feat)."""
    n_thread = threads()
    if n_thread == 1:
        features = torch.zeros(pairs.n_send, env.shape[2], dtype=env.dtype)
        arrays = [_view(x) for x in (env, sense, pairs.row_ptr, pairs.sender, features)]
        rows.featsum_rows(*arrays, 0, pairs.n_recv)
        return features
    if n_thread <= MAX_BUFFERS:
        buffers = torch.empty(n_thread, pairs.n_send, env.shape[2], dtype=env.dtype)
        rows.featsum_scatter(
            *(_view(x) for x in (env, sense, pairs.row_ptr, pairs.sender, buffers))
        )
        return buffers.sum(dim=0)
    features = torch.empty(pairs.n_send, env.shape[2], dtype=env.dtype)
    indices = (pairs.col_ptr, pairs.perm, pairs.receiver, pairs.sender)
    rows.featsum_gather(*(_view(x) for x in (env, sense, *indices, features)))
    return features


def stack(components: Tensor, sense: Tensor) -> Tensor:
    """(n_pair, n_comp), (n_pair, n_nu) -> (n_pair, n_comp n_nu), components outermost."""
    threads()
    n_comp, n_nu = components.shape[1], sense.shape[1]
    stacked = torch.empty(sense.shape[0], n_comp * n_nu, dtype=sense.dtype)
    _stack(_view(components), _view(sense), _view(stacked))
    return stacked


def fold_sense(stacked: Tensor, components: Tensor) -> Tensor:
    """(n_pair, n_comp n_nu), (n_pair, n_comp) -> (n_pair, n_nu)."""
    threads()
    n_pair, n_comp = components.shape
    sense = torch.empty(n_pair, stacked.shape[1] // n_comp, dtype=stacked.dtype)
    _fold_sense(_view(stacked), _view(components), _view(sense))
    return sense


def fold_components(stacked: Tensor, sense: Tensor) -> Tensor:
    """(n_pair, n_comp n_nu), (n_pair, n_nu) -> (n_pair, n_comp)."""
    threads()
    n_pair, n_nu = sense.shape
    components = torch.empty(n_pair, stacked.shape[1] // n_nu, dtype=stacked.dtype)
    _fold_components(_view(stacked), _view(sense), _view(components))
    return components
