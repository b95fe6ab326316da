"""Sensitivities times tensor components: the product, its contractions, and every derivative."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_cases import (
    DTYPES,
    NAMES,
    absence,
    backend_parameters,
    poisoned_memory,
    use_variant,
)
from torch.autograd import gradcheck, gradgradcheck

from md_plugin.kernels import BackendError, get_backend, reference
from md_plugin.kernels.closure import Fold, StackAlong
from md_plugin.kernels.registry import Backend

SHAPES = [(0, 4, 20), (1, 1, 1), (17, 4, 20), (5, 9, 7), (3, 16, 33)]  # pairs, components, nu


@pytest.fixture(params=backend_parameters(NAMES))
def backend(request, monkeypatch):
    return use_variant(request.param, monkeypatch)


def problem(n_pair, n_comp, n_nu, dtype):
    """components, sense, one more of each, stacked."""
    generator = torch.Generator().manual_seed(1)
    widths = (n_comp, n_nu, n_comp, n_nu, n_comp * n_nu)
    return [torch.randn(n_pair, n, generator=generator, dtype=dtype) for n in widths]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_thread", (1, 3))
def test_kernels(backend, shape, dtype, n_thread, monkeypatch):
    """Against einsum in float64; a sum of n products is off by n eps / 2 of its terms at most."""
    if backend.name == "numba":
        from md_plugin.kernels import numba_cpu

        monkeypatch.setattr(numba_cpu, "threads", lambda: n_thread)
    t, s, dt, ds, g = problem(*shape, dtype)
    a, b, da, db, stacked = (x.double() for x in (t, s, dt, ds, g))
    cube = stacked.view(*shape)
    k = backend.kernels
    with poisoned_memory():
        got = (k.stack(t, s), *k.fold(g, t, s), k.stack_along(t, s, dt, ds))
    want = (
        torch.einsum("pc,pn->pcn", a, b).flatten(1),
        torch.einsum("pcn,pn->pc", cube, b),
        torch.einsum("pcn,pc->pn", cube, a),
        (torch.einsum("pc,pn->pcn", a, db) + torch.einsum("pc,pn->pcn", da, b)).flatten(1),
    )
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        # 33 products of numbers up to 4
        assert torch.allclose(x.double(), y, rtol=0.0, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("subset", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 4, 3)])
def test_gradients(backend, subset, shape):
    inputs = [
        x.requires_grad_(w) for x, w in zip(problem(*shape, torch.float64)[:2], subset, strict=True)
    ]
    fast = backend.name == "triton"  # interpreted kernels take milliseconds
    gradcheck(backend.stack, inputs, fast_mode=fast)
    gradgradcheck(backend.stack, inputs, fast_mode=fast)


@pytest.mark.parametrize("function, order", [(Fold, (4, 0, 1)), (StackAlong, (0, 1, 2, 3))])
def test_gradients_of_what_derives_from_it(backend, function, order):
    tensors = problem(2, 4, 3, torch.float64)
    fast = backend.name == "triton"
    for subset in product((False, True), repeat=len(order)):
        if sum(subset) in ((1, len(order)) if fast else range(1, len(order) + 1)):
            inputs = [
                tensors[k].detach().clone().requires_grad_(w)
                for k, w in zip(order, subset, strict=True)
            ]
            gradcheck(lambda *x: function.apply(backend.kernels, *x), inputs, fast_mode=fast)
            gradgradcheck(lambda *x: function.apply(backend.kernels, *x), inputs, fast_mode=fast)


def test_fourth_derivative(backend):
    found = []
    for stack in (backend.stack, reference.stack):
        inputs = [(0.3 * x).requires_grad_() for x in problem(3, 4, 5, torch.float64)[:2]]
        value = stack(*inputs).pow(3).sum()
        for _ in range(4):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum(g.sin().sum() for g in grads)
        found.append(grads)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


def test_kernels_are_a_backends_own():
    """What a backend does not have itself would come from the reference, slowly."""
    for name in ("numba", "triton"):
        if not absence(name):
            kernels = get_backend(name).kernels
            for product_name in ("stack", "fold", "stack_along"):
                assert getattr(kernels, product_name) is not getattr(reference, product_name)


@pytest.mark.parametrize("name", ("stack", "fold", "stack_along"))
def test_self_check_catches_a_broken_kernel(name):
    def wrong(*args):
        right = getattr(reference, name)(*args)
        return (right[0] * (1 + 1e-4), right[1]) if name == "fold" else right * (1 + 1e-4)

    kernels = replace(get_backend("torch").kernels, **{name: wrong})
    with pytest.raises(BackendError, match=f"computes a wrong {name} in torch.float32"):
        Backend("broken", ("cpu",), kernels).stack(torch.ones(1, 4), torch.ones(1, 3))


@pytest.mark.parametrize("name", ("numba", "triton"))
def test_nan_shows(name):
    if absence(name):
        pytest.skip(absence(name))
    t, s, dt, ds, g = problem(5, 4, 20, torch.float32)
    g[2, 7] = s[3, 1] = torch.nan
    k = get_backend(name).kernels
    components, sense = k.fold(g, t, s)
    assert components.isnan().nonzero().tolist() == [[2, 0], [3, 0], [3, 1], [3, 2], [3, 3]]
    assert sense.isnan().nonzero().tolist() == [[2, 7]]
    assert k.stack(t, s).isnan().sum() == k.stack_along(t, s, dt, ds).isnan().sum() == 4
