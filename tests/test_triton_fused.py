"""The fused layers in Triton against autograd in float64, interpreted where there is no GPU."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_cases import absence, poisoned_memory
from test_fused_kernels import Exact, error, poisoned, radial_parameters, system, without_first

from md_plugin.model.radial import TensorComponents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    bool(absence("triton", DEVICE)), reason=absence("triton", DEVICE) or "there"
)
# As for the CPU's kernels; the narrowest Gaussians here amplify the rounding of 1/r by ten more.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12}
RCUT = 4.0


@pytest.fixture
def fused():
    from md_plugin.kernels import triton_arrays, triton_fused

    return SimpleNamespace(**vars(triton_arrays) | vars(triton_fused))


def on_device(fused, where):
    """What the CPU's kernels are given, for these."""
    shifted = len(where.translation) > 0

    def tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)

    return fused.Geometry(
        tensor(where.x[:, :3]),
        tensor(where.row_ptr),
        tensor(where.sender),
        tensor(where.translation) if shifted else None,
        tensor(where.translations[:, :3]) if shifted else None,
        tensor(where.species) if len(where.species) else None,
    )


def reference(where, receiver, parameters, z, ge):
    """env, forces, dE/dz, virial by autograd in float64; distance of the closest pair."""
    exact = Exact(where, receiver, *parameters, RCUT)
    z = z.double().cpu().requires_grad_()
    t = TensorComponents(round(ge.shape[1] ** 0.5) - 1)(exact.d / exact.r)
    rows = t[:, :, None, None] * exact.sense[:, None, :, None] * z[exact.sender][:, None, None]
    return exact.gradients(exact.sum(rows), ge.double().cpu().numpy(), z), exact.closest


def operand(fused, x):
    """As kernels take it: two halves beside float32."""
    return x if x is None or x.dtype != torch.float32 else fused.halves(x, 2)


def run(fused, where, parameters, z, ge, block=1000):
    """env, forces, dE/dz, virial and the closest distance; z is None for one-hot species."""
    geometry, dtype = on_device(fused, where), ge.dtype
    radial = fused.Radial.build(*(torch.tensor(x).to(DEVICE, dtype) for x in parameters), RCUT)
    with poisoned_memory():
        env = []
        gradients = fused.Gradients(geometry, 0 if z is None else z.shape[1], dtype)
        sent = operand(fused, z)
        for begin in range(0, len(ge), block):
            part = operand(fused, ge[begin : begin + block])
            env.append(torch.empty_like(part))
            fused.forward(geometry, radial, sent, env[-1], begin)
            fused.backward(geometry, radial, sent, part, gradients, begin)
    if dtype == torch.float32:
        env = [part.float().sum(dim=0) for part in env]
    found = torch.cat(env), gradients.forces, gradients.messages, gradients.virial
    return [x.cpu().numpy() for x in found], float(gradients.closest)


def random(shape, dtype, seed=1):
    numbers = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(numbers).to(DEVICE, dtype)


def close_up(n_recv):
    """Receivers that all see each other: positions, pairs, without ghosts."""
    where, _ = system(3, n_recv, 0, 1, False)
    sender = np.nonzero(~np.eye(n_recv, dtype=bool))[1].astype(np.int32)
    row_ptr = np.arange(n_recv + 1, dtype=np.int32) * (n_recv - 1)
    return where._replace(row_ptr=row_ptr, sender=sender, translation=where.translation[:0])


CASES = [
    (1, 20, 64, True),
    (1, 9, 7, False),
    (1, 33, 70, True),
    (1, 1, 1, False),
    (4, 9, 20, True),
    (4, 3, 70, False),
    (9, 9, 5, True),
    (9, 17, 16, False),
    (16, 5, 6, True),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n_comp", "n_nu", "n_feat", "shifted"), CASES)
def test_layer(fused, dtype, n_comp, n_nu, n_feat, shifted):
    where, receiver = system(n_nu, 9, 5, 120, shifted)
    z = random((len(where.x), n_feat), dtype)
    ge = random((9, n_comp, n_nu, n_feat), dtype, 2)
    parameters = radial_parameters(n_nu, RCUT)
    expected, closest = reference(where, receiver, parameters, z, ge)
    found, nearest = run(fused, where, parameters, z, ge, 4)
    errors = [error(ours, exact) for ours, exact in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors
    assert nearest == pytest.approx(closest, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n_comp", "n_species"), [(1, 1), (1, 3), (4, 3), (9, 20)])
def test_first_layer(fused, dtype, n_comp, n_species):
    """A histogram over species: the same as one-hot features."""
    where, receiver = system(5, 9, 5, 120, True)
    where = where._replace(species=where.species % n_species)
    hot = torch.eye(n_species, dtype=dtype, device=DEVICE)[where.species.tolist()]
    ge = random((9, n_comp, 9, n_species), dtype)
    parameters = radial_parameters(9, RCUT)
    expected, _ = reference(where, receiver, parameters, hot, ge)
    found, _ = run(fused, where, parameters, None, ge, 4)
    for k in (0, 1, 3):
        assert error(found[k], expected[k]) < TOLERANCE[dtype]


@pytest.mark.parametrize(("n_comp", "n_nu", "n_feat"), [(1, 9, 7), (4, 20, 20), (9, 5, 6)])
def test_float16_operands(fused, n_comp, n_nu, n_feat):
    """Rounded to 11 bits and summed in float32; forces and messages times powers of two."""
    where, receiver = system(n_nu, 5, 3, 60, True)
    z = random((1, len(where.x), n_feat), torch.float16)
    ge = random((1, 5, n_comp, n_nu, n_feat), torch.float16, 2)
    parameters = radial_parameters(n_nu, RCUT)
    scale = torch.exp2(torch.arange(-3, 2, device=DEVICE).float())
    expected, _ = reference(where, receiver, parameters, z[0], ge[0] * scale.view(-1, 1, 1, 1))
    geometry = on_device(fused, where)
    radial = fused.Radial.build(*(torch.tensor(x).to(DEVICE).float() for x in parameters), RCUT)
    env, found = torch.empty_like(ge), fused.Gradients(geometry, n_feat, torch.float32)
    fused.forward(geometry, radial, z, env)
    fused.backward(geometry, radial, z, ge, found, scale=torch.stack([scale, scale]))
    # s and env are rounded to 11 bits; the products of z and ge, as given, are not.
    bounds = {"env": 2e-3, "forces": TOLERANCE[torch.float32], "messages": 2e-3}
    ours = (env[0], found.forces, found.messages)
    for got, exact, bound in zip(ours, expected, bounds.values(), strict=False):
        assert error(got.double().cpu().numpy(), exact) < bound


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n_comp", (1, 9))
def test_blocks_that_no_pair_feels_make_no_difference(fused, dtype, n_comp, monkeypatch):
    """Narrow sensitivities, two blocks of them: dense and windowed agree to rounding."""
    where, _ = system(7, 4, 2, 20, True)
    mu = np.concatenate([np.linspace(2.5, 3.9, 16), np.linspace(0.2, 0.6, 4)])
    parameters = mu, np.full(20, 40.0)
    z, ge = random((len(where.x), 5), dtype), random((4, n_comp, 20, 5), dtype, 2)
    windowed, _ = run(fused, where, parameters, z, ge)
    monkeypatch.setitem(fused.WINDOW, dtype, 1e30)
    dense, _ = run(fused, where, parameters, z, ge)
    for ours, exact in zip(windowed, dense, strict=True):
        assert error(ours, exact) < 4 * torch.finfo(dtype).eps


def test_blocks_that_no_pair_feels_are_not_computed(fused):
    """Their dE/denv may be NaN; where one pair of a tile feels them, it shows."""
    x = torch.tensor([[0.0, 0, 0], [2.5, 0, 0], [0, 3.0, 0]], dtype=torch.float64, device=DEVICE)
    row_ptr, sender = (torch.tensor(t, device=DEVICE).int() for t in ([0, 2, 2, 2], [1, 2]))
    where = fused.Geometry(x, row_ptr, sender)
    mu = torch.cat([torch.linspace(2.5, 3.9, 16), torch.linspace(0.2, 0.6, 4)]).to(DEVICE)
    radial = fused.Radial.build(mu, torch.full_like(mu, 40.0), RCUT)
    z, ge = random((1, 3, 5), torch.float16), random((1, 3, 4, 20, 5), torch.float16, 2)
    ge[:, :, :, 16:] = torch.nan
    found = fused.Gradients(where, 5, torch.float32)
    fused.backward(where, radial, z, ge, found)
    assert found.forces.isfinite().all() and found.messages.any()
    found = fused.Gradients(where._replace(x=x * 0.2), 5, torch.float32)
    fused.backward(where._replace(x=x * 0.2), radial, z, ge, found)
    assert found.forces.isnan().any()


@pytest.mark.parametrize(
    ("n_comp", "dtype"), [(1, torch.float64), (4, torch.float32), (16, torch.float64)]
)
def test_own_rows_and_their_mirror_give_what_atomics_give(fused, n_comp, dtype):
    where = close_up(4)
    n_nu, n_feat, n_hidden = 5, 6, 19
    z, g = random((4, n_feat), dtype), random((4, n_comp, n_hidden), dtype, 2)
    weight = random((n_nu, n_feat, n_hidden), dtype, 3)
    ge = torch.einsum("icb,nab->icna", g, weight).contiguous()
    parameters = (torch.tensor(p).to(DEVICE, dtype) for p in radial_parameters(n_nu, RCUT))
    geometry, radial = on_device(fused, where), fused.Radial.build(*parameters, RCUT)
    atomics, own = (fused.Gradients(geometry, n_feat, dtype, own) for own in (False, True))
    for found in (atomics, own):
        fused.backward(geometry, radial, operand(fused, z), operand(fused, ge), found)
    assert not own.messages.any()
    q = torch.einsum("ia,nab->inb", z, weight).contiguous()
    h = torch.full_like(q, torch.nan)
    for part in (slice(0, 1), slice(1, 4)):
        fused.mirror(geometry, radial, g, q[part], h[part], own, begin=part.start)
    messages = torch.einsum("inb,nab->ia", h, weight)
    for ours, exact in ((own.forces, atomics.forces), (messages, atomics.messages)):
        assert error(ours.cpu().numpy(), exact.cpu().numpy()) < TOLERANCE[dtype]
    assert torch.equal(own.sums, atomics.sums)


def test_a_mirror_that_does_not_fit_is_refused(fused):
    geometry = on_device(fused, system(5, 9, 5, 20, False)[0])
    mu, sigma = (torch.tensor(p).to(DEVICE) for p in radial_parameters(9, RCUT))
    radial = fused.Radial.build(mu, sigma, RCUT)
    found = fused.Gradients(geometry, 5, mu.dtype, own_rows=True)
    g, q = mu.new_zeros(9, 4, 3), mu.new_zeros(9, 9, 3)
    with pytest.raises(ValueError, match="14 senders, but 9 receivers: the rows of ghosts"):
        fused.mirror(geometry, radial, g, q, None, found)
    geometry = geometry._replace(x=geometry.x[:9])
    with pytest.raises(ValueError, match=r"an array of a block have shape \(9, 9, 2\), not"):
        fused.mirror(geometry, radial, g, q[..., :2], None, found)
    with pytest.raises(TypeError, match=r"an array is torch\.float32, not torch\.float64"):
        fused.mirror(geometry, radial, g.float(), q, None, found)


@pytest.mark.parametrize("n_comp", (1, 4))
@pytest.mark.parametrize("poison", (np.nan, np.inf))
def test_poison_stays_in_its_row(fused, poison, n_comp):
    """NaN shows where it belongs; atoms infinitely far away are those beyond the cutoff."""
    where = poisoned([1, 2, 0, 17], poison)
    kept, receiver = without_first(where)
    z, ge = random((len(where.x), 5), torch.float64), random((5, n_comp, 9, 5), torch.float64, 2)
    parameters = radial_parameters(9, RCUT)
    expected, closest = reference(kept, receiver, parameters, z, ge)
    found, nearest = run(fused, where, parameters, z, ge)
    if np.isinf(poison):
        errors = [error(ours, exact) for ours, exact in zip(found, expected, strict=True)]
        assert max(errors) < 1e-12 and nearest == pytest.approx(closest)
    else:
        assert np.isnan(found[0][0]).any()
        assert error(found[0][1:], expected[0][1:]) < 1e-12
        assert error(found[1][1:5], expected[1][1:5]) < 1e-12


def test_features_of_pairs_beyond_the_end_are_not_touched(fused):
    """0 NaN would be NaN; exactly zero from the end on, which may come before the cutoff."""
    x = torch.tensor([[0.0, 0, 0], [3.5, 0, 0], [0, 5.0, 0], [2.0, 0, 0]], dtype=torch.float64)
    row_ptr, sender = torch.tensor([0, 2]).int(), torch.tensor([1, 2]).int()
    where = fused.Geometry(*(tensor.to(DEVICE) for tensor in (x, row_ptr, sender)))
    mu, sigma = (torch.tensor(p).to(DEVICE) for p in radial_parameters(9, RCUT))
    radial = fused.Radial.build(mu, sigma, RCUT, 3.5)
    z = torch.full((4, 5), torch.nan, dtype=torch.float64, device=DEVICE)
    env, gradients = z.new_full((1, 1, 9, 5), torch.nan), fused.Gradients(where, 5, z.dtype)
    fused.forward(where, radial, z, env)
    fused.backward(where, radial, z, torch.ones_like(env), gradients)
    assert not env.any() and not gradients.forces.any() and not gradients.messages.any()
    assert float(gradients.closest) == math.inf


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"env": (2, 2, 1, 8, 5)}, ValueError, r"\(2, 1, 8, 5\), not \(n_block, 1 | 4 | 9 | 16, 9"),
        ({"env": (2, 2, 2, 9, 5)}, ValueError, r"\(2, 2, 9, 5\), not"),
        ({"env": (2, 1, 9, 5)}, ValueError, r"shape \(2, 1, 9, 5\), .* halves, 1 or 2 of 4 dim"),
        ({"env": (3, 2, 1, 9, 5)}, ValueError, r"shape \(3, 2, 1, 9, 5\), .* 1 or 2 of 4 dim"),
        ({"begin": 8}, ValueError, r"receivers 8 \.\. 9, but there are 9"),
        ({"z": (2, 3, 5)}, ValueError, r"of senders have shape \(2, 3, 5\), not \(2, 14, 5\)"),
        ({"z": (1, 14, 5)}, ValueError, r"of senders have shape \(1, 14, 5\), not \(2, 14, 5\)"),
        ({"z": (14, 5)}, ValueError, r"shape \(14, 5\), but should be halves, 1 or 2 of 2 dim"),
        ({"env dtype": torch.float32}, TypeError, "an array is torch.float32, not torch.float16"),
        ({"z dtype": torch.float32}, TypeError, "is torch.float32, not torch.float16 beside a"),
        ({"real": torch.float64}, TypeError, "an array is torch.float16, not torch.float64"),
        ({"strided": True}, ValueError, "an array is not contiguous"),
        ({"first": True}, ValueError, "a first layer needs the species of all 14 atoms"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(fused, change, kind, message):
    where = on_device(fused, system(5, 9, 5, 20, False)[0])
    real = change.get("real", torch.float32)
    mu, sigma = (torch.tensor(p).to(DEVICE, real) for p in radial_parameters(9, RCUT))
    radial = fused.Radial.build(mu, sigma, RCUT)
    half = torch.float16
    env = mu.new_zeros(change.get("env", (2, 2, 1, 9, 5)), dtype=change.get("env dtype", half))
    env = env.mT.contiguous().mT if "strided" in change else env
    z = mu.new_zeros(change.get("z", (2, 14, 5)), dtype=change.get("z dtype", half))
    z = None if "first" in change else z
    where = where._replace(species=None)
    for sums in (fused.forward, lambda *args: fused.backward(*args[:4], None, args[4])):
        with pytest.raises(kind, match=message):
            sums(where, radial, z, env, change.get("begin", 0))
