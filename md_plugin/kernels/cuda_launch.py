"""The sums, products and sensitivities on a GPU by kernels of CUDA: what to allocate and launch.

Two sets of kernels have the names, arguments, grids and blocks that are used here: CUDA C
(`cuda_sums.cu` and `cuda_radial.cu`, launched by `cupy_gpu`) and Python (`numba_cuda`). A `Launch`
is what both have to offer.

featsum goes in two steps, so that nothing is added by atomics and two runs agree to the last bit:
messages, one per pair and feature, which read the env of each receiver once, and a gather of them
by sender. Messages of a part of the pairs at a time stay in `WORKSPACE` bytes, or in an eighth of
what all of them would take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from md_plugin.kernels.radial_reference import Cutoff, Direction, Gradients
from md_plugin.pairs import Pairs

TERMS = 32  # of a sum, staged at once; as in the kernels
PAIRS = 64  # of a block of the sensitivities; as in the kernels
MOMENTS = 3
WORKSPACE = 256 * 1024**2
MOST_PARTS = 8
THREADS = 16  # at most, along each side of a tile; each has four rows or columns

Sizes = tuple[int, ...]
# name of a kernel, grid, block, numbers in shared memory, arguments: tensors, ints and floats
Launch = Callable[[str, Sizes, Sizes, int, tuple[Any, ...]], None]


def cdiv(n: int, size: int) -> int:
    """How many blocks of `size` hold n."""
    return -(-n // size)


def tile(n: int) -> tuple[int, int]:
    """(blocks, threads of each): n in equal tiles of four per thread."""
    blocks = max(1, cdiv(n, 4 * THREADS))
    return blocks, max(1, cdiv(n, 4 * blocks))


@dataclass(frozen=True)
class CudaKernels:
    """Kernels with the arguments of `SumKernels`.

    Attributes:
        launch: starts a kernel on torch's current stream of the first tensor's device; all
            tensors are contiguous and of one dtype, but for indices in int32.
    """

    launch: Launch

    def envsum(self, sense: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
        """(n_pair, n_nu), (n_send, n_feat) -> env (n_recv, n_nu, n_feat)."""
        n_nu, n_feat = sense.shape[1], features.shape[1]
        if pairs.n_pair * n_nu * n_feat == 0:
            return sense.new_zeros(pairs.n_recv, n_nu, n_feat)
        env = sense.new_empty(pairs.n_recv, n_nu, n_feat)
        (blocks_f, x), (blocks_nu, y) = tile(n_feat), tile(n_nu)
        grid, shared = (pairs.n_recv, blocks_f, blocks_nu), TERMS * 4 * (x + y)
        rows = (pairs.row_ptr, pairs.sender)
        self.launch("envsum", grid, (x, y), shared, (sense, features, *rows, env, n_nu, n_feat))
        return env

    def sensesum(self, env: Tensor, features: Tensor, pairs: Pairs) -> Tensor:
        """(n_recv, n_nu, n_feat), (n_send, n_feat) -> sense (n_pair, n_nu)."""
        n_nu, n_feat = env.shape[1:]
        if pairs.n_pair * n_nu * n_feat == 0:
            return env.new_zeros(pairs.n_pair, n_nu)
        sense = env.new_empty(pairs.n_pair, n_nu)
        (blocks, x), y = tile(n_nu), _rows(pairs)
        shared = 4 * (x + y) * _pitch(env)
        arguments = (env, features, pairs.row_ptr, pairs.sender, sense, n_nu, n_feat)
        self.launch("sensesum", (pairs.n_recv, blocks, 1), (x, y), shared, arguments)
        return sense

    def featsum(self, env: Tensor, sense: Tensor, pairs: Pairs) -> Tensor:
        """(n_recv, n_nu, n_feat), (n_pair, n_nu) -> features (n_send, n_feat)."""
        n_nu, n_feat = env.shape[1:]
        if pairs.n_pair * n_nu * n_feat == 0:
            return env.new_zeros(pairs.n_send, n_feat)
        features = env.new_empty(pairs.n_send, n_feat)
        size = n_feat * env.element_size()
        part = max(1, WORKSPACE // size, cdiv(pairs.n_pair, MOST_PARTS))
        message = env.new_empty(min(part, pairs.n_pair), n_feat)
        (blocks, x), y = tile(n_feat), _rows(pairs)
        shared = TERMS * 4 * x + 4 * y * _pitch(env)
        wide = min(n_feat, 32)
        by_sender = (cdiv(pairs.n_send, 8), cdiv(n_feat, wide), 1)
        for first in range(0, pairs.n_pair, part):
            sizes = (n_feat, first, min(first + part, pairs.n_pair))
            arguments = (env, sense, pairs.row_ptr, message, n_nu, *sizes)
            self.launch("messages", (pairs.n_recv, blocks, 1), (x, y), shared, arguments)
            arguments = (message, pairs.col_ptr, pairs.perm, features, pairs.n_send, *sizes)
            self.launch("gather", by_sender, (wide, 8), 0, arguments)
        return features

    def stack(self, components: Tensor, sense: Tensor) -> Tensor:
        """(n_pair, n_comp), (n_pair, n_nu) -> (n_pair, n_comp n_nu), components outermost."""
        stacked = sense.new_empty(len(sense), components.shape[1] * sense.shape[1])
        self._product("stack", (components, sense), components, sense, (stacked,))
        return stacked

    def fold(self, stacked: Tensor, components: Tensor, sense: Tensor) -> tuple[Tensor, Tensor]:
        """(n_pair, n_comp n_nu), (n_pair, n_comp), (n_pair, n_nu) -> shapes of the last two."""
        like = torch.empty_like if stacked.numel() else torch.zeros_like  # sums of nothing
        found = like(components), like(sense)
        self._product("fold", (stacked, components, sense), components, sense, found)
        return found

    def stack_along(
        self, components: Tensor, sense: Tensor, d_components: Tensor, d_sense: Tensor
    ) -> Tensor:
        """Derivative of `stack` along (d_components, d_sense) -> (n_pair, n_comp n_nu)."""
        stacked = sense.new_empty(len(sense), components.shape[1] * sense.shape[1])
        given = (components, sense, d_components, d_sense)
        self._product("stack_along", given, components, sense, (stacked,))
        return stacked

    def _product(
        self, name: str, given: Any, components: Tensor, sense: Tensor, found: tuple[Tensor, ...]
    ) -> None:
        n_pair, n_comp, n_nu = len(sense), components.shape[1], sense.shape[1]
        if n_pair * n_comp * n_nu:
            grid, block = (cdiv(n_pair, 8), 1, 1), (min(n_nu, 32), 8)
            self.launch(name, grid, block, 0, (*given, *found, n_pair, n_comp, n_nu))

    def sensitivity(self, r: Tensor, mu: Tensor, sigma: Tensor, cutoff: Cutoff) -> Tensor:
        """(n_pair,), (n_nu,), (n_nu,), Å -> s (n_pair, n_nu)."""
        sense = r.new_empty(len(r), len(mu))
        self._radial("sensitivity", (r, mu, sigma, sense), sense.shape, cutoff)
        return sense

    def sensitivity_slope(
        self,
        grad: Tensor,
        r: Tensor,
        mu: Tensor,
        sigma: Tensor,
        cutoff: Cutoff,
        parameters: bool = True,
    ) -> Gradients:
        """g (n_pair, n_nu) -> dr (n_pair,), dmu and dsigma (n_nu,), or None without parameters."""
        n_nu = len(mu)
        grad_r = torch.empty_like(r) if n_nu else torch.zeros_like(r)
        sums = _moments(r, n_nu, wanted=parameters)
        arguments = (grad, r, mu, sigma, grad_r, sums)
        self._radial("slope", arguments, grad.shape, cutoff, int(parameters))
        if not parameters:
            return grad_r, None, None
        of_t, of_u = sums[:, :2].double().sum(dim=0)
        return grad_r, (-of_t * sigma / mu.square()).to(mu.dtype), -of_u.to(mu.dtype)

    def sensitivity_curvature(
        self,
        grad: Tensor,
        r: Tensor,
        mu: Tensor,
        sigma: Tensor,
        along: Direction,
        cutoff: Cutoff,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of sum g h: h (n_pair, n_nu), those in r (n_pair,), mu and sigma (n_nu,)."""
        n_nu = len(mu)
        h, grad_r = torch.empty_like(grad), torch.empty_like(r) if n_nu else torch.zeros_like(r)
        sums = _moments(r, n_nu)
        arguments = (grad, r, mu, sigma, *along, h, grad_r, sums)
        self._radial("curvature", arguments, grad.shape, cutoff)
        steep, flat, of_sigma = sums.double().sum(dim=0)
        inverse, alpha, beta = mu.double().reciprocal(), along[1], along[2]
        twist = beta - 2.0 * alpha * sigma * inverse
        of_mu = -inverse.square() * (sigma * steep + twist * flat)
        return h, grad_r, of_mu.to(mu.dtype), -of_sigma.to(mu.dtype)

    def _radial(
        self, name: str, tensors: tuple[Tensor, ...], shape: Sizes, cutoff: Cutoff, *more: int
    ) -> None:
        n_pair, n_nu = shape
        if n_pair * n_nu == 0:
            return
        x = min(n_nu, 32)
        y = cdiv(2 * PAIRS, x)
        shared = 6 * PAIRS + PAIRS * (x + 1) + MOMENTS * x * y
        limits = (float(cutoff.rcut), float(cutoff.end))
        arguments = (*tensors, n_pair, n_nu, *more, *limits)
        self.launch(name, (cdiv(n_pair, PAIRS), 1, 1), (x, y), shared, arguments)


def _rows(pairs: Pairs) -> int:
    """Threads that share the pairs of a tile: four pairs each, a quarter more than in most rows."""
    return min(THREADS, cdiv(5 * pairs.n_pair, 16 * pairs.n_recv))


def _pitch(like: Tensor) -> int:
    """Numbers from one row of a tile to the next: 16 bytes more than its terms."""
    return TERMS + 16 // like.element_size()


def _moments(r: Tensor, n_nu: int, wanted: bool = True) -> Tensor:
    """Room for what a block adds up over its pairs; at least one, whose address is passed on."""
    blocks = cdiv(len(r), PAIRS)
    return r.new_empty(blocks if wanted else min(blocks, 1), MOMENTS, n_nu)
