"""Small problems on which a backend's kernels are compared with the reference in float64.

Three families, each checked when it is first used, so that nobody waits for the others to be
compiled: the sums, the products with tensor components, the sensitivities. All numbers are of order
one, and no size is a multiple of a number of lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from md_plugin.kernels import radial_reference, reference
from md_plugin.kernels.closure import SumKernels
from md_plugin.kernels.radial_reference import Cutoff
from md_plugin.pairs import Pairs

# The name of a kernel, what it computes, and what is right.
Answers = Iterator[tuple[str, Tensor, Tensor]]
Calls = Iterable[tuple[str, tuple[Any, ...]]]


def sum_answers(kernels: SumKernels, device: str, dtype: torch.dtype) -> Answers:
    """One empty row, a self-image pair, one ghost; 5 sensitivities and 7 features."""
    receiver, sender = torch.tensor([2, 0, 0, 2, 0]), torch.tensor([3, 1, 0, 0, 3])
    pairs = Pairs.from_edges(receiver, sender, n_recv=3, n_send=4)[0].to(device)
    sense, features, env = _normal(device, dtype, (5, 5), (4, 7), (3, 5, 7))
    calls = (
        ("envsum", (sense, features, pairs)),
        ("sensesum", (env, features, pairs)),
        ("featsum", (env, sense, pairs)),
    )
    return _answers(kernels, reference, calls)


def product_answers(kernels: SumKernels, device: str, dtype: torch.dtype) -> Answers:
    """3 pairs, 4 components, 21 sensitivities."""
    shapes = ((3, 4), (3, 21), (3, 4), (3, 21), (3, 84))
    t, s, dt, ds, stacked = _normal(device, dtype, *shapes)
    calls = (("stack", (t, s)), ("fold", (stacked, t, s)), ("stack_along", (t, s, dt, ds)))
    return _answers(kernels, reference, calls)


def radial_answers(kernels: SumKernels, device: str, dtype: torch.dtype) -> Answers:
    """19 pairs, one of them beyond the end, and 21 sensitivities."""
    grad, rho, alpha, beta = _normal(device, dtype, (19, 21), (19,), (21,), (21,))
    r, mu, sigma = (
        torch.linspace(first, last, n, dtype=dtype, device=device)
        for first, last, n in ((1.2, 5.1, 19), (1.0, 4.0, 21), (4.0, 7.0, 21))
    )
    cutoff = Cutoff(5.5, 5.0)
    calls = (
        ("sensitivity", (r, mu, sigma, cutoff)),
        ("sensitivity_slope", (grad, r, mu, sigma, cutoff)),
        ("sensitivity_curvature", (grad, r, mu, sigma, (rho, alpha, beta), cutoff)),
    )
    return _answers(kernels, radial_reference, calls)


FAMILIES: dict[str, Callable[[SumKernels, str, torch.dtype], Answers]] = {
    "sums": sum_answers,
    "products": product_answers,
    "sensitivities": radial_answers,
}


def _normal(device: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=dtype).to(device) for s in shapes]


def _answers(kernels: SumKernels, trusted: Any, calls: Calls) -> Answers:
    for name, arguments in calls:
        got = getattr(kernels, name)(*arguments)
        want = getattr(trusted, name)(*map(_double, arguments))
        several = isinstance(want, tuple)
        for x, y in zip(*((got, want) if several else ((got,), (want,))), strict=True):
            yield name, x, y


def _double(x: Any) -> Any:
    """Tensors in float64, also those in a direction; all else as it is."""
    if type(x) is tuple:
        return tuple(map(_double, x))
    return x.double() if isinstance(x, Tensor) else x
