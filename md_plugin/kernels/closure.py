"""The three sums as autograd Functions: a set that is closed under differentiation.

Each sum is linear in both of its arguments, and its gradients are the other two:

    e = envsum(s, z):    ds = sensesum(de, z)     dz = featsum(de, s)
    s = sensesum(e, z):  de = envsum(ds, z)       dz = featsum(e, ds)
    z = featsum(e, s):   de = envsum(s, dz)       ds = sensesum(e, dz)

so derivatives of any order (forces, training on forces) never leave the set. So is the product of
sensitivities s with tensor components t, its contractions, and its derivative:

    g = stack(t, s):                dt, ds = fold(dg, t, s)
    a, b = fold(g, t, s):           dt, ds = fold(g, da, db)     dg = stack_along(t, s, da, db)
    g = stack_along(t, s, t', s'):  dt, ds' = fold(dg, t, s')    dt', ds = fold(dg, t', s)

This file knows no backend: the raw kernels come in as a `SumKernels`. The sensitivities themselves
are a closed family as well: `md_plugin.kernels.sensitivity`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from md_plugin.kernels import radial_reference, reference
from md_plugin.kernels.radial_reference import Gradients
from md_plugin.pairs import Pairs

RawSum = Callable[[Tensor, Tensor, Pairs], Tensor]


@dataclass(frozen=True)
class SumKernels:
    """The raw sums of one backend, and its sensitivities, with the arguments of the references.

    Contiguous tensors in, tensors out, no autograd.
    """

    envsum: RawSum
    sensesum: RawSum
    featsum: RawSum
    stack: Callable[[Tensor, Tensor], Tensor] = reference.stack
    fold: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = reference.fold
    stack_along: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = reference.stack_along
    sensitivity: Callable[..., Tensor] = radial_reference.sensitivity
    sensitivity_slope: Callable[..., Gradients] = radial_reference.sensitivity_slope
    sensitivity_curvature: Callable[..., tuple[Tensor, ...]] = (
        radial_reference.sensitivity_curvature
    )


class EnvSum(torch.autograd.Function):
    """env = envsum(sense, features)."""

    @staticmethod
    def forward(
        ctx: Any, kernels: SumKernels, sense: Tensor, features: Tensor, pairs: Pairs
    ) -> Tensor:
        """Runs the raw kernel."""
        ctx.save_for_backward(sense, features)
        ctx.kernels, ctx.pairs = kernels, pairs
        return kernels.envsum(sense.contiguous(), features.contiguous(), pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the other two sums."""
        (grad_env,) = grads
        sense, features = ctx.saved_tensors
        k, pairs = ctx.kernels, ctx.pairs
        grad_sense = (
            SenseSum.apply(k, grad_env, features, pairs) if ctx.needs_input_grad[1] else None
        )
        grad_feat = FeatSum.apply(k, grad_env, sense, pairs) if ctx.needs_input_grad[2] else None
        return None, grad_sense, grad_feat, None


class SenseSum(torch.autograd.Function):
    """sense = sensesum(env, features)."""

    @staticmethod
    def forward(
        ctx: Any, kernels: SumKernels, env: Tensor, features: Tensor, pairs: Pairs
    ) -> Tensor:
        """Runs the raw kernel."""
        ctx.save_for_backward(env, features)
        ctx.kernels, ctx.pairs = kernels, pairs
        return kernels.sensesum(env.contiguous(), features.contiguous(), pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the other two sums."""
        (grad_sense,) = grads
        env, features = ctx.saved_tensors
        k, pairs = ctx.kernels, ctx.pairs
        grad_env = EnvSum.apply(k, grad_sense, features, pairs) if ctx.needs_input_grad[1] else None
        grad_feat = FeatSum.apply(k, env, grad_sense, pairs) if ctx.needs_input_grad[2] else None
        return None, grad_env, grad_feat, None


class FeatSum(torch.autograd.Function):
    """features = featsum(env, sense)."""

    @staticmethod
    def forward(ctx: Any, kernels: SumKernels, env: Tensor, sense: Tensor, pairs: Pairs) -> Tensor:
        """Runs the raw kernel."""
        ctx.save_for_backward(env, sense)
        ctx.kernels, ctx.pairs = kernels, pairs
        return kernels.featsum(env.contiguous(), sense.contiguous(), pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the other two sums."""
        (grad_feat,) = grads
        env, sense = ctx.saved_tensors
        k, pairs = ctx.kernels, ctx.pairs
        grad_env = EnvSum.apply(k, sense, grad_feat, pairs) if ctx.needs_input_grad[1] else None
        grad_sense = SenseSum.apply(k, env, grad_feat, pairs) if ctx.needs_input_grad[2] else None
        return None, grad_env, grad_sense, None


class Stack(torch.autograd.Function):
    """stacked = stack(components, sense)."""

    @staticmethod
    def forward(ctx: Any, kernels: SumKernels, components: Tensor, sense: Tensor) -> Tensor:
        """Runs the raw kernel."""
        ctx.save_for_backward(components, sense)
        ctx.kernels = kernels
        return kernels.stack(components.contiguous(), sense.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the contractions."""
        return None, *Fold.apply(ctx.kernels, grads[0], *ctx.saved_tensors)


class Fold(torch.autograd.Function):
    """components', sense' = fold(stacked, components, sense)."""

    @staticmethod
    def forward(
        ctx: Any, kernels: SumKernels, stacked: Tensor, components: Tensor, sense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs the raw kernel."""
        ctx.save_for_backward(stacked, components, sense)
        ctx.kernels = kernels
        return kernels.fold(stacked.contiguous(), components.contiguous(), sense.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the product's derivative and by the contractions."""
        stacked, components, sense = ctx.saved_tensors
        k, needed = ctx.kernels, ctx.needs_input_grad
        grad_stack = StackAlong.apply(k, components, sense, *grads) if needed[1] else None
        others = Fold.apply(k, stacked, *grads) if needed[2] or needed[3] else (None, None)
        return None, grad_stack, *others


class StackAlong(torch.autograd.Function):
    """stacked = stack_along(components, sense, components', sense')."""

    @staticmethod
    def forward(ctx: Any, kernels: SumKernels, *inputs: Tensor) -> Tensor:
        """Runs the raw kernel."""
        ctx.save_for_backward(*inputs)
        ctx.kernels = kernels
        return kernels.stack_along(*(x.contiguous() for x in inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the contractions, crosswise."""
        components, sense, d_components, d_sense = ctx.saved_tensors
        grad_comp, grad_d_sense = Fold.apply(ctx.kernels, grads[0], components, d_sense)
        grad_d_comp, grad_sense = Fold.apply(ctx.kernels, grads[0], d_components, sense)
        return None, grad_comp, grad_sense, grad_d_comp, grad_d_sense


def check_shapes(name: str, first: Tensor, second: Tensor, pairs: Pairs) -> None:
    """Raise where arguments of the sum `name` do not fit each other or the pairs.

    Raises:
        ValueError: wrong shape; says which argument, what it has and what it must have.
        TypeError: dtypes differ or are not float32 / float64.
    """
    per_pair, per_atom = ("n_pair", pairs.n_pair), ("n_send", pairs.n_send)
    rules = {
        "envsum": (("sense", first, 2, per_pair), ("features", second, 2, per_atom)),
        "sensesum": (
            ("env", first, 3, ("n_recv", pairs.n_recv)),
            ("features", second, 2, per_atom),
        ),
        "featsum": (("env", first, 3, ("n_recv", pairs.n_recv)), ("sense", second, 2, per_pair)),
    }
    for label, tensor, ndim, (dim, rows) in rules[name]:
        if tensor.ndim != ndim or tensor.shape[0] != rows:
            raise ValueError(
                f"{name}: {label} must have {ndim} dimensions and {dim} = {rows} rows, "
                f"got shape {tuple(tensor.shape)}"
            )
        if tensor.device != pairs.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, the pairs on {pairs.device}")
    inner = {"sensesum": 2, "featsum": 1}.get(name)
    if inner is not None and first.shape[inner] != second.shape[1]:
        raise ValueError(f"{name}: shapes {tuple(first.shape)} and {tuple(second.shape)} differ")
    if first.dtype != second.dtype or first.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: needs two float32 or two float64 tensors, got {first.dtype} and "
            f"{second.dtype}"
        )
