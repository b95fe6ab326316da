"""The sensitivities as autograd Functions: a family that is closed under differentiation.

    s                   = sensitivity(r, mu, sigma)
    dr, dmu, dsigma     = slope(g; r, mu, sigma)            of sum g s
    dg, dr, dmu, dsigma = curvature(g; r, mu, sigma; along) of sum dr rho + sum dmu alpha + ...

Each recomputes s from distances, so that between forward and backward passes nothing of the size
of s is kept but g. Training on forces needs these three and no more; whatever comes after them is
differentiated through the reference's equations: right to any order, and slow.

This file knows no backend: the raw kernels come in as a `SumKernels`. Their equations are in
`radial_reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from md_plugin.kernels import radial_reference
from md_plugin.kernels.closure import SumKernels
from md_plugin.kernels.radial_reference import Cutoff, Gradients


class Sensitivity(torch.autograd.Function):
    """s = sensitivity(r, mu, sigma)."""

    @staticmethod
    def forward(
        ctx: Any, kernels: SumKernels, r: Tensor, mu: Tensor, sigma: Tensor, cutoff: Cutoff
    ) -> Tensor:
        """Runs the raw kernel."""
        ctx.save_for_backward(r, mu, sigma)
        ctx.kernels, ctx.cutoff = kernels, cutoff
        return kernels.sensitivity(*_contiguous(r, mu, sigma), cutoff)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the slope; those of mu and sigma only where one of them is trained."""
        trained = any(ctx.needs_input_grad[2:4])
        found = Slope.apply(ctx.kernels, ctx.cutoff, trained, grads[0], *ctx.saved_tensors)
        return None, *found, None


class Slope(torch.autograd.Function):
    """dr, dmu, dsigma = slope(g; r, mu, sigma); dmu and dsigma are None where not `trained`."""

    @staticmethod
    def forward(
        ctx: Any, kernels: SumKernels, cutoff: Cutoff, trained: bool, *inputs: Tensor
    ) -> Gradients:
        """Runs the raw kernel on g, r, mu, sigma."""
        ctx.save_for_backward(*inputs)
        ctx.kernels, ctx.cutoff = kernels, cutoff
        grad, r, mu, sigma = _contiguous(*inputs)
        return kernels.sensitivity_slope(grad, r, mu, sigma, cutoff, trained)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients by the curvature."""
        rho, alpha, beta = grads
        mu = ctx.saved_tensors[2]
        along = (rho, *(torch.zeros_like(mu) if x is None else x for x in (alpha, beta)))
        found = Curvature.apply(ctx.kernels, ctx.cutoff, *ctx.saved_tensors, *along)
        return None, None, None, *found


class Curvature(torch.autograd.Function):
    """dg, dr, dmu, dsigma = curvature(g; r, mu, sigma; rho, alpha, beta)."""

    @staticmethod
    def forward(ctx: Any, kernels: SumKernels, cutoff: Cutoff, *inputs: Tensor) -> Any:
        """Runs the raw kernel."""
        ctx.save_for_backward(*inputs)
        ctx.cutoff = cutoff
        grad, r, mu, sigma, *along = _contiguous(*inputs)
        return kernels.sensitivity_curvature(grad, r, mu, sigma, tuple(along), cutoff)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Third derivatives, by autograd through the reference's equations."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views: where the reference's graph ends, and the caller's goes on.
            inputs = [x.view_as(x) for x in ctx.saved_tensors]
            grad, r, mu, sigma, *along = inputs
            outputs = radial_reference.sensitivity_curvature(
                grad, r, mu, sigma, tuple(along), ctx.cutoff
            )
            known = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
            wanted = [x for x in inputs if x.requires_grad]
            found = torch.autograd.grad(
                *([y for y, _ in known], wanted, [g for _, g in known]),
                create_graph=again,
                allow_unused=True,
            )
        left = iter(found)
        return None, None, *(next(left) if x.requires_grad else None for x in inputs)


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def check_radial(r: Tensor, mu: Tensor, sigma: Tensor) -> None:
    """Raise where distances and parameters of sensitivities do not fit each other.

    Raises:
        ValueError: wrong shape or device; says what each argument has.
        TypeError: dtypes differ or are not float32 / float64.
    """
    tensors = (r, mu, sigma)
    shapes = [tuple(x.shape) for x in tensors]
    if any(len(shape) != 1 for shape in shapes) or shapes[1] != shapes[2]:
        raise ValueError(
            "sensitivity: needs r (n_pair,), mu (n_nu,) and sigma (n_nu,), got shapes "
            + ", ".join(map(str, shapes))
        )
    if len({x.device for x in tensors}) > 1:
        devices = ", ".join(str(x.device) for x in tensors)
        raise ValueError(f"sensitivity: r, mu and sigma are on {devices}")
    if len({x.dtype for x in tensors}) > 1 or r.dtype not in (torch.float32, torch.float64):
        dtypes = ", ".join(str(x.dtype) for x in tensors)
        raise TypeError(f"sensitivity: needs three float32 or three float64 tensors, got {dtypes}")
