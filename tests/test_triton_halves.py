"""Halves of float32 and their products against float64, interpreted where there is no GPU."""

import numpy as np
import pytest
import torch
from kernel_cases import absence, poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    bool(absence("triton", DEVICE)), reason=absence("triton", DEVICE) or "there"
)
interpreted = pytest.mark.skipif(
    bool(absence("triton", "cpu")), reason=absence("triton", "cpu") or "there"
)
# Of the norm of a product, before terms cancel: 2^-22 of a number is lost, 2^-11 with one half.
TOLERANCE = {2: 4e-7, 1: 5e-4}
# Rows, terms, columns: odd ones, tiles that are not filled, sums that are split, of one term.
WIDE = (64, 16, 32, 4, 2, 2, True)
SHAPES = ((37, 129, 65), (70, 400, 33), (64, 128, 130), (1, 7, 3), (3, 1, 1))


@pytest.fixture
def halves():
    from md_plugin.kernels import triton_halves

    return triton_halves


def split(halves, x, n_half):
    """Halves, and their power."""
    with poisoned_memory():
        found, power = x.new_empty(n_half, *x.shape, dtype=torch.float16), x.new_empty(())
        halves.split(x, found, power)
    return found, power


def split_rows(halves, x, n_half, first=None, second=None):
    """Halves, and what is made of their powers."""
    one = torch.ones((), device=DEVICE)
    with poisoned_memory():
        found, scale = x.new_empty(n_half, *x.shape, dtype=torch.float16), x.new_empty(2, len(x))
        halves.split_rows(x, found, scale, *(one if x is None else x for x in (first, second)))
    return found, scale


@pytest.fixture
def matmul():
    from md_plugin.kernels import triton_matmul

    return triton_matmul


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


def exact(x, power=1.0):
    """What halves stand for."""
    return x.double().sum(dim=0) * power


@pytest.mark.parametrize("n_half", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0**30, 2.0**-30, 1e-38, 3e38])
@pytest.mark.parametrize("shape", [(7,), (1, 4999), (3, 5, 11)])
def test_halves_are_close(halves, shape, scale, n_half):
    x = (normal(*shape).clamp(-1.1, 1.1) * scale).clamp(-3e38, 3e38)
    got, power = split(halves, x, n_half)
    largest = float(x.abs().max())
    assert got.shape == (n_half, *shape) and got.dtype == torch.float16 and power.shape == ()
    assert np.log2(float(power)) % 1 == 0 and got.isfinite().all()
    # A number is below its power, unless there is no such number in float32.
    assert largest < power <= 2 * largest or scale in (1e-38, 3e38)
    lost = {1: 2.0**-11, 2: 2.0**-22}[n_half] * x.abs() + 2.0**-25 * power
    assert bool(((exact(got, power) - x).abs() <= lost).all())


@pytest.mark.parametrize("n_half", [1, 2])
def test_halves_of_rows_have_powers_of_their_own(halves, n_half):
    rows = torch.tensor([1.0, 2.0**30, 0.0, 2.0**-30, 1.0], device=DEVICE)[:, None, None]
    x, first, second = normal(5, 3, 7) * rows, normal(1)[0], normal(1, seed=1)[0]
    got, powers = split_rows(halves, x, n_half, first, second)
    assert torch.equal(powers[1], powers[0] * second)
    whole, power = split(halves, x[1], n_half)
    assert torch.equal(got[:, 1], whole) and powers[0, 1] == power * first
    assert powers[0, 2] == first and not got[:, 2].any()  # 1 where there is nothing
    assert torch.equal(split_rows(halves, x * 2.0**20, n_half, first, second)[0], got)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nothing_zeros_and_what_is_not_finite(halves):
    for shape in ((0, 4), (0,), (3, 0)):
        got, power = split(halves, normal(*shape), 2)
        assert got.shape == (2, *shape) and power == 1
        if len(shape) == 2:
            got, powers = split_rows(halves, normal(*shape), 1)
            assert got.shape == (1, *shape) and powers.shape == (2, shape[0])
    got, power = split(halves, torch.zeros(5, device=DEVICE), 2)
    assert power == 1 and not got.any()
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = normal(3000)
        x[2500] = bad
        for n_half in (1, 2):
            got, _ = split(halves, x, n_half)
            assert not exact(got)[2500].isfinite() and exact(got)[:2500].isfinite().all()
            rows, _ = split_rows(halves, x.view(6, 500), n_half)
            assert exact(rows).isfinite().all(dim=1).tolist() == [True] * 5 + [False]


def multiplied(halves, matmul, a, b, n_half):
    """The product with powers, and the one that is halves itself, both in float64."""
    (a, of_a), (b, of_b) = split(halves, a, n_half), split(halves, b, n_half)
    counters = matmul.counters(a.device)
    with poisoned_memory():
        out = torch.empty(a.shape[1], b.shape[2], device=DEVICE)
        as_halves = torch.empty(n_half, *out.shape, dtype=torch.float16, device=DEVICE)
        matmul.product(a, b, out, counters, (of_a, of_b))
        matmul.product(a, b, as_halves, counters)
    assert not counters.any()
    return out.double(), exact(as_halves, of_a.double() * of_b.double())


def error(got, a, b):
    """Of a product of a and b, beside the norm that it would have if no terms cancelled."""
    a, b = a.double(), b.double()
    return float((got - a @ b).norm() / (a.square() @ b.square()).sqrt().norm())


@pytest.mark.parametrize("n_half", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(halves, matmul, shape, n_half):
    """Three terms are as good as float32; one is not, by the same measure."""
    n_row, n_sum, n_col = shape
    a, b = normal(n_row, n_sum) * 1e-3, normal(n_sum, n_col, seed=1) * 50.0
    for got in multiplied(halves, matmul, a, b, n_half):
        off = error(got, a, b)
        assert off <= TOLERANCE[n_half]
        assert n_half == 2 or n_sum == 1 or off > 10 * TOLERANCE[2]


def test_scales_leave_a_product_as_it_is(halves, matmul):
    a, b = normal(5, 40), normal(40, 9, seed=1)
    want = multiplied(halves, matmul, a, b, 2)[0]
    for up in (2.0**30, 2.0**-30):
        assert torch.equal(multiplied(halves, matmul, a * up, b, 2)[0], want * up)


def test_nothing_is_hidden_in_a_product(halves, matmul):
    """NaN stays in its row, zeros are zeros, and nothing has no product."""
    a, b = normal(5, 40), normal(40, 9, seed=1)
    a[3, 2], a[1] = torch.nan, 0.0
    rows, (b, _) = split_rows(halves, a, 2)[0], split(halves, b, 2)
    out = torch.empty(5, 9, device=DEVICE)
    matmul.product(rows, b, out, matmul.counters(out.device))
    assert out.isnan().all(dim=1).tolist() == [False] * 3 + [True, False]
    assert not out[1].any()
    empty = torch.empty(0, 9, device=DEVICE)
    matmul.product(rows[:, :0].contiguous(), b, empty, out)


@pytest.mark.parametrize("n_half", [1, 2])
@pytest.mark.parametrize("tile", [(64, 16, 16, 4, 3, 2), (64, 16, 32, 4, 3, 4), WIDE])
def test_products_that_are_shared_out(halves, matmul, monkeypatch, tile, n_half):
    """Are the same to rounding, to the last bit twice, and leave the counters at zero."""
    tile = matmul.Tile(*tile)
    n_sum = tile.terms - 3 if tile.wide else 100
    a, b = normal(70, n_sum), normal(n_sum, 40, seed=1)
    monkeypatch.setattr(matmul, "chosen", lambda *_: tile)
    first, second = (multiplied(halves, matmul, a, b, n_half) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for got in first:
        assert error(got, a, b) <= TOLERANCE[n_half]


def cut_off(x):
    """float64 to float32, towards zero."""
    near = x.astype(np.float32)
    return np.where(abs(near) > abs(x), np.nextafter(near, np.float32(0.0)), near)


def as_matrix_units_do(_builder, a, b, total, *_):
    """tl.dot of the interpreter: 16 terms at once, exactly, what is added to them cut off."""
    found = total.data
    for k in range(0, a.data.shape[1], 16):
        terms = a.data[:, k : k + 16].astype(float) @ b.data[k : k + 16].astype(float)
        found = cut_off(found.astype(float) + terms)
    return type(total)(found, total.dtype.scalar)


@interpreted
def test_long_sums_where_additions_cut_off(halves, matmul, monkeypatch):
    """The blocks that are chosen are good; one sum in the matrix units is not."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", as_matrix_units_do)
    a, b = normal(16, 2560), normal(2560, 16, seed=1)
    off = {}
    for terms in (matmul.chosen((16, 2560, 16), 2).terms, 4096):
        monkeypatch.setattr(matmul, "chosen", lambda *_, n=terms: matmul.Tile(16, 16, n, 4, 3, 1))
        got, _ = multiplied(halves, matmul, a, b, 2)
        off[terms] = error(got, a, b)
    assert off.pop(4096) > 5 * TOLERANCE[2]
    assert max(off.values()) <= TOLERANCE[2]


def test_tiles_fill_the_gpu(matmul):
    """Large where there are many rows; small, and sums in parts, where there are few."""
    n_env, n_hidden, gpu = 20 * 128, 128, (True, 132)
    for n_half in (1, 2):
        large = matmul.chosen((128 * 132, n_env, n_hidden), n_half)
        assert large[:2] == (128, 128) and large.grid(128 * 132, n_hidden) == (132, 1)
        back = matmul.chosen((128 * 132, n_hidden, n_env), n_half)
        assert back.wide and back.grid(128 * 132, n_env) == (132, 1)
        small = matmul.chosen((400, n_env, n_hidden), n_half)
        assert small.n_share > 1 and 66 <= np.prod(small.grid(400, n_hidden)) <= 132
    for shape in ((10**7, n_env, n_hidden), (10**7, n_hidden, n_env)):
        found = matmul.chosen(shape, 2)
        assert found.wide or found.n_share == 1  # more tiles than counters
    # Of twice as many rows nothing is faster; and a GPU with half the multiprocessors is slower.
    for shape in ((400, n_env, n_hidden), (10**5, n_hidden, n_env)):
        tile, twice = matmul.chosen(shape, 2), (2 * shape[0], *shape[1:])
        least = matmul.cycles(tile, shape, 2, gpu)
        assert matmul.cycles(matmul.chosen(twice, 2), twice, 2, gpu) >= least
        assert matmul.cycles(tile, shape, 2, (True, 40)) > least


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(2, 3, 4)}, TypeError, "only halves, float16, are multiplied"),
        ({"out": torch.zeros(3, 5, dtype=torch.float64)}, TypeError, "into float32 or halves"),
        ({"b": torch.zeros(2, 3, 5).half()}, ValueError, r"\(2, 3, 4\) and \(2, 3, 5\) have no"),
        ({"a": torch.zeros(3, 3, 4).half()}, ValueError, "have no product"),
        ({"out": torch.zeros(3, 4)}, ValueError, r"no product of shape \(3, 4\)"),
        ({"out": torch.zeros(5, 3).T}, ValueError, "an array is not contiguous"),
    ],
)
def test_products_that_are_refused(matmul, change, error, message):
    arrays = {"a": torch.zeros(2, 3, 4).half(), "b": torch.zeros(2, 4, 5).half()}
    arrays |= {"out": torch.zeros(3, 5)} | change
    arrays = {name: array.to(DEVICE) for name, array in arrays.items()}
    with pytest.raises(error, match=message):
        matmul.product(**arrays, counters=matmul.counters(torch.device(DEVICE)))


def test_halves_that_are_refused(halves):
    x, one = torch.ones(2, 3, device=DEVICE), torch.ones((), device=DEVICE)
    two, scale = torch.ones(2, 2, 3, device=DEVICE).half(), torch.ones(2, 2, device=DEVICE)
    with pytest.raises(TypeError, match=r"made of float32 .* not torch\.float16 of torch\.float64"):
        halves.split(x.double(), two, one)
    with pytest.raises(TypeError, match=r"not torch\.float32 of torch\.float32"):
        halves.split(x, two.float(), one)
    with pytest.raises(ValueError, match="not contiguous"):
        halves.split(x.T, two.mT.contiguous(), one)
    for wrong in (two[:, :1], two.repeat(2, 1, 1), two[0]):
        with pytest.raises(ValueError, match=r"are not one or two halves of \(2, 3\)"):
            halves.split(x, wrong, one)
    with pytest.raises(ValueError, match=r"power has shape \(2, 3\), not \(\)"):
        halves.split(x, two, x)
    with pytest.raises(ValueError, match=r"scale has shape \(2, 1\), not \(2, 2\)"):
        halves.split_rows(x, two, scale[:, :1], one, one)
    with pytest.raises(ValueError, match=r"second has shape \(2, 3\), not \(\)"):
        halves.split_rows(x, two, scale, one, x)
