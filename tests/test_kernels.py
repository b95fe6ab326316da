"""The three sums: op x backend x device x dtype x shape against brute force in float64."""

import numpy as np
import pytest
import torch
from kernel_cases import (
    ARGUMENTS,
    CASES,
    DTYPES,
    OPS,
    SPLIT,
    absence,
    assert_sum,
    backend_parameters,
    expected,
    matrix_parameters,
    poisoned_memory,
    run_sum,
    use_variant,
)

from md_plugin.kernels import BackendError, get_backend, reference
from md_plugin.kernels.closure import SumKernels
from md_plugin.kernels.registry import Backend
from md_plugin.pairs import Pairs

ODD = CASES["unsorted, odd"]


@pytest.fixture(params=backend_parameters())
def backend(request, monkeypatch):
    return use_variant(request.param, monkeypatch)


@pytest.mark.parametrize(("op", "variant", "device", "dtype", "shape"), matrix_parameters())
def test_matrix(op, variant, device, dtype, shape, monkeypatch):
    case = CASES[shape]
    arrays = case.arrays(dtype)
    inputs = (arrays[name] for name in ARGUMENTS[op])
    want, tolerance = expected(op, case, *inputs, more=SPLIT.get(variant, 0))
    with poisoned_memory():
        got = run_sum(op, use_variant(variant, monkeypatch), case, arrays, device)
    assert got.device.type == device
    assert_sum(got, want, tolerance, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))
def test_adjoint_identities(backend, dtype):
    """<envsum(s, z), e> = <s, sensesum(e, z)> = <z, featsum(e, s)>."""
    for case in (case for case in CASES.values() if len(case.receiver) < 50):
        arrays = case.arrays(dtype)
        pairs, perm = case.pairs()
        s, z, e = arrays["sense"][perm], arrays["features"], arrays["env"]
        products = [
            (backend.envsum(s, z, pairs).double() * e).sum(),
            (backend.sensesum(e, z, pairs).double() * s).sum(),
            (backend.featsum(e, s, pairs).double() * z).sum(),
        ]
        # The kernels round at most n_terms times each (as in `expected`); the outer sum is double.
        terms = (e.abs()[pairs.receiver] * s.abs()[:, :, None]).double()
        magnitude = (terms * z.abs()[pairs.sender_long][:, None, :]).sum()
        n_terms = max(case.n_feat, len(case.receiver) * case.n_nu)
        tolerance = n_terms * torch.finfo(dtype).eps * magnitude
        assert abs(products[0] - products[1]) <= tolerance
        assert abs(products[0] - products[2]) <= tolerance


def test_two_runs_agree_to_the_last_bit(backend):
    arrays = ODD.arrays(torch.float32)
    for op in OPS:
        first, second = (run_sum(op, backend, ODD, arrays) for _ in range(2))
        assert torch.equal(first, second)


interpreted = pytest.mark.skipif(
    bool(absence("triton", "cpu")), reason=absence("triton", "cpu") or "there"
)


def to_tf32(x):
    """Rounded to 10 bits, ties away from zero, as the GPU's cvt.rna.tf32.f32."""
    bits = np.ascontiguousarray(x).view(np.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(np.float32)


def as_tensor_cores_do(_builder, a, b, total, precision, _imprecise):
    """tl.dot of the interpreter, with operands rounded as on the GPU."""
    a_high, b_high = to_tf32(a.data), to_tf32(b.data)
    found = total.data + a_high @ b_high
    if "TF32x3" in str(precision):
        a_low, b_low = to_tf32(a.data - a_high), to_tf32(b.data - b_high)
        found = found + (a_high @ b_low + a_low @ b_high)
    return type(total)(found, total.dtype.scalar)


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_three_products_of_tf32_are_as_good_as_float32(op, monkeypatch):
    """And one is not: the tolerance tells them apart."""
    from triton.runtime.interpreter import InterpreterBuilder

    from md_plugin.kernels import triton_gpu

    monkeypatch.setattr(InterpreterBuilder, "create_dot", as_tensor_cores_do)
    backend = use_variant("triton", monkeypatch)
    arrays = ODD.arrays(torch.float32)
    inputs = (arrays[name] for name in ARGUMENTS[op])
    want, tolerance = expected(op, ODD, *inputs, more=SPLIT["triton"])
    assert_sum(run_sum(op, backend, ODD, arrays), want, tolerance, torch.float32)
    monkeypatch.setitem(triton_gpu.PRECISION, torch.float32, "tf32")
    with pytest.raises(AssertionError, match="largest error"):
        assert_sum(run_sum(op, backend, ODD, arrays), want, tolerance, torch.float32)


@interpreted
def test_featsum_has_a_fixed_order_where_torch_is_asked_for_it(monkeypatch):
    """At the time of the call; and only then is the list transposed."""
    from md_plugin.kernels import triton_gpu

    launched = []

    class Noted:
        def __getitem__(self, grid):
            launched.append(grid)
            return by_sender[grid]

    by_sender = triton_gpu._by_sender
    monkeypatch.setattr(triton_gpu, "_by_sender", Noted())
    pairs, perm = ODD.pairs()
    arrays = ODD.arrays(torch.float64)
    found = [triton_gpu.featsum(arrays["env"], arrays["sense"][perm], pairs)]
    assert not launched and "_transpose" not in vars(pairs)
    with poisoned_memory():  # asks torch for deterministic algorithms
        found.append(triton_gpu.featsum(arrays["env"], arrays["sense"][perm], pairs))
    assert launched == [(9, 1)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_form_that_only_deterministic_algorithms_take_is_checked_too():
    def featsum(*args):
        wrong = torch.are_deterministic_algorithms_enabled()
        return reference.featsum(*args) * (1 + 1e-4 * wrong)

    sums = {name: getattr(reference, name) for name in OPS} | {"featsum": featsum}
    backend = Backend("other", ("cpu",), SumKernels(**sums))
    pairs, perm = ODD.pairs()
    arrays = ODD.arrays(torch.float32)
    backend.envsum(arrays["sense"][perm], arrays["features"], pairs)
    with poisoned_memory(), pytest.raises(BackendError, match="'other' computes a wrong featsum"):
        backend.envsum(arrays["sense"][perm], arrays["features"], pairs)


def test_non_contiguous_inputs(backend):
    pairs, perm = ODD.pairs()
    arrays = ODD.arrays(torch.float64)
    arrays["sense"] = arrays["sense"][perm]
    for op in OPS:
        plain = [arrays[name] for name in ARGUMENTS[op]]
        turned = [x.mT.contiguous().mT for x in plain]
        strided = [torch.stack([x, x], dim=-1)[..., 1] for x in plain]
        want = getattr(backend, op)(*plain, pairs)
        for inputs in (turned, strided):
            assert not any(x.is_contiguous() for x in inputs)
            assert torch.equal(getattr(backend, op)(*inputs, pairs), want)


def test_expanded_gradient(backend):
    """The gradient of a plain sum arrives with strides of zero."""
    pairs, _ = ODD.pairs()
    arrays = ODD.arrays(torch.float64)
    sense, features = (arrays[name].requires_grad_() for name in ("sense", "features"))
    grads = torch.autograd.grad(backend.envsum(sense, features, pairs).sum(), (sense, features))
    ones = torch.ones_like(arrays["env"])
    assert torch.equal(grads[0], backend.sensesum(ones, features, pairs))
    assert torch.equal(grads[1], backend.featsum(ones, sense, pairs))


def test_inputs_are_left_alone(backend):
    arrays = ODD.arrays(torch.float64)
    before = {name: x.clone() for name, x in arrays.items()}
    for op in OPS:
        run_sum(op, backend, ODD, arrays)
    assert all(torch.equal(arrays[name], before[name]) for name in arrays)


def test_nan_comes_out_as_nan(backend):
    """A NaN atom must not be summed away silently; other atoms stay clean."""
    case = CASES["ghosts"]
    arrays = case.arrays(torch.float64)
    arrays["features"][case.sender[0]] = torch.nan
    env = run_sum("envsum", backend, case, arrays)
    touched = {i for i, j in zip(case.receiver, case.sender, strict=True) if j == case.sender[0]}
    for i in range(case.n_recv):
        assert bool(env[i].isnan().any()) == (i in touched)


def broken(kind, op):
    """The reference with one sum spoiled."""

    def spoiled(first, second, pairs):
        right = getattr(reference, op)
        if kind == "scaled by 1e-4":
            return right(first, second, pairs) * (1 + 1e-4)
        if kind == "last pair of a row is lost":
            row_ptr = pairs.row_ptr.clone()
            row_ptr[-1] -= 1
            n = pairs.n_pair - 1
            if op == "sensesum":
                out = right(first, second, pairs)
                out[n] = 0.0
                return out
            second = second[:n] if op == "featsum" else second
            first = first[:n] if op == "envsum" else first
            return right(first, second, Pairs(row_ptr, pairs.sender[:n], pairs.n_send))
        out = right(first, second, pairs)
        return torch.empty_like(out) if kind == "never written" else out[..., :1]

    sums = {name: getattr(reference, name) for name in OPS} | {op: spoiled}
    return SumKernels(**sums)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))
@pytest.mark.parametrize(
    "kind", ("scaled by 1e-4", "last pair of a row is lost", "never written", "wrong shape")
)
def test_a_broken_kernel_fails_the_matrix(kind, dtype, op):
    arrays = ODD.arrays(dtype)
    want, tolerance = expected(op, ODD, *(arrays[name] for name in ARGUMENTS[op]))
    assert_sum(run_sum(op, get_backend("torch"), ODD, arrays), want, tolerance, dtype)
    with poisoned_memory():
        got = run_sum(op, broken(kind, op), ODD, arrays)
    with pytest.raises(AssertionError):
        assert_sum(got, want, tolerance, dtype)


BAD_INPUT = [
    ("envsum", "sense", (39, 7), r"sense must have 2 dimensions and n_pair = 40 rows, got .*39, 7"),
    ("envsum", "features", (8, 41), r"features must have 2 dimensions and n_send = 9 rows"),
    ("sensesum", "env", (9, 7), r"env must have 3 dimensions and n_recv = 9 rows"),
    ("sensesum", "features", (9, 40), r"sensesum: shapes \(9, 7, 41\) and \(9, 40\) differ"),
    ("featsum", "env", (8, 7, 41), r"env must have 3 dimensions and n_recv = 9 rows"),
    ("featsum", "sense", (40, 6), r"featsum: shapes \(9, 7, 41\) and \(40, 6\) differ"),
]


@pytest.mark.parametrize(("op", "name", "shape", "message"), BAD_INPUT)
def test_wrong_shapes(backend, op, name, shape, message):
    arrays = ODD.arrays(torch.float32) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        getattr(backend, op)(*(arrays[label] for label in ARGUMENTS[op]), ODD.pairs()[0])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float64), (torch.float16, torch.float16), (torch.int64, torch.int64)],
)
def test_wrong_dtypes(backend, op, dtypes):
    arrays = ODD.arrays(torch.float32)
    inputs = (arrays[name].to(dtype) for name, dtype in zip(ARGUMENTS[op], dtypes, strict=True))
    with pytest.raises(TypeError, match=f"{op}: needs two float32 or two float64.*{dtypes[1]}"):
        getattr(backend, op)(*inputs, ODD.pairs()[0])


def test_tensors_on_another_device_than_the_pairs(backend):
    arrays = ODD.arrays(torch.float32)
    with pytest.raises(ValueError, match="envsum: sense is on meta, the pairs on cpu"):
        backend.envsum(arrays["sense"].to("meta"), arrays["features"], ODD.pairs()[0])
