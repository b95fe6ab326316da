"""Fused inference by Triton gives what the closed sums give: networks, ghosts, skins, few atoms."""

import numpy as np
import pytest
import torch
from kernel_cases import absence
from model_helpers import STRUCTURES, make_model, make_potential
from physics_suite import close
from test_fusion import CountingAdjoint, fused, geometry
from test_physics import BOXES, Domains

from md_plugin.halo import IndexHalo
from md_plugin.kernels import BackendError
from md_plugin.model.fusion import FusedHipnn
from md_plugin.model.hipnn import HipnnSum
from md_plugin.neighbours import Structure
from md_plugin.pairs import Geometry, Pairs
from md_plugin.potential import Potential

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    bool(absence("triton", DEVICE)), reason=absence("triton", DEVICE) or "there"
)

# As in test_fusion, where their reasons are.
TOLERANCE = {"float64": (1e-12, 1e-11), "mixed": (5e-5, 5e-5)}

NETWORKS = {
    "one layer": {"n_interactions": 1},
    "vector": {"order": 1, "n_feat": (17, 4), "n_hidden": (5, 19), "activation": "PReLU"},
    "quadrupole, plain": {"order": 2, "residual": False, "n_atom_layers": 0},
    "mixed Gaussians": {"n_gaussians": 9, "n_interactions": 3},
    "pairs end early": {"pair_cutoff": 2.57, "order": 1},
    "invariants": {"order": 2, "n_max": 3},
    "third order": {"order": 3, "n_max": 4},
}


PLACES = {"vector": "slab", "third order": "molecule"}


def potential_of(dtype="float64", **changes):
    model = make_model(backend="triton", **changes)
    return Potential(model, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("network", NETWORKS)
def test_same_as_the_closed_sums(network, dtype):
    """With a skin, and atoms that see their own images."""
    structure = STRUCTURES[PLACES.get(network, "crystal")]()
    expected = make_potential(dtype, backend="torch", **NETWORKS[network]).evaluate(structure)
    found = fused(potential_of(dtype, **NETWORKS[network]), structure)
    relative, absolute = TOLERANCE[dtype]
    scale = float(expected.forces.abs().max())
    close(found.atom_energy, expected.atom_energy, atol=absolute, rtol=1e-15)
    close(found.forces, expected.forces, atol=relative * scale)
    close(found.virial, expected.virial, atol=10 * relative * scale)


@pytest.mark.parametrize("order", [0, 1])
def test_ranks_equal_the_whole_box(order):
    """Ghosts, a halo, and blocks of receivers that are not all of them."""
    whole = make_potential(backend="torch", order=order).evaluate(BOXES["crystal"]())
    potential = potential_of(order=order)
    domains = Domains(BOXES["crystal"](), (2, 1, 1), potential.rcut)
    halo = CountingAdjoint(IndexHalo(domains.owner.to(DEVICE)))
    place = Geometry(domains.x, domains.pairs)
    found = potential.evaluate_geometry(domains.species, place, halo=halo)
    assert found.sums is not None and halo.fills == halo.returns == 1
    close(found.energy, whole.energy, rtol=1e-13)
    close(domains.forces(found.forces), whole.forces, atol=1e-10)
    close(found.virial, whole.virial, atol=1e-10)


@pytest.mark.parametrize("order", [0, 2])
def test_virials_of_atoms_and_of_structures(order):
    """Half of each pair to each of its atoms; structures take the rows of their receivers."""
    potential, structure = potential_of(order=order), STRUCTURES["molecule"]()
    species, place = torch.from_numpy(structure.species), geometry(structure, potential.rcut)
    n, pairs = len(species), place.pairs
    twice = torch.cat([pairs.receiver, pairs.receiver + n])
    sender = torch.cat([pairs.sender_long, pairs.sender_long + n])
    x = torch.cat([place.x, 1.001 * place.x + 50.0])
    both = Geometry(x, Pairs.from_edges(twice, sender, 2 * n, 2 * n)[0])
    split = {"structure": torch.arange(2 * n) // n, "n_structures": 2}
    found = potential.evaluate_geometry(species.repeat(2), both, per_atom=True, **split)
    expected = make_potential(backend="torch", order=order).evaluate_pairs(
        species.repeat(2), both.pairs, both.r_ij(), **split
    )
    assert found.sums is not None
    assert (expected.virial[0] - expected.virial[1]).abs().max() > 1e-3
    close(found.virial, expected.virial, atol=1e-10)
    close(found.atom_virial, expected.atom_virial, atol=1e-10)


def test_blocks_of_atoms_are_the_same_as_all_at_once(monkeypatch):
    from md_plugin.model import fused_device

    potential, structure = potential_of(order=1), STRUCTURES["slab"]()
    whole = fused(potential, structure)
    monkeypatch.setattr(fused_device.DeviceEngine, "max_block", 3)
    monkeypatch.setattr(fused_device, "BLOCK_BYTES", 1)
    monkeypatch.setattr("md_plugin.model.fusion.LEAST_BLOCK", 2)
    parts = fused(potential_of(order=1), structure)
    close(parts.forces, whole.forces, atol=1e-12)
    close(parts.virial, whole.virial, atol=1e-12)
    close(parts.energy, whole.energy, rtol=1e-14)


@pytest.mark.parametrize("n_atoms", [0, 1])
def test_few_atoms(n_atoms):
    structure = Structure(np.array([6] * n_atoms, int), np.zeros((n_atoms, 3)))
    found = fused(potential_of(order=1), structure)
    expected = make_potential(backend="torch", order=1).evaluate(structure)
    close(found.energy, expected.energy, rtol=1e-14)
    assert found.forces.shape == (n_atoms, 3) and not found.forces.any()
    assert not found.virial.any()


def test_a_sum_of_networks_and_a_warning_of_close_atoms(caplog):
    structure = STRUCTURES["molecule"]()
    parts = [make_model(backend="triton", n_interactions=1, seed=seed) for seed in (0, 1)]
    total = Potential(HipnnSum(parts), device=DEVICE, dtype="float64", info={"r_closest": 1.2})
    found = fused(total, structure)
    close(found.forces, total.evaluate(structure).forces, atol=1e-11)
    x = structure.positions
    closest = min(np.linalg.norm(a - b) for k, a in enumerate(x) for b in x[:k])
    assert caplog.text.count(f"atoms are {closest:.3f} Å apart") == 1


def test_weights_and_backends_that_change_are_noticed():
    potential, structure = potential_of(n_interactions=1), STRUCTURES["molecule"]()
    before = fused(potential, structure).forces
    with torch.no_grad():
        potential.model.blocks[0][0].layer.sensitivity.mu.mul_(1.05)
    found = fused(potential, structure).forces
    assert (found - before).abs().max() > 1e-3
    if DEVICE == "cpu":
        potential.model.backend = "numba"
        close(fused(potential, structure).forces, found, atol=1e-11)
        assert potential._fused[1].parts[0].engine.threads


def test_no_second_derivatives():
    potential, structure = potential_of(), STRUCTURES["molecule"]()
    place = geometry(structure, potential.rcut)
    asked = Geometry(place.x.clone().requires_grad_(), place.pairs)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        FusedHipnn(potential.model, "triton").evaluate(torch.from_numpy(structure.species), asked)


@pytest.mark.parametrize("name", ["env", "forces", "messages"])
def test_a_broken_kernel_is_an_error(name, monkeypatch):
    from md_plugin.model import fused_device

    def spoiled(where, radial, z, array, *rest):
        sound[bool(rest)](where, radial, z, array, *rest)
        target = array if name == "env" else getattr(rest[0], name, None) if rest else None
        if target is not None and target.numel() and bool(rest) == (name != "env"):
            target.mul_(1 + 1e-3)

    kernels = fused_device.triton_fused
    sound = {False: kernels.forward, True: kernels.backward}
    monkeypatch.setattr(kernels, "forward", spoiled)
    monkeypatch.setattr(kernels, "backward", spoiled)
    fused_device.self_check.cache_clear()
    with pytest.raises(BackendError, match=f"computes wrong {name} of a fused layer"):
        FusedHipnn(potential_of().model, "triton")


@pytest.mark.parametrize(
    "name, message", [("product", "products"), ("split_rows", "products of rows")]
)
def test_a_broken_product_is_an_error(name, message, monkeypatch):
    from md_plugin.kernels import triton_halves, triton_matmul
    from md_plugin.model import fused_check

    module = {"product": triton_matmul, "split_rows": triton_halves}[name]
    sound = getattr(module, name)

    def spoiled(x, y, out, *rest):
        sound(x, y, out, *rest)
        out.mul_(1 + 1e-3)

    monkeypatch.setattr(module, name, spoiled)
    for check in (fused_check.self_check, fused_check._product_check):
        check.cache_clear()
    with pytest.raises(BackendError, match=f"computes wrong {message} of a fused layer"):
        FusedHipnn(potential_of("mixed").model, "triton")


def relative_error(found, expected):
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("place", "changes"),
    [("crystal", {"order": 1}), ("molecule", {"order": 2, "n_hidden": 21, "n_interactions": 1})],
)
def test_deterministic(place, changes, deterministic, monkeypatch):
    """What atomics give, from kernels that have none: `test_triton_compile` looks at their code."""
    from md_plugin.kernels import triton_fused

    passes = []
    mirror = triton_fused.mirror
    monkeypatch.setattr(
        triton_fused, "mirror", lambda *a, **k: (passes.append(a[5]), mirror(*a, **k))
    )
    structure = STRUCTURES[place]()
    found = fused(potential_of(**changes), structure)
    assert passes and all(gradients.own_rows for gradients in passes)
    expected = make_potential(backend="torch", **changes).evaluate(structure)
    close(found.forces, expected.forces, atol=1e-11 * float(expected.forces.abs().max()))
    close(found.virial, expected.virial, atol=1e-10 * float(expected.forces.abs().max()))


def test_deterministic_is_checked_before_the_first_step(deterministic):
    """A step in which the host waits for an answer is not recorded in a graph."""
    from md_plugin.model.fused_check import mirror_check

    mirror_check.cache_clear()
    potential = Potential(make_model(backend="triton"), device=DEVICE, dtype="float64")
    potential._step()
    assert mirror_check.cache_info().misses == 1
    fused(potential, STRUCTURES["molecule"]())
    assert mirror_check.cache_info().misses == 1


def test_deterministic_needs_all_rows(deterministic):
    potential = potential_of()
    domains = Domains(BOXES["crystal"](), (2, 1, 1), potential.rcut)
    halo, place = IndexHalo(domains.owner.to(DEVICE)), Geometry(domains.x, domains.pairs)
    with pytest.raises(RuntimeError, match=r"ghosts are added by atomics.*choose backend='torch'"):
        potential.evaluate_geometry(domains.species, place, halo=halo)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="changes from run to run"):
        potential.evaluate_geometry(domains.species, place, halo=halo)


def test_deterministic_needs_pairs_both_ways(deterministic):
    pairs, _ = Pairs.from_edges(torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1]), 3, 3)
    x = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="some pair i -> j of the list has no pair j -> i"):
        potential_of().evaluate_geometry(torch.tensor([1, 6, 8]), Geometry(x, pairs))
    both, _ = Pairs.from_edges(torch.tensor([0, 1, 2, 1]), torch.tensor([1, 0, 1, 2]), 3, 3)
    both.check_mutual()


@pytest.mark.parametrize("order", [0, 2])
def test_fast(order):
    """float16 has 11 bits, 2^-11 = 5e-4, and this network amplifies; float32 is within 5e-5."""
    structure, changes = STRUCTURES["crystal"](), {"order": order, "n_feat": 17}
    expected = make_potential(backend="torch", **changes).evaluate(structure)
    found = fused(potential_of("fast", **changes), structure)
    assert 1e-5 < relative_error(found.forces, expected.forces) < 2e-3
    close(found.energy, expected.energy, atol=3e-3)


def resized(size, dtype):
    """A network whose features are `size` times as large, and weights of them as much smaller."""
    model = make_model(backend="triton", n_atom_layers=0, residual=False, activation="ReLU")
    first, second = (block[0].layer for block in model.blocks)
    with torch.no_grad():
        for parameter in (first.weight, *first.self_interaction.parameters()):
            parameter.mul_(size)
        for parameter in (second.weight, second.self_interaction.weight, model.readouts[1].weight):
            parameter.div_(size)
    return Potential(model, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", ["mixed", "fast"])
def test_whatever_the_size_of_features(dtype, monkeypatch):
    """Powers of two take them to float16: the same forces bitwise. Without, they overflow."""
    from md_plugin.kernels import triton_arrays, triton_halves

    structure = STRUCTURES["molecule"]()
    small, usual, large = (fused(resized(2.0**n, dtype), structure).forces for n in (-30, 0, 30))
    assert usual.abs().max() > 0.1
    assert torch.equal(small, usual) and torch.equal(large, usual)

    def unscaled(x, halves, power):
        halves.copy_(triton_arrays.halves(x, len(halves)))
        power.fill_(1.0)

    monkeypatch.setattr(triton_halves, "split", unscaled)
    with pytest.raises(AssertionError):
        close(fused(resized(2.0**30, dtype), structure).forces, usual, atol=1.0)


def test_fast_is_refused_where_there_is_none(deterministic):
    with pytest.raises(ValueError, match=r"fused layers of backend 'triton'.*dtype='mixed'"):
        Potential(make_model(backend="torch"), dtype="fast")
    with pytest.raises(ValueError, match=r"the network in torch\.float64"):
        FusedHipnn(make_model(backend="triton"), "triton", fast=True)
    species, place = STRUCTURES["molecule"]().species, geometry(STRUCTURES["molecule"](), 3.0)
    with pytest.raises(RuntimeError, match=r"virials of atoms are added.*backend='torch'"):
        potential_of().evaluate_geometry(torch.from_numpy(species), place, per_atom=True)
    with pytest.raises(RuntimeError, match=r"in dtype='fast' are added by atomics.*'mixed'"):
        fused(potential_of("fast"), STRUCTURES["molecule"]())


def trajectory(potential, steps=8, dt=0.4):
    """Total energies, eV, of a molecule at 2000 K, by velocity Verlet; dt in fs."""
    structure = STRUCTURES["molecule"]()
    mass = torch.from_numpy(np.where(structure.species == 1, 1.0, 12.0))[:, None] * 103.6427
    species = torch.from_numpy(structure.species)
    x, v = torch.from_numpy(structure.positions.copy()), torch.randn(6, 3, dtype=torch.float64)
    v = torch.from_numpy(np.random.default_rng(3).normal(size=(6, 3))) * (0.1723 / mass).sqrt()
    energies, force = [], None
    for _ in range(steps + 1):
        structure.positions[:] = x.numpy()
        place = geometry(structure, potential.rcut)
        found = potential.evaluate_geometry(species, place)
        assert potential.dtype != "fast" or found.sums is not None
        if force is not None:
            v = v + 0.5 * dt * found.forces / mass
        force = found.forces
        energies.append(float(found.energy) + float((0.5 * mass * v * v).sum()))
        v = v + 0.5 * dt * force / mass
        x = x + dt * v
    return np.array(energies)


def test_fast_keeps_the_energy():
    """Beside float64, which leaves the error of Verlet: energies that differ by rounding alone.

    At most 1.3e-3 eV here, of forces up to 9 eV/Å; operands in bfloat16 make it 5.4e-3.
    """
    exact = trajectory(make_potential(backend="torch"))
    fast = trajectory(potential_of("fast"))
    drift = (fast - fast[0]) - (exact - exact[0])
    assert np.abs(drift).max() < 3e-3, drift
