"""The three sums as autograd Functions: a set that is closed under differentiation.

Each sum is linear in both of its arguments, and its gradients are the other two:

    e = envsum(s, z):    ds = sensesum(de, z)     dz = featsum(de, s)
    s = sensesum(e, z):  de = envsum(ds, z)       dz = featsum(e, ds)
    z = featsum(e, s):   de = envsum(s, dz)       ds = sensesum(e, dz)

so derivatives of any order (forces, training on forces) never leave the set. So is the product of
sensitivities s with tensor components t, and its contractions:

    g = stack(t, s):            dt = fold_components(dg, s)   ds = fold_sense(dg, t)
    s = fold_sense(g, t):       dg = stack(t, ds)             dt = fold_components(g, ds)
    t = fold_components(g, s):  dg = stack(dt, s)             ds = fold_sense(g, dt)

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
RawProduct = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SumKernels:
    """The raw sums of one backend, and its sensitivities, with the arguments of the references.

    Contiguous tensors in, tensors out, no autograd.
    """

    envsum: RawSum
    sensesum: RawSum
    featsum: RawSum
    stack: RawProduct = reference.stack
    fold_sense: RawProduct = reference.fold_sense
    fold_components: RawProduct = reference.fold_components
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
        """Gradients by the two contractions."""
        components, sense = ctx.saved_tensors
        k = ctx.kernels
        grad_comp = FoldComponents.apply(k, grads[0], sense) if ctx.needs_input_grad[1] else None
        grad_sense = FoldSense.apply(k, grads[0], components) if ctx.needs_input_grad[2] else None
        return None, grad_comp, grad_sense


class FoldSense(torch.autograd.Function):
    """sense = fold_sense(stacked, components)."""

    @staticmethod
    def forward(ctx: Any, kernels: SumKernels, stacked: Tensor, components: Tensor) -> Tensor:
        """Runs the raw kernel."""
        ctx.save_for_backward(stacked, components)
        ctx.kernels = kernels
        return kernels.fold_sense(stacked.contiguous(), components.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the product and the other contraction."""
        stacked, components = ctx.saved_tensors
        k = ctx.kernels
        grad_stack = Stack.apply(k, components, grads[0]) if ctx.needs_input_grad[1] else None
        grad_comp = FoldComponents.apply(k, stacked, grads[0]) if ctx.needs_input_grad[2] else None
        return None, grad_stack, grad_comp


class FoldComponents(torch.autograd.Function):
    """components = fold_components(stacked, sense)."""

    @staticmethod
    def forward(ctx: Any, kernels: SumKernels, stacked: Tensor, sense: Tensor) -> Tensor:
        """Runs the raw kernel."""
        ctx.save_for_backward(stacked, sense)
        ctx.kernels = kernels
        return kernels.fold_components(stacked.contiguous(), sense.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the product and the other contraction."""
        stacked, sense = ctx.saved_tensors
        k = ctx.kernels
        grad_stack = Stack.apply(k, grads[0], sense) if ctx.needs_input_grad[1] else None
        grad_sense = FoldSense.apply(k, stacked, grads[0]) if ctx.needs_input_grad[2] else None
        return None, grad_stack, grad_sense


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
