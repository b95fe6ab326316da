"""The closed autograd set: first and second derivatives, for every subset of the inputs."""

import pytest
import torch
from kernel_cases import ARGUMENTS, NAMES, OPS, Case, backend_parameters, use_variant
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from md_plugin.kernels import reference
from md_plugin.kernels.closure import SumKernels
from md_plugin.kernels.registry import Backend

SUBSETS = {"first": (True, False), "second": (False, True), "both": (True, True)}
CASES = {
    "empty row, images, ghost": Case([2, 0, 2, 0], [3, 1, 2, 3], 3, 4, 2, 3),
    "one atom and its images": Case([0, 0], [0, 0], 1, 1, 2, 2),
    "no pairs": Case([], [], 2, 3, 2, 2),
    "no atoms": Case([], [], 0, 0, 2, 2),
}


@pytest.fixture(params=backend_parameters(NAMES))
def backend(request, monkeypatch):
    return use_variant(request.param, monkeypatch)


def problem(op, backend, case, subset, seed=0):
    """A function of two tensors, and the tensors; float64."""
    pairs, perm = case.pairs()
    arrays = case.arrays(torch.float64, seed)
    arrays["sense"] = arrays["sense"][perm]
    inputs = tuple(
        arrays[name].requires_grad_(wanted)
        for name, wanted in zip(ARGUMENTS[op], SUBSETS[subset], strict=True)
    )
    return (lambda first, second: getattr(backend, op)(first, second, pairs)), inputs


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("shape", CASES)
def test_gradients(backend, op, subset, shape):
    function, inputs = problem(op, backend, CASES[shape], subset)
    # Autograd's part is the same for all backends: every element with torch, one random projection
    # with the others. The sums are bilinear: central differences are off by eps / step = 1e-10.
    mode = {"fast_mode": backend.name != "torch", "atol": 1e-8, "rtol": 1e-8}
    gradcheck(function, inputs, **mode)
    gradgradcheck(function, inputs, **mode)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", CASES)
def test_gradients_have_the_shape_of_their_inputs(backend, op, shape):
    """Said apart from gradcheck, which has nothing to compare where an input is empty."""
    function, inputs = problem(op, backend, CASES[shape], "both")
    grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
    assert [g.shape for g in second] == [x.shape for x in inputs]
    if not CASES[shape].receiver:
        assert all(not g.any() for g in (*grads, *second))


@pytest.mark.parametrize("op", OPS)
def test_third_derivative(backend, op):
    """The set is closed, so nothing stops at second order; against plain torch."""
    case = CASES["empty row, images, ghost"]
    plain = Backend("torch, without Functions", ("cpu",), None)
    for name in OPS:
        object.__setattr__(plain, name, getattr(reference, name))
    found = []
    for sums in (backend, plain):
        function, inputs = problem(op, sums, case, "both")
        value = function(*inputs).pow(3).sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        found.append(grads)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("op", OPS)
def test_no_gradient_is_computed_that_nobody_asks_for(op):
    calls = []

    def counted(name):
        def call(*args):
            calls.append(name)
            return getattr(reference, name)(*args)

        return call

    backend = Backend("torch", ("cpu",), SumKernels(*(counted(name) for name in OPS)))
    for subset, n_calls in (("first", 2), ("second", 2), ("both", 3)):
        calls.clear()
        function, inputs = problem(op, backend, CASES["no pairs"], subset)
        function(*inputs).sum().backward()
        assert len(calls) == n_calls


@pytest.mark.parametrize("op", OPS)
def test_a_broken_kernel_fails_gradcheck(op):
    """Any one wrong sum spoils the gradient of the other two."""

    def spoiled(*args):
        return getattr(reference, op)(*args) * (1 + 1e-4)

    sums = {name: getattr(reference, name) for name in OPS} | {op: spoiled}
    backend = Backend("torch", ("cpu",), SumKernels(**sums))  # this name is not self-checked
    for other in OPS:
        function, inputs = problem(other, backend, CASES["empty row, images, ghost"], "both")
        with pytest.raises(GradcheckError):
            gradcheck(function, inputs, atol=1e-8, rtol=1e-8)
