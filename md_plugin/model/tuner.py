"""Measures how fused kernels are best launched for the layers of a network, on this GPU.

Each layer's kernels, forward and backward, run on a crystal with about 60 pairs per atom, with each
of the candidates of `md_plugin.kernels.tuning` in turn. A candidate whose result is not that of the
usual options, which were compared with float64 when the layers were made, or which does not
compile, is discarded and named. The fastest of the others is what later runs take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md_plugin.kernels import triton_fused, tuning
from md_plugin.kernels.triton_arrays import grade, halves
from md_plugin.model.fusion import FusedHipnn
from md_plugin.model.hipnn import Hipnn
from md_plugin.neighbours import NeighbourList
from md_plugin.pairs import Geometry

Clock = Callable[[Callable[[], object]], float]
SPACING = 0.412  # of the cubic lattice, in cutoffs: 60 pairs within one


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
) -> Tuning:
    """Find the fastest options for the layers of some networks, where they are.

    Args:
        networks: on one GPU, or on the CPU where Triton is interpreted.
        clock: seconds of a call.
        per_side: atoms along each side of the crystal.
        fast: products of sums in float16, as in dtype="fast".
    """
    result = Tuning()
    for network in networks:
        for name, default, launch in _launches(network, per_side, fast):
            if name not in result.options:
                _fastest(result, name, default, launch, clock)
    return result


Launch = Callable[[], tuple[Tensor, ...]]


def _fastest(
    result: Tuning, name: str, default: tuning.Options, launch: Launch, clock: Clock
) -> None:
    """Add a kernel's fastest options to the result."""
    device = launch()[0].device
    usual, *others = tuning.candidates(name, default, device)
    with tuning.trying(usual):
        expected = launch()
        first = clock(launch)
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


def _fault(launch: Launch, expected: tuple[Tensor, ...]) -> str:
    """Why a launch is of no use; "" where it is."""
    try:
        found = launch()
    except Exception as error:  # of Triton's many: what does not compile is a reason, told
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    eps = max(torch.finfo(array.dtype).eps for array in found)
    for a, b in zip(found, expected, strict=True):
        scale = float(b.abs().max())
        off = float((a - b).abs().max())
        if not off <= 64 * eps * scale:
            return f"wrong by {off:.0e}, where the largest value is {scale:.0e}"
    return ""


def _launches(
    network: Hipnn, per_side: int, fast: bool
) -> Iterator[tuple[str, tuning.Options, Launch]]:
    """Key, usual options, and a call, of the kernels of each layer."""
    step = FusedHipnn(network, "triton", fast)
    where = _crystal(step, per_side)
    n_recv, device, real = len(where.row_ptr) - 1, where.x.device, network.encoder.dtype
    generator = torch.Generator(device).manual_seed(0)
    for layer in step.layers:
        sums: Any = layer.sums
        like: dict[str, Any] = {"generator": generator, "device": device, "dtype": real}
        n_block = min(n_recv, layer.block)
        shape = (n_block, sums.shape[0], sums.n_nu, sums.n_in)
        z, ge = torch.randn(n_recv, sums.n_in, **like), torch.randn(shape, **like)
        scale = None
        if real != torch.float64:
            n_half = 1 if fast and not sums.is_first else 2
            z, ge = halves(z, n_half), halves(ge, n_half)
            scale = torch.ones(2, n_block, device=device)
        source = None if sums.is_first else z
        env = torch.empty_like(ge)
        calls = {
            "forward": partial(_forward, where, sums.radial, source, env),
            "backward": partial(_backward, step, where, sums.radial, source, ge, scale),
        }
        for kernel, call in calls.items():
            default = triton_fused.options(sums.radial, env, back=kernel == "backward")
            yield tuning.key(kernel, shape, grade(env)), default, call


def _forward(where: Any, radial: Any, z: Tensor | None, env: Tensor) -> tuple[Tensor, ...]:
    env.fill_(torch.nan)  # what nobody writes shows
    triton_fused.forward(where, radial, z, env)
    return (env.float().sum(dim=0) if grade(env) == torch.float32 else env.clone(),)


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
    neighbours = NeighbourList(model.rcut, 0.0)
    cell = per_side * spacing * np.eye(3)
    neighbours.update(x, cell, np.ones(3, dtype=bool))
    geometry: Geometry = neighbours.geometry(x, cell).to(device)
    kinds = torch.arange(len(x), device=device, dtype=torch.int32) % len(model.species)
    return step.engine.where(kinds, geometry)
