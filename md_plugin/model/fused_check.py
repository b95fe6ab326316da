"""The first use of fused layers on a GPU: tiny problems, of which the answer is known."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from md_plugin.kernels import (
    radial_reference,
    reference,
    triton_arrays,
    triton_fused,
    triton_halves,
    triton_matmul,
)
from md_plugin.kernels.radial_reference import Cutoff
from md_plugin.kernels.registry import BackendError
from md_plugin.model.radial import N_COMPONENTS, TensorComponents
from md_plugin.pairs import Geometry, Pairs

RCUT = 3.5


class _Problem:
    """Four receivers and a ghost, or five receivers, of which each sees all others.

    Five sensitivities, seven features, three of them hidden.
    """

    def __init__(self, n_recv: int, device: torch.device, dtype: torch.dtype, order: int):
        self.generator, self.device, self.dtype = torch.Generator().manual_seed(0), device, dtype
        receiver, sender = (~torch.eye(5, dtype=torch.bool))[:n_recv].nonzero().unbind(dim=1)
        self.pairs, _ = Pairs.from_edges(receiver, sender, n_recv, 5)
        self.species = torch.tensor([0, 2, 1, 2, 0])
        self.x, self.z = self.normal(5, 3).double(), self.normal(5, 7)
        self.ge = self.normal(n_recv, N_COMPONENTS[order], 5, 7)
        self.mu = torch.linspace(0.8, 2.8, 5).to(dtype)

    def normal(self, *shape: int) -> Tensor:
        """Random numbers."""
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(self.dtype)

    def there(self) -> tuple[triton_arrays.Geometry, triton_arrays.Radial]:
        """As the kernels take it."""
        geometry = Geometry(self.x, self.pairs).to(self.device)
        rows = geometry.pairs.row_ptr, geometry.pairs.sender
        species = self.species.int().to(self.device)
        mu = self.mu.to(self.device)
        radial = triton_arrays.Radial.build(mu, 2 * mu, RCUT)
        return triton_arrays.Geometry(geometry.x, *rows, species=species), radial


@cache
def self_check(device: torch.device, dtype: torch.dtype, order: int, fast: bool = False) -> None:
    """Compare the kernels with autograd, once per device, dtype and order.

    Raises:
        BackendError: a kernel is wrong.
    """
    problem = _Problem(4, device, dtype, order)
    where, radial = problem.there()
    for one_hot, n_half in ((False, 2), (True, 2), (False, 1))[: 3 if fast else 2]:
        sent = torch.eye(7, dtype=dtype)[problem.species] if one_hot else problem.z
        want = _expected(problem, sent)
        z, ge = (_operand(x.to(device), n_half) for x in (sent, problem.ge))
        found, env = triton_arrays.Gradients(where, 7, dtype), torch.empty_like(ge)
        triton_fused.forward(where, radial, None if one_hot else z, env)
        triton_fused.backward(where, radial, None if one_hot else z, ge, found)
        got = (_sum(env), found.forces, found.messages)[: 2 if one_hot else 3]
        grade = triton_arrays.grade(ge)
        rounding = (4 if n_half == 1 else 64) * torch.finfo(grade).eps
        for name, a, b in zip(("env", "forces", "messages"), got, want, strict=False):
            _compare(name, a, b, rounding, ge)
        if dtype == torch.float32:
            _product_check(device, n_half)


@cache
def _product_check(device: torch.device, n_half: int) -> None:
    """Halves and their products, as for m = env V and for dE/denv, once per device and n_half.

    Raises:
        BackendError: a kernel is wrong.
    """
    problem = _Problem(4, device, torch.float32, 0)
    a, b = (problem.normal(*shape).to(device) for shape in ((9, 40), (40, 24)))
    powers, scale = (a.new_empty(()), a.new_empty(())), a.new_empty(2, len(a))
    parts = [x.new_empty(n_half, *x.shape, dtype=torch.float16) for x in (a, a, b)]
    whole, rows, weight = parts
    triton_halves.split(a, whole, powers[0])
    triton_halves.split(b, weight, powers[1])
    triton_halves.split_rows(a, rows, scale, powers[1], powers[0])
    m, ge = a.new_empty(9, 24), whole.new_empty(n_half, 9, 24)
    counters = triton_matmul.counters(device)
    triton_matmul.product(whole, weight, m, counters, powers)
    triton_matmul.product(rows, weight, ge, counters)
    want = a.double() @ b.double()
    rounding = (4 if n_half == 1 else 64) * torch.finfo(triton_arrays.grade(ge)).eps
    _compare("products", m, want, rounding, ge)
    _compare("products of rows", _sum(ge) * scale[0, :, None], want, rounding, ge)
    _compare("powers", scale[1], scale[0] * powers[0], 0.0, ge)


def _operand(x: Tensor, n_half: int = 2) -> Tensor:
    """As kernels take it: halves, or float64."""
    return x if x.dtype == torch.float64 else triton_arrays.halves(x, n_half)


def _sum(array: Tensor) -> Tensor:
    return array if array.dtype == torch.float64 else array.float().sum(dim=0)


@cache
def mirror_check(device: torch.device, dtype: torch.dtype, order: int) -> None:
    """Compare `triton_fused.mirror` with what atomics find, once per device, dtype and order.

    Raises:
        BackendError: a kernel is wrong.
    """
    problem = _Problem(5, device, dtype, order)
    where, radial = problem.there()
    g, weight = problem.normal(5, N_COMPONENTS[order], 3), problem.normal(5, 7, 3)
    g, weight, z = (t.to(device) for t in (g, weight, problem.z))
    ge = _operand(torch.einsum("icb,nab->icna", g, weight).contiguous())
    all_at_once, own = (triton_arrays.Gradients(where, 7, dtype, own) for own in (False, True))
    for found in (all_at_once, own):
        triton_fused.backward(where, radial, _operand(z), ge, found)
    q = torch.einsum("ia,nab->inb", z, weight).contiguous()
    h = torch.empty_like(q)
    triton_fused.mirror(where, radial, g, q, h, own)
    messages = torch.einsum("inb,nab->ia", h, weight)
    rounding = 64 * torch.finfo(dtype).eps
    _compare("mirrored forces", own.forces, all_at_once.forces, rounding, ge)
    _compare("mirrored messages", messages, all_at_once.messages, rounding, ge)


def _compare(name: str, got: Tensor, want: Tensor, rounding: float, ge: Tensor) -> None:
    got, want = got.double().cpu(), want.double().cpu()
    error = float((got - want).abs().max())
    if not error <= rounding * float(want.abs().max()):
        raise BackendError(
            f"backend 'triton' computes wrong {name} of a fused layer in {ge.dtype} on "
            f"{ge.device} (largest difference {error:.1e}); choose backend='torch' on this "
            "machine, and report this with your versions"
        )


def _expected(problem: _Problem, sent: Tensor) -> tuple[Tensor, ...]:
    """env, forces and dE/dz by the closed sums' reference, in float64."""
    mu, z, ge = (t.double() for t in (problem.mu, sent, problem.ge))
    with torch.enable_grad():
        x, z = problem.x.clone().requires_grad_(), z.requires_grad_()
        r_ij = Geometry(x, problem.pairs).r_ij()
        r = torch.linalg.vector_norm(r_ij, dim=1)
        sense = radial_reference.sensitivity(r, mu, 2 * mu, Cutoff(RCUT, RCUT))
        components = TensorComponents(N_COMPONENTS.index(ge.shape[1]))
        stacked = reference.stack(components(r_ij / r[:, None]), sense)
        env = reference.envsum(stacked, z, problem.pairs).view_as(ge)
        gx, gz = torch.autograd.grad((env * ge).sum(), (x, z))
    return env.detach(), -gx, gz
