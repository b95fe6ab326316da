"""HipnnModel in torch-sim: its validator, our calculator's numbers, lists, dynamics, refusals."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from model_helpers import crystal, make_potential, molecule, slab, to_atoms, triclinic
from torch.utils._python_dispatch import TorchDispatchMode

from md_plugin import HipnnCalculator
from md_plugin.batch_neighbours import BatchList, search_on_device, search_on_host

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
torch_sim = pytest.importorskip("torch_sim", reason="torch-sim is not installed: extra torch-sim")

from torch_sim.models.interface import validate_model_outputs  # noqa: E402

from md_plugin import batch_neighbours, torch_sim_model  # noqa: E402
from md_plugin.torch_sim_model import HipnnModel  # noqa: E402

FS = 0.001 * torch_sim.units.MetalUnits.time  # of ps
KELVIN = torch_sim.units.MetalUnits.temperature
EXACT = {"rtol": 1e-12, "atol": 1e-10}  # float64, energies of some thousand eV

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount")

# torch: the sums; numba: fused inference.
WAYS = [("torch", True), ("torch", False), ("numba", True), ("numba", False)]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}{' with stress' if way[1] else ''}")
def model(request):
    backend, stress = request.param
    model = HipnnModel(make_potential(backend=backend))
    model.compute_stress = stress
    return model


def periodic_atoms():
    big = to_atoms(crystal()) * (2, 1, 2)
    big.rattle(0.05, seed=3)
    far = to_atoms(triclinic())
    far.positions += [[30.0, 0.0, 0.0], [0.0, -41.0, 2.0], [7.0, 7.0, 7.0]]  # outside its cell
    whole_slab = to_atoms(slab())
    whole_slab.pbc = True
    return [to_atoms(crystal()), whole_slab, big, far]


def open_atoms():
    bare = to_atoms(crystal())
    bare.pbc = False
    return [to_atoms(molecule()), bare, Atoms("H", [[1.0, 2.0, 3.0]])]


def slabs():
    wide = to_atoms(slab()) * (2, 1, 1)
    wide.rattle(0.05, seed=4)
    return [to_atoms(slab()), wide]


def to_state(atoms, dtype=torch.float64):
    state = torch_sim.io.atoms_to_state(atoms, torch.device("cpu"), dtype)
    if 0 < atoms[0].pbc.sum() < 3:  # newer versions of torch-sim hold three
        state.pbc = torch.tensor(atoms[0].pbc)
    return state


def systems_of(state, atoms):
    """The state as ASE atoms with the periodic directions of `atoms`, which torch-sim drops."""
    found = state.to_atoms()
    for system, original in zip(found, atoms, strict=True):
        system.pbc = original.pbc
    return found


def assert_same_as_calculator(model, state, atoms, tolerance=EXACT):
    found = {name: value.numpy() for name, value in model(state).items()}
    first = 0
    for k, system in enumerate(atoms):
        system.calc = HipnnCalculator(model.potential, skin=0.0)
        rows = slice(first, first + len(system))
        np.testing.assert_allclose(found["energy"][k], system.get_potential_energy(), **tolerance)
        np.testing.assert_allclose(found["forces"][rows], system.get_forces(), **tolerance)
        if model.compute_stress and system.pbc.all():
            stress = system.get_stress(voigt=False)
            np.testing.assert_allclose(found["stress"][k], stress, **tolerance)
        first += len(system)
    assert first == len(found["forces"]) and ("stress" in found) == model.compute_stress


# --- energies, forces, stress -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_sims_own_validator(backend, dtype):
    name, elements = str(dtype).removeprefix("torch."), (14, 26)
    potential = make_potential(name, species=elements, reference_energies=(-5, -8), rcut=4.0)
    potential.model.backend = backend
    validate_model_outputs(HipnnModel(potential), torch.device("cpu"), dtype)


@pytest.mark.parametrize("atoms", [periodic_atoms, open_atoms, slabs])
def test_same_as_the_calculator(model, atoms):
    assert_same_as_calculator(model, to_state(atoms()), atoms())
    one = atoms()[1:2]
    assert_same_as_calculator(model, to_state(one), one)


def test_float32_is_as_good_as_the_calculators():
    model = HipnnModel(make_potential("float32"))
    found = model(to_state([to_atoms(crystal())], torch.float32))
    assert {value.dtype for value in found.values()} == {torch.float32}
    atoms = to_atoms(crystal())
    atoms.calc = HipnnCalculator(make_potential())
    # Single precision of the positions and in the network; forces of some eV/Å.
    np.testing.assert_allclose(found["forces"].numpy(), atoms.get_forces(), atol=1e-3)


def test_stress_is_the_derivative_by_strain():
    model, atoms = HipnnModel(make_potential()), to_atoms(triclinic())
    stress, h = model(to_state([atoms]))["stress"][0].numpy(), 1e-5
    for a, b in ((0, 0), (1, 2)):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * h / 2
            strain[b, a] += sign * h / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell[:] @ strain, scale_atoms=True)
            energies.append(float(model(to_state([strained]))["energy"]))
        slope = (energies[0] - energies[1]) / (2 * h * atoms.get_volume())
        assert abs(slope - stress[a, b]) < 1e-6 * max(1.0, np.abs(stress).max())


def test_only_what_is_asked_for(model):
    state = to_state(open_atoms())
    assert model.compute_forces
    if model.compute_stress:
        assert model(state)["stress"].shape == (3, 3, 3) and model(state)["stress"].isnan().all()
    energy = model(state)["energy"]
    model.compute_forces = model.compute_stress = False
    found = model(state)
    assert found.keys() == {"energy"}
    torch.testing.assert_close(found["energy"], energy, rtol=1e-14, atol=0)


def test_a_dictionary_is_a_state_too(model):
    state = to_state(periodic_atoms())
    names = ("positions", "cell", "pbc", "atomic_numbers", "system_idx")
    found = model({name: getattr(state, name) for name in names})
    torch.testing.assert_close(found["energy"], model(state)["energy"], rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "stress"), WAYS)
def test_a_committee_gives_its_means(backend, stress):
    model = HipnnModel([make_potential(backend=backend, seed=k) for k in (0, 1)])
    model.compute_stress = stress
    assert_same_as_calculator(model, to_state(periodic_atoms()), periodic_atoms())


def test_one_system_is_fused_with_its_stress_on_any_device():
    """What a GPU does, here on the CPU."""
    model = HipnnModel(make_potential(backend="numba"))
    systems = model._translate(to_state([to_atoms(triclinic())]))
    for here, there in zip(model._together(systems, True), model._alone(systems), strict=True):
        torch.testing.assert_close(here, there, **EXACT)


def test_lonely_atoms(model):
    lonely = [Atoms("O", [[1.0, 2.0, 3.0]]), Atoms("H", [[0.0, 0.0, 0.0]])]
    for atoms in (lonely, lonely[:1]):
        assert_same_as_calculator(model, to_state(atoms), atoms)


def test_many_translations_take_the_sums(monkeypatch):
    monkeypatch.setattr(batch_neighbours, "MAX_TRANSLATIONS", 5)
    monkeypatch.setattr(torch_sim_model, "MAX_TRANSLATIONS", 5)
    model = HipnnModel(make_potential(backend="numba"))
    model.compute_stress = False
    assert_same_as_calculator(model, to_state(periodic_atoms()), periodic_atoms())


# --- neighbour lists --------------------------------------------------------------------------


def test_lists_are_reused_until_atoms_have_moved(model):
    state = to_state(periodic_atoms())
    model(state)
    built, rng = model.n_builds, torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(state.positions.shape, generator=rng))
    state.positions += 0.24 * directions  # in place, as an integrator may; below half the skin
    assert_same_as_calculator(model, state, state.to_atoms())
    assert model.n_builds == built
    state.positions = state.positions + 0.02 * directions
    assert_same_as_calculator(model, state, state.to_atoms())
    assert model.n_builds > built


@pytest.mark.parametrize("atoms", [periodic_atoms, slabs])
def test_lists_are_reused_where_the_engine_wraps(model, atoms):
    state = to_state(atoms())
    model(state)
    built, rng = model.n_builds, torch.Generator().manual_seed(0)
    pbc = torch.as_tensor(state.pbc).expand(3)
    for _ in range(3):
        images = torch.randint(-2, 3, state.positions.shape, generator=rng).double() * pbc
        lattice = state.row_vector_cell[state.system_idx]
        state.positions = state.positions + torch.bmm(images[:, None], lattice)[:, 0]
        assert_same_as_calculator(model, state, systems_of(state, atoms()))
    assert model.n_builds == built


@pytest.mark.parametrize("atoms", [periodic_atoms, slabs])
def test_atoms_that_wander_far_make_no_more_images(atoms):
    """Fused inference counts images with two bytes."""
    state = to_state(atoms())
    lattice, pbc = state.row_vector_cell[state.system_idx], torch.as_tensor(state.pbc)
    counts, rng = set(), torch.Generator().manual_seed(2)
    for size in (0, 1, 100):
        model, moved = HipnnModel(make_potential(backend="torch")), state.clone()
        images = torch.randint(-size, size + 1, state.positions.shape, generator=rng) * pbc
        moved.positions += torch.bmm(images.double()[:, None], lattice)[:, 0]
        moved.pbc = state.pbc
        # Positions some hundred Å away have fewer digits.
        tolerance = {"rtol": 1e-9, "atol": 1e-8}
        assert_same_as_calculator(model, moved, systems_of(moved, atoms()), tolerance)
        counts.add(model._batch.n_translations)
    assert len(counts) == 1


def test_lists_are_reused_under_strain(model):
    state = to_state(periodic_atoms())
    model(state)
    built = model.n_builds
    for factor, same in ((1.02, True), (0.97, True), (0.6, False)):
        strained = state.clone()
        strained.cell *= factor
        strained.positions *= factor
        assert_same_as_calculator(model, strained, strained.to_atoms())
        assert (model.n_builds == built) == same
        built = model.n_builds


@pytest.mark.parametrize("atoms", [periodic_atoms, open_atoms])
def test_a_step_makes_the_host_wait_once(atoms):
    """Whatever reads a number on the host, or finds out a size, waits for a GPU."""
    model, state = HipnnModel(make_potential(backend="torch")), to_state(atoms())
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if str(operator).split(".")[1] in WAITING:
                waits.append(str(operator))
            return operator(*args, **(kwargs or {}))

    with Watch():
        model(state)
        assert len(waits) > 1  # the first builds a list
        del waits[:]
        state.positions = state.positions + 0.01
        model(state)
    assert waits == ["aten._local_scalar_dense.default"]


def test_another_batch_has_another_list(model):
    state = to_state(periodic_atoms())
    for systems in ([0, 1, 2, 3], [3, 1], [1, 3], [1], [0, 1, 2, 3]):
        assert_same_as_calculator(model, state[systems], state[systems].to_atoms())
    swapped = state.clone()
    swapped.atomic_numbers = state.atomic_numbers.flip(0)
    assert_same_as_calculator(model, swapped, swapped.to_atoms())


def test_same_atoms_cut_otherwise_are_another_batch():
    """Positions and species as before; only which atom belongs to which system has changed."""
    model = HipnnModel(make_potential(backend="torch"))
    pair, one = Atoms("H2", [[0, 0, 0], [0.9, 0, 0]]), Atoms("H", [[1.9, 0, 0]])
    other_one, other_pair = pair[:1], pair[1:] + one
    assert_same_as_calculator(model, to_state([pair, one]), [pair, one])
    assert_same_as_calculator(model, to_state([other_one, other_pair]), [other_one, other_pair])


@pytest.mark.parametrize("atoms", [periodic_atoms, slabs, open_atoms])
def test_a_list_that_fits_is_complete(atoms):
    """Strain and displacements of any size: where `fits` says so, no close pair is missing."""
    rcut, rng, fitting = 3.0, torch.Generator().manual_seed(1), 0
    systems = HipnnModel(make_potential())._translate(to_state(atoms()))
    neighbours = BatchList(rcut, 0.6)
    neighbours.build(systems)
    for _ in range(100):
        size = float(torch.rand((), generator=rng))
        strain = torch.eye(3) + 0.1 * size * torch.randn(3, 3, generator=rng)
        moves = 0.3 * size * torch.randn(systems.positions.shape, generator=rng).double()
        cell, x = systems.cell @ strain.double(), systems.positions @ strain.double()
        now = replace(systems, cell=cell, positions=x + moves)
        if neighbours.fits(now):
            fitting += 1
            r = neighbours.geometry(now).r_ij().norm(dim=1)
            assert int((r < rcut).sum()) == len(search_on_host(now, rcut)[0])
    assert 5 < fitting < 95


@pytest.mark.parametrize("atoms", [periodic_atoms, slabs, open_atoms])
@pytest.mark.parametrize("rcut", [2.0, 5.0])
def test_the_search_on_the_device_finds_the_same_pairs(atoms, rcut):
    systems = HipnnModel(make_potential())._translate(to_state(atoms()))
    edges = []
    for search in (search_on_host, search_on_device):
        receiver, sender, image = search(systems, rcut)
        rows = torch.cat([torch.stack([receiver, sender], 1), image.long()], 1)
        edges.append(rows[np.lexsort(rows.numpy().T)])
    assert len(edges[0]) > 0 and torch.equal(*edges)
    neighbours = BatchList(rcut, 0.0, search_on_device)
    neighbours.build(systems)
    r = neighbours.geometry(systems).r_ij().norm(dim=1)
    assert len(r) == len(edges[0]) and float(r.max()) < rcut


# --- dynamics ---------------------------------------------------------------------------------


def tantalum(n_cells, lattice=3.3):
    return bulk("Ta", cubic=True, a=lattice) * (n_cells, n_cells, n_cells)


def energies(state):
    kinetic = torch_sim.calc_kinetic_energy(
        momenta=state.momenta, masses=state.masses, system_idx=state.system_idx
    )
    return state.energy + kinetic


def temperatures(state):
    kT = torch_sim.calc_kT(momenta=state.momenta, masses=state.masses, system_idx=state.system_idx)
    return kT / KELVIN


def start(integrator, atoms, kelvin, **settings):
    model = HipnnModel("ta", dtype="float64")
    model.compute_stress = integrator is torch_sim.npt_langevin
    kT, dt = torch.tensor(kelvin * KELVIN).double(), torch.tensor(2 * FS).double()
    torch.manual_seed(0)
    init, step = integrator(model, kT=kT, dt=dt, **settings)
    return model, init(to_state(atoms), seed=1), step


def test_nve_keeps_the_energy():
    model, state, step = start(torch_sim.nve, [tantalum(2), tantalum(3)], 600.0)
    first, atoms = energies(state), state.n_atoms_per_system
    drift = []
    for _ in range(150):
        state = step(state)
        drift.append((energies(state) - first) / atoms)
    drift = torch.stack(drift)
    kinetic = 1.5 * 600 * KELVIN
    assert drift.abs().max() < 0.01 * kinetic  # velocity Verlet's ripple at 2 fs
    assert drift[-50:].mean(dim=0).abs().max() < 0.002 * kinetic
    assert 1 <= model.n_builds < 15


def test_langevin_finds_its_temperature():
    systems = [tantalum(2)] * 4 + [tantalum(3)]
    _, state, step = start(
        torch_sim.nvt_langevin, systems, 500.0, gamma=torch.tensor(0.02 / FS).double()
    )
    seen = []
    for k in range(400):
        state = step(state)
        if k >= 150:
            seen.append(temperatures(state))
    # 118 atoms, some ten independent samples: three per cent is one standard deviation.
    weights = state.n_atoms_per_system / state.n_atoms
    assert abs(float((torch.stack(seen) * weights).sum(dim=1).mean()) / 500 - 1) < 0.12


def test_npt_lets_a_squeezed_crystal_expand():
    """Were the sign of the stress wrong, it would collapse."""
    systems = [tantalum(2, 3.2), tantalum(2, 3.42)]
    zero, rate = torch.tensor(0.0).double(), torch.tensor(0.005 / FS).double()
    settings = {"external_pressure": zero, "alpha": rate, "cell_alpha": rate}
    settings["b_tau"] = torch.tensor(100 * FS).double()
    model, state, step = start(torch_sim.npt_langevin, systems, 300.0, **settings)
    first = state.volume.clone()
    for _ in range(150):
        state = step(state)
    assert state.volume[0] > 1.02 * first[0] and state.volume[1] < 0.98 * first[1]
    assert_same_as_calculator(model, state, state.to_atoms(), {"rtol": 1e-9, "atol": 1e-9})


@pytest.mark.filterwarnings("ignore:Optimize has reached max steps")
def test_relaxation_through_the_runner_of_torch_sim():
    rattled = [tantalum(2), tantalum(1)]
    for k, atoms in enumerate(rattled):
        atoms.rattle(0.05, seed=k)
    model = HipnnModel("ta", dtype="float64")
    before = model(to_state(rattled))["energy"]
    done = torch_sim.optimize(
        system=rattled, model=model, optimizer=torch_sim.gradient_descent, max_steps=20
    )
    assert (done.energy < before - 0.01).all()


def test_batches_that_change_in_flight():
    """Relaxed systems leave, others take their place: the same energies as all together."""
    systems = [tantalum(n) for n in (2, 1, 2, 1, 1)]
    for k, atoms in enumerate(systems):
        atoms.rattle(0.02 * (k + 1), seed=k)
    model = HipnnModel("ta", dtype="float64")
    batcher = torch_sim.InFlightAutoBatcher(
        model, memory_scales_with="n_atoms", max_memory_scaler=20
    )
    sizes, forward = set(), model.forward

    def counting(state, **kwargs):
        sizes.add(state.n_systems)
        return forward(state, **kwargs)

    model.forward = counting
    relaxed = torch_sim.optimize(
        system=systems,
        model=model,
        optimizer=torch_sim.gradient_descent,
        autobatcher=batcher,
        convergence_fn=torch_sim.generate_force_convergence_fn(0.01, include_cell_forces=False),
        max_steps=400,
    )
    assert len(sizes) > 1
    perfect = HipnnModel("ta", dtype="float64")(to_state([tantalum(1)]))["energy"] / 2
    # Forces below 0.01 eV/Å against force constants of some 10 eV/Å^2: 1e-5 eV per atom.
    per_atom = relaxed.energy / relaxed.n_atoms_per_system
    assert (per_atom - perfect).abs().max() < 1e-4


def test_the_block_on_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "torch_sim.md").read_text(encoding="utf-8")
    names = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["state"].n_systems == 2 and names["state"].energy.isfinite().all()


# --- refusals ---------------------------------------------------------------------------------


def test_refusals(model):
    state = to_state(periodic_atoms())
    with pytest.raises(ValueError, match=r"torch.float32 on cpu, but the model takes torch.float6"):
        model(to_state(periodic_atoms(), torch.float32))
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=r"knows H, C, O, but the structure also has Ta"):
            model(to_state([tantalum(1)]))
    broken = state.clone()
    broken.positions[1, 2] = float("nan")
    with pytest.raises(ValueError, match="positions are not finite: the first bad row is 1"):
        model(broken)
    broken = state.clone()
    broken.cell[:, :, 0] = 0.0
    with pytest.raises(ValueError, match="lattice vector 0 is zero"):
        model(broken)


def test_refused_settings():
    with pytest.raises(ValueError, match="skin must not be negative, got -1 Å"):
        HipnnModel(make_potential(), skin=-1)
    with pytest.raises(ValueError, match="dtype must be one of float64, float32, mixed"):
        HipnnModel("ta", dtype="float16")
    assert repr(HipnnModel(make_potential())).startswith("HipnnModel(Potential(")


def test_without_torch_sim_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_sim", None)
    monkeypatch.delitem(sys.modules, "md_plugin.torch_sim_model")
    with pytest.raises(ImportError, match=r"pip install 'md-plugin\[torch-sim\]'"):
        import md_plugin.torch_sim_model  # noqa: F401
