"""Sensitivities on the GPU with Triton: value, slope and curvature, one pass over pairs each.

A program has a block of pairs, and goes over their sensitivities in blocks. What depends on r alone
is computed once per pair. Sums over pairs, for the gradients of mu and sigma, are taken in the
dtype of the network within a program, and over programs in float64, in the order of the pairs:
no atomics, so two runs agree to the last bit.

rcut and end are read from the device: one compiled kernel serves all models with as many
sensitivities, and any number of pairs.

Equations and arguments: `radial_reference`. u is taken as (mu - r) / (r mu), which does not cancel.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from md_plugin.kernels.radial_reference import FAR, Cutoff, Direction, Gradients
from md_plugin.kernels.triton_parts import (
    OPTIONS,
    SIN_TERMS,
    cosine_cutoff,
    on_device,
    power_of_two,
)

_LIMIT = tl.constexpr(FAR / 0.6931471805599453)  # of powers of two


@triton.jit
def _gaussian(t):
    exponent = t * t * -0.7213475204444817
    return tl.where(exponent <= _LIMIT, 0.0, tl.exp2(exponent))


@triton.jit
def _offset(r, q, mu, sigma, nu, n_nu):
    """u, t (pairs, nu), and 1/mu, sigma (1, nu)."""
    centre = tl.load(mu + nu, mask=nu < n_nu, other=1.0)[None, :]
    width = tl.load(sigma + nu, mask=nu < n_nu, other=1.0)[None, :]
    inverse = 1.0 / centre
    u = (centre - r[:, None]) * (q[:, None] * inverse)
    return u, width * u, inverse, width


@triton.jit(do_not_specialize=["n_pair"])
def _sensitivity(
    r, mu, sigma, limits, sense, n_pair, n_nu,
    TERMS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr,
):  # fmt: skip
    n_nu = n_nu // ALIGN * ALIGN
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    distance = tl.load(r + p, mask=p < n_pair, other=1.0)
    q = 1.0 / distance
    c = cosine_cutoff(distance, tl.load(limits), tl.load(limits + 1), TERMS)[0]
    for nu0 in range(0, n_nu, BLOCK_NU):
        nu = nu0 + tl.arange(0, BLOCK_NU)
        t = _offset(distance, q, mu, sigma, nu, n_nu)[1]
        tl.store(
            sense + p[:, None] * n_nu + nu[None, :],
            _gaussian(t) * c[:, None],
            mask=(p < n_pair)[:, None] & (nu < n_nu)[None, :],
        )


@triton.jit
def _store_sums(sums, row, nu, n_nu, moment):
    tl.store(
        sums + (tl.program_id(0).to(tl.int64) * 3 + row) * n_nu + nu,
        tl.sum(moment, axis=0),
        mask=nu < n_nu,
    )


@triton.jit(do_not_specialize=["n_pair"])
def _slope(
    grad, r, mu, sigma, limits, grad_r, sums, n_pair, n_nu,
    TERMS: tl.constexpr, TRAINED: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr,
):  # fmt: skip
    """Writes grad_r, and the sums over pairs of g s t and g s u, where parameters are trained."""
    n_nu = n_nu // ALIGN * ALIGN
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    distance = tl.load(r + p, mask=p < n_pair, other=1.0)
    q = 1.0 / distance
    c, c1, _c2 = cosine_cutoff(distance, tl.load(limits), tl.load(limits + 1), TERMS)
    total = tl.zeros_like(distance)
    for nu0 in range(0, n_nu, BLOCK_NU):
        nu = nu0 + tl.arange(0, BLOCK_NU)
        u, t, _inverse, width = _offset(distance, q, mu, sigma, nu, n_nu)
        live = (p < n_pair)[:, None] & (nu < n_nu)[None, :]
        g = tl.load(grad + p[:, None] * n_nu + nu[None, :], mask=live, other=0.0)
        weight = g * _gaussian(t)
        total += tl.sum(weight * (c1[:, None] + (c * q * q)[:, None] * width * t), axis=1)
        if TRAINED:
            moment = weight * c[:, None] * t
            _store_sums(sums, 0, nu, n_nu, moment)
            _store_sums(sums, 1, nu, n_nu, moment * u)
    tl.store(grad_r + p, total, mask=p < n_pair)


@triton.jit(do_not_specialize=["n_pair"])
def _curvature(
    grad, r, mu, sigma, limits, rho, alpha, beta, h, grad_r, sums, n_pair, n_nu,
    TERMS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr,
):  # fmt: skip
    """Writes h, grad_r and the sums over pairs of g G e, g G c t and g G (e u + c t D u)."""
    n_nu = n_nu // ALIGN * ALIGN
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    distance = tl.load(r + p, mask=p < n_pair, other=1.0)
    along = tl.load(rho + p, mask=p < n_pair, other=0.0)
    q = 1.0 / distance
    c, c1, c2 = cosine_cutoff(distance, tl.load(limits), tl.load(limits + 1), TERMS)
    q2 = (q * q)[:, None]
    rho_q2 = along[:, None] * q2
    rho_c1, rho_c2 = (along * c1)[:, None], (along * c2)[:, None]
    c, c1 = c[:, None], c1[:, None]
    total = tl.zeros_like(distance)
    for nu0 in range(0, n_nu, BLOCK_NU):
        nu = nu0 + tl.arange(0, BLOCK_NU)
        u, t, inverse, width = _offset(distance, q, mu, sigma, nu, n_nu)
        a = tl.load(alpha + nu, mask=nu < n_nu, other=0.0)[None, :]
        b = tl.load(beta + nu, mask=nu < n_nu, other=0.0)[None, :]
        place = p[:, None] * n_nu + nu[None, :]
        live = (p < n_pair)[:, None] & (nu < n_nu)[None, :]
        gaussian = _gaussian(t)
        du = a * inverse * inverse - rho_q2
        dt = width * du + b * u
        across = rho_c1 - c * t * dt
        tl.store(h + place, gaussian * across, mask=live)
        weight = gaussian * tl.load(grad + place, mask=live, other=0.0)
        e = t * across + c * dt
        _store_sums(sums, 0, nu, n_nu, weight * e)
        _store_sums(sums, 1, nu, n_nu, weight * c * t)
        _store_sums(sums, 2, nu, n_nu, weight * (e * u + c * t * du))
        of_r = q2 * (width * e + c * t * (b - 2.0 * width * along[:, None] * q[:, None]))
        total += tl.sum(weight * (of_r + rho_c2 - c1 * t * dt), axis=1)
    tl.store(grad_r + p, total, mask=p < n_pair)


def tiles(n_nu: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes of the kernels, and a power of two that divides n_nu.

    4 kB of each array keep the longest kernel in registers. Knowing that a row starts at a multiple
    of 16 bytes, Triton gives a thread few pairs and many sensitivities of each.
    """
    block_nu = power_of_two(n_nu, 1, 32)
    return {
        "ALIGN": math.gcd(n_nu, 16),
        "BLOCK_P": 4096 // dtype.itemsize // block_nu,
        "BLOCK_NU": block_nu,
    }


def _constants(r: Tensor, n_nu: int) -> dict[str, Any]:
    return {"TERMS": SIN_TERMS[r.dtype]} | tiles(n_nu, r.dtype) | OPTIONS


@cache
def _limits(cutoff: Cutoff, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2,) rcut and end. Kept for good: a recorded graph of launches may still read them."""
    return torch.tensor(cutoff, dtype=dtype, device=device)


def _programs(r: Tensor, n_nu: int) -> int:
    return 0 if n_nu == 0 else triton.cdiv(len(r), tiles(n_nu, r.dtype)["BLOCK_P"])


def sensitivity(r: Tensor, mu: Tensor, sigma: Tensor, cutoff: Cutoff) -> Tensor:
    """s (n_pair, n_nu)."""
    sense = r.new_empty(len(r), len(mu))
    if sense.numel():
        with on_device(r):
            _sensitivity[(_programs(r, len(mu)),)](
                r, mu, sigma, _limits(cutoff, r.dtype, r.device), sense, *sense.shape,
                **_constants(r, len(mu)),
            )  # fmt: skip
    return sense


def sensitivity_slope(
    grad: Tensor, r: Tensor, mu: Tensor, sigma: Tensor, cutoff: Cutoff, parameters: bool = True
) -> Gradients:
    """g (n_pair, n_nu) -> dr (n_pair,), dmu and dsigma (n_nu,), or None without `parameters`."""
    n_nu, n_program = len(mu), _programs(r, len(mu))
    grad_r = r.new_empty(len(r)) if n_nu else r.new_zeros(len(r))
    sums = r.new_empty(n_program if parameters else 0, 3, n_nu)
    if n_program:
        with on_device(r):
            _slope[(n_program,)](
                grad, r, mu, sigma, _limits(cutoff, r.dtype, r.device), grad_r, sums, len(r), n_nu,
                TRAINED=parameters, **_constants(r, n_nu),
            )  # fmt: skip
    if not parameters:
        return grad_r, None, None
    of_t, of_u = sums[:, :2].double().sum(dim=0)
    return grad_r, (-of_t * sigma / mu.square()).to(mu.dtype), -of_u.to(mu.dtype)


def sensitivity_curvature(
    grad: Tensor, r: Tensor, mu: Tensor, sigma: Tensor, along: Direction, cutoff: Cutoff
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sum g h: h (n_pair, n_nu), those in r (n_pair,), mu and sigma (n_nu,)."""
    n_nu, n_program = len(mu), _programs(r, len(mu))
    h, grad_r = grad.new_empty(grad.shape), r.new_empty(len(r)) if n_nu else r.new_zeros(len(r))
    sums = r.new_empty(n_program, 3, n_nu)
    if n_program:
        with on_device(r):
            _curvature[(n_program,)](
                grad, r, mu, sigma, _limits(cutoff, r.dtype, r.device), *along, h, grad_r, sums,
                len(r), n_nu, **_constants(r, n_nu),
            )  # fmt: skip
    steep, flat, of_sigma = sums.double().sum(dim=0)
    inverse, alpha, beta = mu.double().reciprocal(), along[1], along[2]
    twist = beta - 2.0 * alpha * sigma * inverse
    of_mu = -inverse.square() * (sigma * steep + twist * flat)
    return h, grad_r, of_mu.to(mu.dtype), -of_sigma.to(mu.dtype)
