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
}


def potential_of(dtype="float64", **changes):
    model = make_model(backend="triton", **changes)
    return Potential(model, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("network", NETWORKS)
def test_same_as_the_closed_sums(network, dtype):
    """With a skin, and atoms that see their own images."""
    structure = STRUCTURES["slab" if network == "vector" else "crystal"]()
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


def test_the_third_order_goes_over_pairs():
    potential, structure = potential_of(order=3, n_max=2), STRUCTURES["molecule"]()
    assert "no fused layers for tensors of the third order" in potential.why_not_fused()
    with pytest.raises(ValueError, match="third order in 'triton'"):
        FusedHipnn(potential.model, "triton")
    species = torch.from_numpy(structure.species)
    found = potential.evaluate_geometry(species, geometry(structure, potential.rcut))
    assert found.sums is None


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
