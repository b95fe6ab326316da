"""Sensitivities: the equation, its derivatives to third order, and every backend's kernels."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_cases import DTYPES, NAMES, absence, backend_parameters, use_variant
from model_helpers import STRUCTURES, make_potential
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from md_plugin.kernels import BackendError, get_backend
from md_plugin.kernels import radial_reference as reference
from md_plugin.kernels.radial_reference import Cutoff
from md_plugin.kernels.registry import Backend
from md_plugin.kernels.sensitivity import Slope
from md_plugin.model.radial import Distance
from md_plugin.neighbours import NeighbourList

CUTOFF = Cutoff(6.0, 5.5)
KERNELS = ("sensitivity", "sensitivity_slope", "sensitivity_curvature")
N_NU = (1, 5, 7, 20, 33, 48)  # a last vector with none, some and all of its lanes
N_PAIR = (0, 1, 17, 130)
# Relative to the largest value. Kernels do not round 1/r - 1/mu before sigma multiplies it: what
# is left is some ten roundings (of 1.1e-16, 6e-8), and t^2 of them up to three times as large.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6}
# The plain formula rounds sigma / r and sigma / mu, both up to 100, to 4e-6 in float32.
PLAIN = {torch.float64: 1e-13, torch.float32: 2e-5}
SUBSETS = [subset for subset in product((False, True), repeat=3) if any(subset)]

needs_numba = pytest.mark.skipif(bool(absence("numba")), reason=absence("numba") or "there")


def functions():
    """The reference's kernels through the Functions, as those of other backends are called."""
    kernels = get_backend("torch").kernels
    own = replace(kernels, sensitivity=lambda *args: reference.sensitivity(*args))
    return Backend("torch", ("cpu",), own)


@pytest.fixture(params=[*backend_parameters(NAMES), "functions"])
def backend(request, monkeypatch):
    name = request.param
    return functions() if name == "functions" else use_variant(name, monkeypatch)


def problem(n_pair, n_nu, dtype, seed=0):
    """g, r, mu, sigma, (rho, alpha, beta): distances on both sides of the end, in no order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    r = 0.9 + 5.5 * torch.rand(n_pair, generator=generator, dtype=torch.float64).to(dtype)
    mu = 1.0 / torch.linspace(1 / 5.5, 1 / 1.25, n_nu, dtype=torch.float64).to(dtype)
    sigma = 2.5 * n_nu * (1.0 + 0.1 * normal(n_nu)).abs()
    return normal(n_pair, n_nu), r, mu, sigma, (normal(n_pair), normal(n_nu), normal(n_nu))


def assert_close(got, want, dtype, tolerance=TOLERANCE):
    """The one comparison: relative to the largest value; NaN, wrong shapes and dtypes fail."""
    assert got.dtype == dtype and got.shape == want.shape
    if want.numel():
        error, largest = (got.double() - want).abs().max(), want.abs().max()
        assert error <= tolerance[dtype] * largest, f"off by {error / largest}"


def equation(r, mu, sigma):
    """One number after the other."""
    out = torch.zeros(len(r), len(mu), dtype=torch.float64)
    for p, nu in product(range(len(r)), range(len(mu))):
        exponent = -0.5 * (float(sigma[nu]) * (1 / float(r[p]) - 1 / float(mu[nu]))) ** 2
        if exponent > -80 and r[p] < CUTOFF.end:
            out[p, nu] = math.exp(exponent) * math.cos(math.pi * float(r[p]) / 12.0) ** 2
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_nu", N_NU)
def test_values(backend, dtype, n_nu):
    for n_pair in N_PAIR:
        _, r, mu, sigma, _ = problem(n_pair, n_nu, dtype)
        found = backend.sensitivity(r, mu, sigma, CUTOFF)
        assert_close(found, equation(r, mu, sigma), dtype, PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_nu", N_NU)
@pytest.mark.parametrize("n_thread", (1, 3))
@needs_numba
def test_numba_kernels(dtype, n_nu, n_thread, monkeypatch):
    """Against the reference in float64, which the tests below hold to autograd."""
    from md_plugin.kernels import numba_cpu

    monkeypatch.setattr(numba_cpu, "threads", lambda: n_thread)
    for n_pair in (*N_PAIR, 9000):
        g, r, mu, sigma, along = problem(n_pair, n_nu, dtype)
        d = [x.double() for x in (g, r, mu, sigma)]
        got = numba_cpu.sensitivity(r, mu, sigma, CUTOFF)
        assert_close(got, reference.sensitivity(*d[1:], CUTOFF), dtype)
        for name, more in (("slope", ()), ("curvature", (along,))):
            name = f"sensitivity_{name}"
            got = getattr(numba_cpu, name)(g, r, mu, sigma, *more, CUTOFF)
            double = (tuple(x.double() for x in along),) if more else ()
            want = getattr(reference, name)(*d, *double, CUTOFF)
            for x, y in zip(got, want, strict=True):
                assert_close(x, y, dtype)


@needs_numba
def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    from md_plugin.kernels import numba_cpu

    g, r, mu, sigma, along = problem(20_000, 20, torch.float32)
    found = []
    for n_thread in (1, 2, 5):
        monkeypatch.setattr(numba_cpu, "threads", lambda n=n_thread: n)
        found.append(
            (
                numba_cpu.sensitivity(r, mu, sigma, CUTOFF),
                *numba_cpu.sensitivity_slope(g, r, mu, sigma, CUTOFF),
                *numba_cpu.sensitivity_curvature(g, r, mu, sigma, along, CUTOFF),
            )
        )
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@needs_numba
def test_sums_over_many_pairs_do_not_lose_digits():
    """A million terms of one sign; added up one by one in float32 they would be off by 1e-4."""
    from md_plugin.kernels import numba_cpu

    r = torch.linspace(3.1, 5.4, 1_000_000)
    mu, sigma, g = torch.tensor([3.0, 2.5]), torch.tensor([3.0, 2.0]), torch.ones(len(r), 2)
    got = numba_cpu.sensitivity_slope(g, r, mu, sigma, CUTOFF)[1:]
    double = [x.double() for x in (g, r, mu, sigma)]
    for x, y in zip(got, reference.sensitivity_slope(*double, CUTOFF)[1:], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=0.0)


def test_reference_slope_and_curvature_are_what_autograd_finds():
    g, r, mu, sigma, along = problem(17, 5, torch.float64)
    inputs = [x.requires_grad_() for x in (g, r, mu, sigma)]
    s = reference.sensitivity(*inputs[1:], CUTOFF)
    slope = torch.autograd.grad(s, inputs[1:], g, create_graph=True)
    curvature = torch.autograd.grad(slope, inputs, along)
    own = reference.sensitivity_slope(*inputs, CUTOFF)
    own += reference.sensitivity_curvature(*inputs, along, CUTOFF)
    for x, y in zip(own, slope + curvature, strict=True):
        assert_close(x, y, torch.float64, {torch.float64: 1e-12})
    alone = reference.sensitivity_slope(*inputs, CUTOFF, parameters=False)
    assert torch.equal(alone[0], own[0]) and alone[1:] == (None, None)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("n_pair", (0, 4))
def test_gradients(backend, subset, n_pair):
    _, r, mu, sigma, _ = problem(n_pair, 3, torch.float64)
    inputs = [x.requires_grad_(wanted) for x, wanted in zip((r, mu, sigma), subset, strict=True)]
    # Central differences with steps of 1e-6: off by 1e-12 s''', or by 1e-16 / 1e-6.
    mode = {"atol": 1e-7, "rtol": 1e-6, "fast_mode": backend.name in ("triton", "cupy")}
    gradcheck(lambda *x: backend.sensitivity(*x, CUTOFF), inputs, **mode)
    gradgradcheck(lambda *x: backend.sensitivity(*x, CUTOFF), inputs, **mode)


@pytest.mark.parametrize("subset", [s for s in product((False, True), repeat=4) if any(s)])
def test_gradients_of_the_slope(backend, subset):
    """g on its own, too: sensitivities of a layer whose weights are fixed, or the other way."""
    tensors = problem(4, 3, torch.float64)[:4]
    inputs = [x.requires_grad_(wanted) for x, wanted in zip(tensors, subset, strict=True)]

    def slope(*x):
        return Slope.apply(backend.kernels, CUTOFF, True, *x)

    fast = backend.name in ("triton", "cupy")  # on the CPU they take milliseconds
    gradcheck(slope, inputs, atol=1e-6, rtol=1e-6, fast_mode=fast)
    gradgradcheck(slope, inputs, atol=1e-5, rtol=1e-5, fast_mode=fast)


@pytest.mark.parametrize("order", (3, 4))
@pytest.mark.parametrize("subset", SUBSETS)
def test_higher_derivatives(backend, order, subset):
    """Beyond the family they go through the reference's equations; against plain torch."""
    found = []
    for sensitivity in (backend.sensitivity, reference.sensitivity):
        _, r, mu, sigma, _ = problem(6, 3, torch.float64)
        inputs = [x.requires_grad_(w) for x, w in zip((r, mu, sigma), subset, strict=True)]
        wanted = [x for x in inputs if x.requires_grad]
        value = sensitivity(*inputs, CUTOFF).pow(2).sum()
        for _ in range(order):
            grads = torch.autograd.grad(value, wanted, create_graph=True)
            value = sum(g.sin().sum() for g in grads)
        found.append(grads)
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain, torch.float64, {torch.float64: 1e-11})


def test_distances():
    """The norm, and its derivatives to fourth order as torch finds them."""
    found = []
    for distance in (Distance.apply, lambda x: x.square().sum(dim=1).sqrt()):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        value = distance(x.requires_grad_()).pow(3).sum()
        found.append([value])
        for _ in range(4):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.sin().sum()
            found[-1].append(gradient)
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain, torch.float64, {torch.float64: 1e-12})
    gradcheck(Distance.apply, x)
    gradgradcheck(Distance.apply, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cutoffs_in_turn(backend, dtype):
    """What one model's cutoff leaves behind must not reach the next."""
    _, r, mu, sigma, _ = problem(17, 5, dtype)
    for cutoff in (CUTOFF, Cutoff(5.0, 4.1), Cutoff(1.0 / 0.1571, 6.0), CUTOFF):
        want = reference.sensitivity(*(x.double() for x in (r, mu, sigma)), cutoff)
        assert_close(backend.sensitivity(r, mu, sigma, cutoff), want, dtype, PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_zeros(backend, dtype):
    """From the end on, and far from the centre: sums skip them."""
    r = torch.tensor([2.0, 5.499, 5.5, 5.9, 6.0, 70.0], dtype=dtype)
    mu, sigma = torch.tensor([2.0, 3.0], dtype=dtype), torch.tensor([2.0, 77.0], dtype=dtype)
    r.requires_grad_()
    s = backend.sensitivity(r, mu, sigma, CUTOFF)
    assert s[:2, 0].all() and not s[2:].any()
    assert s[0, 1] == 0  # t = 12.8, exp(-82)
    (gradient,) = torch.autograd.grad(s.sum(), r, create_graph=True)
    assert gradient[:2].all() and not gradient[2:].any()
    (second,) = torch.autograd.grad(gradient.sum(), r)
    assert second[:2].all() and not second[2:].any()


def test_nothing_is_denormal(backend):
    """Float32 numbers below 1.2e-38 take a hundred times as long to multiply."""
    r = torch.linspace(0.9, 6.0, 3000)
    s = backend.sensitivity(r, torch.tensor([1.5, 3.0]), torch.tensor([40.0, 60.0]), CUTOFF)
    assert s[s > 0].min() < 1e-30
    if backend.name != "torch":
        assert s[s > 0].min() >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_shows(backend, dtype):
    """In its own row, and in sums over pairs; an atom on top of another gives no finite force."""
    _, r, mu, sigma, _ = problem(17, 20, dtype)
    r[3], r[5] = torch.nan, 0.0
    inputs = [x.requires_grad_() for x in (r, mu, sigma)]
    s = backend.sensitivity(*inputs, CUTOFF)
    assert s[3].isnan().all() and s[[0, 1, 2, 4, *range(6, 17)]].isfinite().all()
    grads = torch.autograd.grad(s.sum(), inputs, create_graph=True)
    assert grads[0].isnan().nonzero()[:, 0].tolist() == [3, 5]
    assert grads[1].isnan().all() and grads[2].isnan().all()
    (second,) = torch.autograd.grad(grads[0].sum(), r)
    assert second.isnan().nonzero()[:, 0].tolist() == [3, 5]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("fault", ("off by 1e-4", "only float32", "one element"))
def test_self_check_catches_a_broken_kernel(name, fault):
    def spoil(x):
        if fault == "only float32":
            return x if x.dtype == torch.float32 else x.float().double()
        x = x.clone()
        flat = x.reshape(-1)
        flat[flat.abs().argmax() if fault == "one element" else slice(None)] *= 1 + 1e-4
        return x

    def wrong(*args):
        right = getattr(reference, name)(*args)
        return spoil(right) if name == "sensitivity" else (*right[:-1], spoil(right[-1]))

    kernels = replace(functions().kernels, **{name: wrong})
    for _ in range(2):
        with pytest.raises(BackendError, match=f"'broken' computes a wrong {name} in torch.float"):
            Backend("broken", ("cpu",), kernels).sensitivity(*problem(2, 3, DTYPES[0])[1:4], CUTOFF)


@pytest.mark.parametrize("name", KERNELS)
def test_a_broken_kernel_fails_gradcheck(name):
    def wrong(*args):
        right = getattr(reference, name)(*args)
        return right * 1.001 if name == "sensitivity" else tuple(1.001 * x for x in right)

    kernels = replace(functions().kernels, **{name: wrong})
    backend = Backend("torch", ("cpu",), kernels)  # this name is not self-checked
    inputs = [x.requires_grad_() for x in problem(4, 3, torch.float64)[1:4]]
    with pytest.raises(GradcheckError):
        gradcheck(lambda *x: backend.sensitivity(*x, CUTOFF), inputs, rtol=1e-6, atol=1e-7)
        gradgradcheck(lambda *x: backend.sensitivity(*x, CUTOFF), inputs, rtol=1e-6, atol=1e-7)


def test_parameters_that_are_not_trained_cost_nothing():
    asked = []

    def slope(*args):
        asked.append(args[-1])
        return reference.sensitivity_slope(*args)

    kernels = replace(functions().kernels, sensitivity_slope=slope)
    backend = Backend("torch", ("cpu",), kernels)
    for subset in SUBSETS:
        tensors = problem(4, 3, torch.float64)[1:4]
        inputs = [x.requires_grad_(w) for x, w in zip(tensors, subset, strict=True)]
        backend.sensitivity(*inputs, CUTOFF).sum().backward()
        assert asked.pop() == any(subset[1:]) and not asked


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"r": torch.ones(3, 1)}, ValueError, r"shapes \(3, 1\), \(2,\), \(2,\)"),
        ({"sigma": torch.ones(3)}, ValueError, r"shapes \(3,\), \(2,\), \(3,\)"),
        ({"r": torch.ones(3, device="meta")}, ValueError, "are on meta, cpu, cpu"),
        ({"mu": torch.ones(2).double()}, TypeError, "three float32 or three float64 tensors"),
        ({"r": torch.ones(3).half()}, TypeError, "torch.float16, torch.float32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(backend, change, error, message):
    good = {"r": torch.ones(3), "mu": torch.ones(2), "sigma": torch.ones(2)}
    with pytest.raises(error, match=message):
        backend.sensitivity(*(good | change).values(), CUTOFF)


class Allocated(TorchDispatchMode):
    """The operators that made new memory of a number of elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.operators, self.known = numel, [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            place = x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) else 0
            if place and x.numel() == self.numel and place not in self.known:
                self.known[place] = x  # kept, so that no memory comes twice
                self.operators.append(func.name())
        return out


def crystal_pairs(potential):
    structure = STRUCTURES["crystal"]()
    neighbours = NeighbourList(potential.rcut, 0.5)
    neighbours.update(structure.positions, structure.cell, structure.pbc)
    geometry = neighbours.geometry(structure.positions, structure.cell)
    return torch.from_numpy(structure.species), geometry.pairs, geometry.r_ij()


def training_step(potential):
    """The gradient of a loss of energy and forces in all weights."""
    species, pairs, r_ij = crystal_pairs(potential)
    found = potential.evaluate_pairs(species, pairs, r_ij, create_graph=True)
    loss = found.energy.square().sum() * 1e-6 + found.forces.square().mean()
    return torch.autograd.grad(loss, list(potential.model.parameters()))


@needs_numba
def test_a_training_step_keeps_little_per_pair():
    """s, dE/ds, the derivative along forces; dL/ds twice, once through each of two sums."""
    potential = make_potential(backend="numba", n_interactions=1, n_nu=7)
    n_pair = crystal_pairs(potential)[1].n_pair
    with Allocated(7 * n_pair) as allocated:
        training_step(potential)
    assert len(allocated.operators) <= 5, allocated.operators
    with Allocated(7 * n_pair) as eager:
        potential.model.backend = "torch"
        training_step(potential)
    assert len(eager.operators) > 25


@pytest.mark.parametrize("changes", ({}, {"order": 2}, {"n_gaussians": 9}, {"pair_cutoff": 2.7}))
def test_training_on_forces_agrees_with_plain_torch(backend, changes):
    gradients = []
    for name in (backend.name, "torch"):
        gradients.append(training_step(make_potential(backend=name, **changes)))
    for ours, plain in zip(*gradients, strict=True):
        scale = plain.abs().max()
        assert scale > 0 and (ours - plain).abs().max() <= 1e-10 * scale
