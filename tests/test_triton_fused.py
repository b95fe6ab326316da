"""The fused layers in Triton against autograd in float64, interpreted where there is no GPU."""

import math

import numpy as np
import pytest
import torch
from kernel_cases import absence, poisoned_memory
from test_fused_kernels import Exact, error, poisoned, radial_parameters, system, without_first

from md_plugin.model.radial import tensor_components

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    bool(absence("triton", DEVICE)), reason=absence("triton", DEVICE) or "there"
)
# As for the CPU's kernels; the narrowest Gaussians here amplify the rounding of 1/r by ten more.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12}
RCUT = 4.0


@pytest.fixture
def fused():
    from md_plugin.kernels import triton_fused

    return triton_fused


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
    t = tensor_components(exact.d / exact.r, {1: 0, 4: 1, 9: 2}[ge.shape[1]])
    rows = t[:, :, None, None] * exact.sense[:, None, :, None] * z[exact.sender][:, None, None]
    return exact.gradients(exact.sum(rows), ge.double().cpu().numpy(), z), exact.closest


def run(fused, where, parameters, z, ge, block=1000):
    """env, forces, dE/dz, virial and the closest distance; z is None for one-hot species."""
    geometry, dtype = on_device(fused, where), ge.dtype
    radial = fused.Radial.build(*(torch.tensor(x).to(DEVICE, dtype) for x in parameters), RCUT)
    with poisoned_memory():
        env = torch.empty_like(ge)
        gradients = fused.Gradients(geometry, 0 if z is None else z.shape[1], dtype)
        for begin in range(0, len(ge), block):
            part = slice(begin, min(begin + block, len(ge)))
            fused.forward(geometry, radial, z, env[part], begin)
            fused.backward(geometry, radial, z, ge[part], gradients, begin)
    found = env, gradients.forces, gradients.messages, gradients.virial
    return [x.cpu().numpy() for x in found], float(gradients.closest)


def random(shape, dtype, seed=1):
    numbers = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(numbers).to(DEVICE, dtype)


CASES = [
    (1, 20, 64, True),
    (1, 9, 7, False),
    (1, 33, 70, True),
    (1, 1, 1, False),
    (4, 9, 20, True),
    (4, 3, 70, False),
    (9, 9, 5, True),
    (9, 17, 16, False),
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
        ({"env": (2, 1, 8, 5)}, ValueError, r"\(2, 1, 8, 5\), not \(n_block, 1 | 4 | 9, 9, n_feat"),
        ({"env": (2, 2, 9, 5)}, ValueError, r"\(2, 2, 9, 5\), not"),
        ({"begin": 8}, ValueError, r"receivers 8 \.\. 9, but there are 9"),
        ({"z": (3, 5)}, ValueError, r"features of senders have shape \(3, 5\), not \(14, 5\)"),
        ({"dtype": torch.float64}, TypeError, "an array is torch.float64, the table"),
        ({"strided": True}, ValueError, "an array is not contiguous"),
        ({"first": True}, ValueError, "a first layer needs the species of all 14 atoms"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(fused, change, kind, message):
    where = on_device(fused, system(5, 9, 5, 20, False)[0])
    mu, sigma = (torch.tensor(p).to(DEVICE).float() for p in radial_parameters(9, RCUT))
    radial = fused.Radial.build(mu, sigma, RCUT)
    env = mu.new_zeros(change.get("env", (2, 1, 9, 5)), dtype=change.get("dtype"))
    env = env.mT.contiguous().mT if "strided" in change else env
    z = None if "first" in change else mu.new_zeros(change.get("z", (14, 5)))
    where = where._replace(species=None)
    for sums in (fused.forward, lambda *args: fused.backward(*args[:4], None, args[4])):
        with pytest.raises(kind, match=message):
            sums(where, radial, z, env, change.get("begin", 0))
