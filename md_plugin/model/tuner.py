"""Measures how fused kernels are best launched for the layers of a network, on this GPU.

The sums of each layer run on a crystal with about 60 pairs per atom, with blocks of several sizes;
then its kernels, forward and backward, on a smaller crystal, and its products with V, with each of
the candidates of `md_plugin.kernels.tuning` and `triton_matmul` in turn. A candidate whose result
is not that of the usual options, which were compared with float64 when the layers were made, or
which does not compile, is discarded and named. The fastest of the others is what later runs take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md_plugin.device_neighbours import DeviceList
from md_plugin.kernels import triton_fused, triton_matmul, tuning
from md_plugin.kernels.triton_arrays import grade, halves
from md_plugin.model.fused_device import HalfSums
from md_plugin.model.fusion import LEAST_BLOCK, FusedHipnn
from md_plugin.model.hipnn import Hipnn

Clock = Callable[[Callable[[], object]], float]
SPACING = 0.412  # of the cubic lattice, in cutoffs: 60 pairs within one
BLOCK_SIZES = tuple(n << 20 for n in (8, 16, 32, 64, 128, 256))  # bytes of env


@dataclass
class Tuning:
    """What was found.

    Attributes:
        options: of each kernel at its shape, by `tuning.key`: those of the fastest.
        seconds: of the usual options, and of the fastest.
        discarded: kernel, options and why.
    """

    options: dict[str, tuning.Options] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    discarded: list[tuple[str, tuning.Options, str]] = field(default_factory=list)


def cuda_seconds(call: Callable[[], object]) -> float:
    """Median of seven runs on the current GPU, seconds; two more before them."""
    times = []
    for _ in range(9):
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000.0)
    return float(np.median(times[2:]))


def tune(
    networks: Sequence[Hipnn],
    clock: Clock = cuda_seconds,
    per_side: int = 16,
    fast: bool = False,
    told: Callable[[str, Tuning], None] = lambda name, found: None,
) -> Tuning:
    """Find the fastest options for the layers of some networks, where they are.

    Args:
        networks: on one GPU, or on the CPU where Triton is interpreted.
        clock: seconds of a call.
        per_side: atoms along each side of the crystal.
        fast: products of sums in float16, as in dtype="fast".
        told: is given each name once its options are found, with all that has been found.
    """
    result = Tuning()
    for network in networks:
        step = FusedHipnn(network, "triton", fast)
        blocks, layers = _blocks(step, 2 * per_side + 2), _launches(step, per_side)
        for name, candidates, launch in chain(blocks, layers, _products(step, result)):
            if name not in result.options:
                _fastest(result, name, candidates, launch, clock)
                if name in result.options:
                    told(name, result)
    return result


Launch = Callable[[], tuple[Tensor, ...]]
Launches = Iterator[tuple[str, Sequence[tuning.Options], Launch]]


def _fastest(
    result: Tuning, name: str, candidates: Sequence[tuning.Options], launch: Launch, clock: Clock
) -> None:
    """Add a kernel's fastest options to the result; the first of the candidates are the usual."""
    usual, *others = candidates
    with tuning.trying(usual):
        try:
            expected = launch()
            first = clock(launch)
        except Exception as error:  # as below: other kernels are still measured
            result.discarded.append((name, usual, _in_words(error)))
            return
    best, least = usual, first
    for options in others:
        with tuning.trying(options):
            reason = _fault(launch, expected)
            if reason:
                result.discarded.append((name, options, reason))
                continue
            seconds = clock(launch)
        if seconds < least:
            best, least = options, seconds
    result.options[name], result.seconds[name] = best, (first, least)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _fault(launch: Launch, expected: tuple[Tensor, ...]) -> str:
    """Why a launch is of no use; "" where it is."""
    try:
        found = launch()
    except Exception as error:  # of Triton's many: what does not compile is a reason, told
        return _in_words(error)
    eps = max(torch.finfo(array.dtype).eps for array in found)
    for a, b in zip(found, expected, strict=True):
        scale = float(b.abs().max())
        off = float((a - b).abs().max())
        if not off <= 64 * eps * scale:
            return f"wrong by {off:.0e}, where the largest value is {scale:.0e}"
    return ""


def _blocks(step: FusedHipnn, per_side: int) -> Launches:
    """Key, numbers of receivers, and a call, of all blocks of each layer."""
    where = _crystal(step, per_side)
    like = step.model.encoder
    generator = torch.Generator(like.device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=like.device, dtype=like.dtype)
    for layer in step.layers:
        sums: Any = layer.sums
        z, g = normal(len(where.x), sums.n_in), normal(len(where.x), *sums.shape)
        sizes = dict.fromkeys([layer.block, *map(sums.receivers, BLOCK_SIZES)])
        candidates = [{"receivers": n} for n in sizes if LEAST_BLOCK <= n <= layer.max_block]
        if layer.block <= len(where.x):
            yield sums.block_key, candidates, partial(_all_blocks, step, sums, where, z, g)


def _all_blocks(
    step: FusedHipnn, sums: Any, where: Any, z: Tensor, g: Tensor
) -> tuple[Tensor, ...]:
    """m of all receivers, and what g = dE/dm gives."""
    source, m = sums.source(z, 1), torch.full_like(g, torch.nan)
    found = step.engine.gradients(where, z.dtype, 1, "")
    sink = sums.sink(found)
    for start in range(0, len(g), sums.block):
        rows = slice(start, min(start + sums.block, len(g)))
        sums.mix(where, source, start, m[rows])
        sums.gradient(where, source, g[rows], sink, start)
    results: tuple[Tensor, ...] = m, found.forces, sums.sent(sink)
    results = results[: 2 if sums.is_first else 3]
    if sums.n_byte == 2:  # where dE/denv is rounded to depends on the last bits of products
        results += (m.new_zeros(1, dtype=torch.float16),)
    return results


def _products(step: FusedHipnn, result: Tuning) -> Launches:
    """Key, tiles, and a call, of the products of a block of each layer in float32."""
    for layer in step.layers:
        sums: Any = layer.sums
        if isinstance(sums, HalfSums):
            best = result.options.get(sums.block_key, {"receivers": layer.block})
            n_row = best["receivers"] * sums.shape[0]
            for b, grade in ((sums.halves, torch.float32), (sums.turned, torch.float16)):
                shape = (n_row, *b.shape[1:])
                a = halves(torch.rand(shape[:2], device=b.device) - 0.5, len(b))
                out = b.new_empty(n_row, shape[2], dtype=grade)
                out = out if grade == torch.float32 else out.expand(len(b), -1, -1).contiguous()
                tiles = triton_matmul.candidates(shape, len(b), b.device)
                candidates = [tile._asdict() | {"wide": int(tile.wide)} for tile in tiles]
                call = partial(_product, a, b, out, sums.counters)
                yield triton_matmul.key(shape, len(b)), candidates, call


def _product(a: Tensor, b: Tensor, out: Tensor, counters: Tensor) -> tuple[Tensor, ...]:
    out.fill_(torch.nan)  # what nobody writes shows
    triton_matmul.product(a, b, out, counters)
    return (_whole(out),)


def _whole(array: Tensor) -> Tensor:
    """A copy that the next launch leaves; of two halves the float32 that they add up to."""
    two = array.dtype == torch.float16 and len(array) == 2
    return array.float().sum(dim=0) if two else array.clone()


def _launches(step: FusedHipnn, per_side: int) -> Launches:
    """Key, options, and a call, of the kernels of each layer."""
    where = _crystal(step, per_side)
    n_recv, device, real = len(where.row_ptr) - 1, where.x.device, step.model.encoder.dtype
    generator = torch.Generator(device).manual_seed(0)
    for layer in step.layers:
        sums: Any = layer.sums
        like: dict[str, Any] = {"generator": generator, "device": device, "dtype": real}
        n_block = min(n_recv, layer.block)
        shape = (n_block, sums.shape[0], sums.n_nu, sums.n_in)
        z, ge = torch.randn(n_recv, sums.n_in, **like), torch.randn(shape, **like)
        scale = None
        if real != torch.float64:
            z, ge = halves(z, sums.n_half), halves(ge, sums.n_half)
            scale = torch.ones(2, n_block, device=device)
        source = None if sums.is_first else z
        env = torch.empty_like(ge)
        calls = {
            "forward": partial(_forward, where, sums.radial, source, env),
            "backward": partial(_backward, step, where, sums.radial, source, ge, scale),
        }
        for kernel, call in calls.items():
            default = triton_fused.options(sums.radial, env, back=kernel == "backward")
            name = tuning.key(kernel, shape, grade(env))
            yield name, tuning.candidates(name, default, device), call


def _forward(where: Any, radial: Any, z: Tensor | None, env: Tensor) -> tuple[Tensor, ...]:
    env.fill_(torch.nan)  # what nobody writes shows
    triton_fused.forward(where, radial, z, env)
    return (_whole(env),)


def _backward(
    step: FusedHipnn, where: Any, radial: Any, z: Tensor | None, ge: Tensor, scale: Tensor | None
) -> tuple[Tensor, ...]:
    found = step.engine.gradients(where, radial.table.dtype, 1, "")
    found = found.for_layer(0 if z is None else ge.shape[-1])
    triton_fused.backward(where, radial, z, ge, found, scale=scale)
    return (
        (found.forces, found.virial) if z is None else (found.forces, found.virial, found.messages)
    )


def _crystal(step: FusedHipnn, per_side: int) -> Any:
    """Atoms near the places of a cubic lattice, of all species in turn."""
    model = step.model
    spacing, device = SPACING * model.rcut, model.encoder.device
    rng = np.random.default_rng(0)
    sites = np.stack(np.meshgrid(*[np.arange(per_side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    x = spacing * (sites + rng.uniform(-0.1, 0.1, sites.shape))
    neighbours = DeviceList(model.rcut, 0.0, device)
    cell = per_side * spacing * np.eye(3)
    neighbours.update(x, cell, np.ones(3, dtype=bool))
    geometry = neighbours.geometry(x, cell)
    kinds = torch.arange(len(x), device=device, dtype=torch.int32) % len(model.species)
    return step.engine.where(kinds, geometry)
