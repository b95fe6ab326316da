"""The three sums on the CPU with numba: parallel over atoms, no atomics, no sort, no copies.

`envsum` and `sensesum` own a receiver's row: its env tile stays in cache while the row's pairs
stream by. `featsum` does the same and scatters into one buffer per thread, summed at the end; with
more than `MAX_BUFFERS` threads the buffers would cost more than they save, and it owns a sender's
block of the transpose instead, gathering env tiles. Both orders of summation are fixed for a given
number of threads. The loops are `numba_rows`, their vector instructions `tiles`; those of the
products `numba_products`, of the sensitivities `radial_cpu`.

One thread calls them directly: numba's threads are then never started, and nothing parallel is
compiled. Compiled code is cached on disk by numba; the first use in a fresh installation compiles
the sums for 3 s, with several threads for 10 s, and the sensitivities for 3 s or 5 s.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from md_plugin.kernels import numba_products as products
from md_plugin.kernels import numba_rows as rows
from md_plugin.kernels.radial_cpu import Gaussians
from md_plugin.kernels.radial_reference import Cutoff, Direction, Gradients
from md_plugin.pairs import Pairs

DEVICES = ("cpu",)
MAX_BUFFERS = 8


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
            "choose backend='auto' or move the potential to device='cpu'"
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
    n_comp, n_nu = components.shape[1], sense.shape[1]
    stacked = torch.empty(sense.shape[0], n_comp * n_nu, dtype=sense.dtype)
    _share(products.stack_range, products.stack_threads, components, sense, stacked)
    return stacked


def fold(stacked: Tensor, components: Tensor, sense: Tensor) -> tuple[Tensor, Tensor]:
    """(n_pair, n_comp n_nu), (n_pair, n_comp), (n_pair, n_nu) -> the shapes of the last two."""
    found = torch.empty_like(components), torch.empty_like(sense)
    _share(products.fold_range, products.fold_threads, stacked, components, sense, *found)
    return found


def stack_along(components: Tensor, sense: Tensor, d_components: Tensor, d_sense: Tensor) -> Tensor:
    """Derivative of `stack` along (d_components, d_sense) -> (n_pair, n_comp n_nu)."""
    stacked = sense.new_empty(sense.shape[0], components.shape[1] * sense.shape[1])
    tensors = (components, sense, d_components, d_sense, stacked)
    _share(products.stack_along_range, products.stack_along_threads, *tensors)
    return stacked


def _share(serial: Any, threaded: Any, *tensors: Tensor) -> None:
    """One thread takes all pairs, several a block each."""
    n_thread = threads()
    arrays = [_view(x) for x in tensors]
    if n_thread == 1:
        serial(*arrays, 0, len(arrays[0]))
    else:
        threaded(*arrays, n_thread)


def sensitivity(r: Tensor, mu: Tensor, sigma: Tensor, cutoff: Cutoff) -> Tensor:
    """(n_pair,), (n_nu,), (n_nu,) -> s (n_pair, n_nu)."""
    sense = r.new_empty(len(r), len(mu))
    gaussians = Gaussians(_view(mu), _view(sigma), cutoff)
    gaussians.value(_view(r), _view(sense), threads())
    return sense


def sensitivity_slope(
    grad: Tensor, r: Tensor, mu: Tensor, sigma: Tensor, cutoff: Cutoff, parameters: bool = True
) -> Gradients:
    """g (n_pair, n_nu) -> dr (n_pair,), dmu and dsigma (n_nu,), or None without `parameters`."""
    grad_r = torch.empty_like(r)
    gaussians = Gaussians(_view(mu), _view(sigma), cutoff)
    found = gaussians.slope(_view(grad), _view(r), _view(grad_r), parameters, threads())
    if not parameters:
        return grad_r, None, None
    grad_mu, grad_sigma = (torch.from_numpy(x).to(r.dtype) for x in found)
    return grad_r, grad_mu, grad_sigma


def sensitivity_curvature(
    grad: Tensor, r: Tensor, mu: Tensor, sigma: Tensor, along: Direction, cutoff: Cutoff
) -> tuple[Tensor, ...]:
    """Gradients of sum g h in g, r, mu and sigma; see `radial_reference`."""
    h, grad_r = torch.empty_like(grad), torch.empty_like(r)
    rho, alpha, beta = (_view(x) for x in along)
    gaussians = Gaussians(_view(mu), _view(sigma), cutoff, alpha, beta)
    out = (_view(h), _view(grad_r))
    found = gaussians.curvature(_view(grad), _view(r), rho, out, threads())
    return h, grad_r, *(torch.from_numpy(x).to(r.dtype) for x in found)
