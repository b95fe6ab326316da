"""Fused inference gives what the closed sums give; who takes it, and who does not and why."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from lammps_helpers import environment
from model_helpers import STRUCTURES, make_model, make_potential, to_atoms
from physics_suite import close
from test_physics import BOXES, CountingHalo, Domains

from md_plugin.batch_neighbours import BatchList, Systems
from md_plugin.calculator import HipnnCalculator
from md_plugin.committee import Committee
from md_plugin.halo import IndexHalo
from md_plugin.kernels import list_backends, softplus_cpu
from md_plugin.model import fusion
from md_plugin.model.fusion import FusedHipnn
from md_plugin.model.hipnn import HipnnSum
from md_plugin.neighbours import NeighbourList, Structure
from md_plugin.pairs import Geometry
from md_plugin.potential import Potential

pytestmark = pytest.mark.skipif(
    bool(list_backends()["numba"]), reason=f"numba: {list_backends()['numba']}"
)

# Both ways round some hundred times, in another order. Relative to the largest force (some eV/Å);
# energies absolute, in eV, beside references of thousands of eV.
# The plain network amplifies float32's roundings most: 1.5e-5.
TOLERANCE = {"float64": (1e-12, 1e-11), "mixed": (5e-5, 5e-5), "float32": (5e-5, 5e-5)}

KINDS = list(product((0, 1, 2), (1, 2, 3)))
NETWORKS = {
    **{
        f"order {o}, {n} layers": {"order": o, "n_interactions": n}
        for o in (0, 1, 2)
        for n in (1, 2, 3)
    },
    "widths": {"n_feat": (4, 7), "n_hidden": (3, 9), "activation": "SiLU"},
    "vector, widths": {"order": 1, "n_feat": (17, 4), "n_hidden": (5, 19), "activation": "PReLU"},
    "plain": {"residual": False, "activation": "Tanh", "n_atom_layers": 2},
    "quadrupole, plain": {"order": 2, "residual": False, "n_atom_layers": 0},
    "no atom layers": {"n_atom_layers": 0, "n_nu": 1, "n_feat": 1},
    "mixed Gaussians": {"n_gaussians": 9, "n_interactions": 2},
    "mixed Gaussians, vector": {"n_gaussians": 23, "order": 1, "n_interactions": 2},
    "pairs end early": {"pair_cutoff": 2.57, "n_interactions": 2},
    "pairs end early, quadrupole": {"pair_cutoff": 2.9, "order": 2, "n_interactions": 2},
    "invariants": {"order": 3, "n_max": 4, "n_interactions": 2},
    "invariants, not normalised": {"order": 2, "n_max": 3, "norm_eps": None},
    "invariants of scalars": {"n_max": 2, "n_feat": 5},
    "many": {"n_nu": 21, "n_feat": 33, "order": 2},
}


def geometry(structure, reach):
    """With a skin: pairs beyond the cutoff are among them."""
    neighbours = NeighbourList(reach, 0.4)
    neighbours.update(structure.positions, structure.cell, structure.pbc)
    return neighbours.geometry(structure.positions, structure.cell)


def fused(potential, structure):
    assert potential.why_not_fused() == ""
    species = torch.from_numpy(structure.species)
    found = potential.evaluate_geometry(species, geometry(structure, potential.rcut))
    assert found.sums is not None and found.pair_gradient is None
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_same_as_the_closed_sums(name, network, dtype):
    potential, structure = make_potential(dtype, **NETWORKS[network]), STRUCTURES[name]()
    expected, found = potential.evaluate(structure), fused(potential, structure)
    relative, absolute = TOLERANCE[dtype]
    scale = float(expected.forces.abs().max())
    close(found.energy, expected.energy, atol=absolute, rtol=1e-15)
    close(found.atom_energy, expected.atom_energy, atol=absolute, rtol=1e-15)
    close(found.forces, expected.forces, atol=relative * scale)
    close(found.virial, expected.virial, atol=10 * relative * scale)


def test_tensors_of_a_model_that_were_rounded():
    """hippynn rounds the matrices that make them; the kernels' own are exact, by 1e-8 others."""
    potential, structure = make_potential(order=3, n_max=4), STRUCTURES["crystal"]()
    components = potential.model.components
    exact = torch.eye(16, dtype=torch.float64)
    close(components.of_exact(), exact, atol=1e-14)
    for name, matrix in components.named_buffers():
        setattr(components, name, matrix.float().double())
    assert float((components.of_exact() - exact).abs().max()) > 1e-9
    found, expected = fused(potential, structure), potential.evaluate(structure)
    close(found.forces, expected.forces, atol=1e-12)
    close(found.virial, expected.virial, atol=1e-11)


@pytest.mark.parametrize("order", [0, 2])
def test_threads(order, monkeypatch):
    """Two threads add the same in another order; each number of threads always in its own."""
    monkeypatch.setattr(fusion, "ATOMS_PER_THREAD", 1)
    potential, structure = make_potential(order=order), STRUCTURES["crystal"]()
    one, before = fused(potential, structure), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two, again = fused(potential, structure), fused(potential, structure)
    finally:
        torch.set_num_threads(before)
    close(two.forces, one.forces, atol=1e-12)
    close(two.virial, one.virial, atol=1e-12)
    assert torch.equal(two.forces, again.forces) and torch.equal(two.virial, again.virial)


@pytest.mark.parametrize("cuts", [(1, 1, 1), (2, 2, 2), (1, 1, 5)])
@pytest.mark.parametrize(("order", "n_interactions"), [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("box", BOXES)
def test_ranks_equal_the_whole_box(box, order, n_interactions, cuts):
    potential = make_potential(order=order, n_interactions=n_interactions)
    whole = potential.evaluate(BOXES[box]())
    domains = Domains(BOXES[box](), cuts, potential.rcut)
    halo = CountingAdjoint(IndexHalo(domains.owner))
    place = Geometry(domains.x, domains.pairs)
    found = potential.evaluate_geometry(domains.species, place, halo=halo)
    assert found.sums is not None
    assert halo.fills == halo.returns == n_interactions - 1
    close(found.energy, whole.energy, rtol=1e-13)
    close(domains.forces(found.forces), whole.forces, atol=1e-10)
    close(found.virial, whole.virial, atol=1e-10)


class CountingAdjoint(CountingHalo):
    """Counts the adjoint where it is called outside of autograd."""

    def adjoint(self, rows):
        self.returns += 1
        return self.halo.adjoint(rows)


def test_ghosts_without_a_halo_are_an_error():
    domains = Domains(BOXES["crystal"](), (2, 1, 1), 3.0)
    with pytest.raises(ValueError, match=r"ghost atoms.*need a halo"):
        make_potential().evaluate_geometry(domains.species, Geometry(domains.x, domains.pairs))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("n_atoms", [0, 1])
def test_few_atoms(order, n_atoms):
    structure = Structure(np.array([6] * n_atoms, int), np.zeros((n_atoms, 3)))
    potential = make_potential(order=order)
    expected, found = potential.evaluate(structure), fused(potential, structure)
    close(found.energy, expected.energy, rtol=1e-14)
    assert found.forces.shape == (n_atoms, 3) and not found.forces.any()
    assert not found.virial.any()


def test_compilation_is_told_once_per_installation(tmp_path):
    """A first process compiles and says so; a second one starts from the disk."""
    code = (
        "import numpy as np, sys; sys.path.insert(0, sys.argv[1])\n"
        "from model_helpers import make_potential, crystal, to_atoms\n"
        "from md_plugin import HipnnCalculator\n"
        "from md_plugin.kernels import fused_rows\n"
        "atoms = to_atoms(crystal())\n"
        "atoms.calc = HipnnCalculator(make_potential('mixed', n_interactions=1))\n"
        "atoms.get_forces()\n"
        "stats = fused_rows.forward_species_range.stats\n"
        "print('compiled', sum(stats.cache_misses.values()))\n"
    )
    env = environment(NUMBA_CACHE_DIR=tmp_path)
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    for compiled in (1, 0):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert f"compiled {compiled}" in done.stdout
        assert done.stderr.count("compiling the fused layers for this CPU") == compiled


def test_softplus_and_its_slope():
    """float32; the error of exp(-|x|) grows with |x|: 40 x 6e-8; NaN is not forgotten."""
    x = np.concatenate([np.linspace(-40, 60, 70_001), [0.0, -1e-30, 88.0, 1e4]]).astype(np.float32)
    value, slope = softplus_cpu.softplus(x)
    exact = torch.from_numpy(x).double()
    close(value, torch.nn.functional.softplus(exact, threshold=1e3), rtol=5e-6)
    close(slope, torch.sigmoid(exact), rtol=5e-6)
    for count in (1, 15, 17):  # parts of a vector
        close(softplus_cpu.softplus(x[:count])[0], value[:count])
    assert np.isnan(softplus_cpu.softplus(np.array([np.nan, 1.0], np.float32))[0]).tolist() == [
        1,
        0,
    ]
    with pytest.raises(TypeError, match="softplus takes float32, got float64"):
        softplus_cpu.softplus(x.astype(float))


# --- who takes this way -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_potential(backend="torch"), "the backend is 'torch', and only 'numba'"),
    ],
)
def test_others_go_over_pairs(make, reason):
    potential, structure = make(), STRUCTURES["crystal"]()
    assert reason in potential.why_not_fused()
    species = torch.from_numpy(structure.species)
    found = potential.evaluate_geometry(species, geometry(structure, potential.rcut))
    assert found.sums is None and found.pair_gradient is not None
    close(found.forces, potential.evaluate(structure).forces, atol=1e-12)
    if "backend" not in reason:
        with pytest.raises(ValueError, match=reason):
            FusedHipnn(potential.model)


@pytest.mark.parametrize("network", ["order 0, 1 layers", "order 0, 2 layers", "order 1, 1 layers"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_virials_of_atoms(dtype, network):
    """Half of each pair to each of its atoms, as the closed sums have it."""
    potential, structure = make_potential(dtype, **NETWORKS[network]), STRUCTURES["slab"]()
    species, place = torch.from_numpy(structure.species), geometry(structure, potential.rcut)
    found = potential.evaluate_geometry(species, place, per_atom=True)
    assert found.sums is not None and found.atom_virial.shape == (len(species), 3, 3)
    expected, relative = potential.evaluate(structure).atom_virial, TOLERANCE[dtype][0]
    scale = float(expected.abs().max())
    assert scale > 0.1 and float((expected - expected.mean(dim=0)).abs().max()) > 0.1 * scale
    close(found.atom_virial, expected, atol=10 * relative * scale)
    close(found.atom_virial.sum(dim=0), found.virial[0], atol=10 * relative * scale)
    without = fused(potential, structure)
    assert without.atom_virial is None and torch.equal(without.forces, found.forces)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_virials_of_atoms_of_ranks(order):
    """Those of ghosts belong to their owners."""
    settings = {"n_max": 2} if order == 3 else {}
    potential = make_potential(order=order, **settings)
    whole = potential.evaluate(BOXES["crystal"]())
    domains = Domains(BOXES["crystal"](), (2, 1, 1), potential.rcut)
    place, halo = Geometry(domains.x, domains.pairs), IndexHalo(domains.owner)
    found = potential.evaluate_geometry(domains.species, place, halo=halo, per_atom=True)
    assert found.sums is not None
    close(domains.forces(found.atom_virial.flatten(1)), whole.atom_virial.flatten(1), atol=1e-10)


def batch():
    """Two crystals, of four atoms and of three."""
    crystals = [STRUCTURES["crystal"](), STRUCTURES["triclinic"]()]
    species = torch.from_numpy(np.concatenate([c.species for c in crystals]))
    x = torch.from_numpy(np.concatenate([c.positions for c in crystals]))
    cell = torch.from_numpy(np.stack([c.cell for c in crystals]))
    return Systems(species, x, cell, torch.tensor([0] * 4 + [1] * 3), (True, True, True))


@pytest.mark.parametrize("per_atom", [False, True])
@pytest.mark.parametrize("order", [0, 2])
def test_virials_of_structures(order, per_atom):
    systems, potential = batch(), make_potential(order=order)
    neighbours = BatchList(potential.rcut, 0.4)
    neighbours.build(systems)
    place, settings = neighbours.geometry(systems), {"structure": systems.system, "n_structures": 2}
    expected = potential.evaluate_pairs(systems.species, place.pairs, place.r_ij(), **settings)
    found = potential.evaluate_geometry(systems.species, place, per_atom=per_atom, **settings)
    assert found.sums is not None and (found.atom_virial is not None) == per_atom
    assert (expected.virial[0] - expected.virial[1]).abs().max() > 0.1
    close(found.energy, expected.energy, rtol=1e-14)
    close(found.virial, expected.virial, atol=1e-10)


def test_no_second_derivatives():
    """An error, never a wrong number."""
    potential, structure = make_potential(), STRUCTURES["molecule"]()
    place = geometry(structure, potential.rcut)
    asked = Geometry(place.x.clone().requires_grad_(), place.pairs, None, None)
    with pytest.raises(RuntimeError, match="cannot be differentiated again; evaluate_pairs with"):
        FusedHipnn(potential.model).evaluate(torch.from_numpy(structure.species), asked)
    assert not fused(potential, structure).forces.requires_grad


def test_changed_weights_are_noticed():
    potential, structure = make_potential(order=1), STRUCTURES["crystal"]()
    before = fused(potential, structure).forces
    with torch.no_grad():
        potential.model.blocks[1][0].layer.sensitivity.mu.mul_(1.05)
        potential.model.blocks[0][0].layer.weight.mul_(0.9)
    found = fused(potential, structure).forces
    assert (found - before).abs().max() > 1e-3
    close(found, potential.evaluate(structure).forces, atol=1e-11)


def test_sums_and_committees():
    structure = STRUCTURES["crystal"]()
    parts = make_model(order=1), make_model(seed=1, n_interactions=1, rcut=2.4, r_max=2.2)
    total = Potential(HipnnSum(parts), device="cpu", dtype="float64")
    close(fused(total, structure).forces, total.evaluate(structure).forces, atol=1e-11)
    species, place = torch.from_numpy(structure.species), geometry(structure, total.rcut)
    atoms = total.evaluate_geometry(species, place, per_atom=True).atom_virial
    close(atoms, total.evaluate(structure).atom_virial, atol=1e-11)
    committee = Committee([make_potential(order=2), make_potential(seed=3)])
    found, expected = fused(committee, structure), committee.evaluate(structure)
    close(found.forces, expected.forces, atol=1e-11)
    close(found.virial, expected.virial, atol=1e-11)
    atoms = committee.evaluate_geometry(species, place, per_atom=True)
    want = torch.stack([member.atom_virial for member in expected.members]).mean(dim=0)
    assert atoms.sums is not None
    close(atoms.atom_virial, want, atol=1e-11)
    assert len(found.members) == 2 and all(m.sums is not None for m in found.members)
    mixed = Committee([make_potential(), make_potential(backend="torch")])
    assert "the backend is 'torch'" in mixed.why_not_fused()
    found = mixed.evaluate_geometry(species, geometry(structure, mixed.rcut))
    close(found.forces, mixed.evaluate(structure).forces, atol=1e-11)


def test_atoms_too_close_are_told_once(caplog):
    structure = STRUCTURES["molecule"]()
    potential = make_potential(info={"r_closest": 1.2})
    for _ in range(2):
        fused(potential, structure)
    x = structure.positions
    closest = min(np.linalg.norm(a - b) for k, a in enumerate(x) for b in x[:k])
    assert caplog.text.count(f"atoms are {closest:.3f} Å apart") == 1


def test_atoms_at_one_place_are_named():
    atoms = to_atoms(STRUCTURES["crystal"]())
    atoms.positions[2] = atoms.positions[0]
    atoms.calc = HipnnCalculator(make_potential())
    with pytest.raises(ValueError, match="atoms 0 and 2 are at the same place"):
        atoms.get_forces()


def test_the_calculator_takes_this_way(monkeypatch):
    """Dynamics never builds anything per pair."""
    monkeypatch.setattr(Geometry, "r_ij", lambda self: pytest.fail("pair vectors were made"))
    atoms = to_atoms(STRUCTURES["crystal"]())
    atoms.calc = HipnnCalculator(make_potential(order=2))
    atoms.get_forces(), atoms.get_stress(), atoms.get_potential_energy()
