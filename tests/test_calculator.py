"""The ASE contract, after ase/test/calculator (lj, morse, fd, traj, si_stress); MD, optimisers."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import LinearCombinationCalculator, SumCalculator
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.nptberendsen import NPTBerendsen
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE
from model_helpers import (
    STRUCTURES,
    crystal,
    make_model,
    make_potential,
    molecule,
    slab,
    to_atoms,
    triclinic,
)
from physics_suite import close

from md_plugin import HipnnCalculator, neighbours, save_model
from md_plugin.checkpoint import CheckpointError, bundled_models
from md_plugin.kernels import BackendError


def calculator(dtype="float64", skin=0.5, info=None, **changes):
    changes.setdefault("backend", "torch")
    return HipnnCalculator(make_potential(dtype, info, **changes), skin=skin)


def atoms_of(structure, **kwargs):
    atoms = to_atoms(structure)
    atoms.calc = calculator(**kwargs)
    return atoms


@pytest.fixture
def count(monkeypatch):
    """Counts how often the network is evaluated; `count.n` starts at zero."""
    from md_plugin.potential import Potential

    original = Potential.evaluate_pairs

    def evaluate_pairs(self, *args, **kwargs):
        evaluate_pairs.n += 1
        return original(self, *args, **kwargs)

    evaluate_pairs.n = 0
    monkeypatch.setattr(Potential, "evaluate_pairs", evaluate_pairs)
    return evaluate_pairs


# --- properties -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_same_as_the_potential(name):
    structure = STRUCTURES[name]()
    atoms, result = atoms_of(structure), make_potential().evaluate(structure)
    close(atoms.get_potential_energy(), float(result.energy), rtol=1e-14)
    close(atoms.get_potential_energies(), result.atom_energy, rtol=1e-13)
    close(atoms.get_forces(), result.forces, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "mixed"])
def test_energies_sum_and_types(dtype):
    atoms = atoms_of(triclinic(), dtype=dtype)
    energy = atoms.get_potential_energy()
    assert isinstance(energy, float)
    assert energy == atoms.get_potential_energy(force_consistent=True)
    close(atoms.get_potential_energies().sum(), energy, rtol=1e-14)
    shapes = {"energies": (3,), "forces": (3, 3), "stress": (6,), "stresses": (3, 6)}
    for name, shape in shapes.items():
        value = atoms.calc.get_property(name, atoms)
        assert (value.dtype, value.shape) == (np.float64, shape), name


@pytest.mark.parametrize("dtype", ["float64", "float32", "mixed"])
@pytest.mark.parametrize("make", [crystal, triclinic])
def test_stresses_sum_to_stress(make, dtype):
    atoms = atoms_of(make(), dtype=dtype)
    stress = atoms.get_stress()
    # float32: 1e-7 of pair terms of up to 10 eV over 15 Å^3
    tolerance = 1e-13 if dtype == "float64" else 1e-5
    close(atoms.get_stresses().sum(axis=0), stress, atol=tolerance)


def test_stress_is_in_voigt_order():
    atoms = atoms_of(triclinic())
    voigt, full = atoms.get_stress(), atoms.get_stress(voigt=False)
    order = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
    close(voigt, [full[index] for index in order], atol=0)
    assert np.unique(voigt.round(6)).size == 6, "equal components would hide a wrong order"
    virial = make_potential().evaluate(triclinic()).virial[0].numpy()
    close(full, -virial / atoms.get_volume(), atol=1e-13)


def test_sheared_crystal():
    """As ase/test/calculator/test_si_stress: which components symmetry makes equal."""
    from ase.build import bulk

    atoms = bulk("C", "diamond", a=3.6)
    atoms.calc = calculator(order=1)
    atoms.cell[0] *= 0.85
    stress = atoms.get_stress()
    close(stress[1], stress[2], rtol=1e-9)
    close(stress[4], stress[5], rtol=1e-9)
    assert abs(stress[0] - stress[1]) > 1e-4


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", STRUCTURES)
def test_numerical_forces(name, order):
    atoms = atoms_of(STRUCTURES[name](), order=order)
    forces = atoms.get_forces()
    # central differences: their own error is of order eps^2 = 1e-8 times the third derivative
    close(calculate_numerical_forces(atoms, eps=1e-4), forces, atol=1e-6 * (1 + abs(forces).max()))
    close(forces.sum(axis=0), np.zeros(3), atol=1e-10)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("left_handed", [False, True])
@pytest.mark.parametrize("make", [crystal, triclinic])
def test_numerical_stress(make, left_handed, order):
    atoms = atoms_of(make(), order=order)
    if left_handed:
        atoms.set_cell(atoms.cell[[1, 0, 2]])
    stress = atoms.get_stress()
    close(calculate_numerical_stress(atoms, eps=1e-5), stress, atol=1e-6)


def test_bulk_of_equal_atoms():
    """As ase/test/calculator/test_lj: equal energies; one displaced atom is pulled back."""
    from ase.build import bulk

    atoms = bulk("C", cubic=True)
    atoms.calc = calculator()
    assert atoms.get_potential_energies().std() < 1e-10
    close(atoms.get_forces(), np.zeros((8, 3)), atol=1e-10)
    atoms.positions[0, 0] += 0.03
    assert abs(atoms.get_forces()[0, 0]) > 1e-4


@pytest.mark.parametrize("make", [molecule, slab])
@pytest.mark.parametrize("name", ["stress", "stresses"])
def test_stress_needs_three_periodic_directions(make, name):
    atoms = atoms_of(make())
    with pytest.raises(PropertyNotImplementedError, match="stress needs three periodic directions"):
        atoms.calc.get_property(name, atoms)
    assert np.isfinite(atoms.get_forces()).all()
    atoms.get_potential_energy()
    assert "stress" not in atoms.calc.export_properties()


def test_properties_that_do_not_exist():
    atoms = atoms_of(molecule())
    for ask in (atoms.get_magnetic_moment, atoms.get_charges, atoms.get_dipole_moment):
        with pytest.raises(PropertyNotImplementedError):
            ask()


@pytest.mark.parametrize("pbc", [True, (True, False, True), False])
def test_small_systems(pbc):
    cell = 4.0 * np.eye(3)
    empty, one = (Atoms(s, cell=cell, pbc=pbc, calculator=calculator()) for s in ("", "C"))
    assert empty.get_potential_energy() == 0.0
    assert empty.get_forces().shape == (0, 3)
    close(one.get_forces(), np.zeros((1, 3)), atol=1e-12)
    if pbc is True:
        assert empty.get_stresses().shape == (0, 6)
        close(one.get_stresses()[0], one.get_stress(), atol=1e-13)


# --- what is computed when --------------------------------------------------------------------


def test_nothing_is_computed_twice(count):
    atoms = atoms_of(crystal())
    atoms.get_forces()
    assert count.n == 1
    assert not atoms.calc.calculation_required(atoms, ["energy", "forces", "stress"])
    for _ in range(2):
        atoms.get_potential_energy(), atoms.get_potential_energies(), atoms.get_stress()
        atoms.get_potential_energy(force_consistent=True), atoms.get_forces()
    assert count.n == 1
    atoms.get_stresses()
    assert count.n == 2
    atoms.get_stresses(), atoms.get_stress(), atoms.get_forces()
    assert count.n == 2


def test_energy_alone_computes_no_forces():
    atoms = atoms_of(crystal())
    atoms.get_potential_energy()
    assert set(atoms.calc.results) == {"energy", "free_energy", "energies"}


CHANGES = {
    "positions": lambda atoms: atoms.positions.__setitem__((0, 0), 0.2),
    "cell": lambda atoms: atoms.set_cell(atoms.cell * 1.01),
    "strain": lambda atoms: atoms.set_cell(atoms.cell * 1.01, scale_atoms=True),
    "pbc": lambda atoms: atoms.set_pbc((True, True, False)),
    "numbers": lambda atoms: atoms.numbers.__setitem__(0, 8),
    "one more": lambda atoms: atoms.append("H"),
    "one less": lambda atoms: atoms.pop(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change, count):
    atoms = atoms_of(crystal())
    atoms.get_forces()
    CHANGES[change](atoms)
    fresh = atoms.copy()
    fresh.calc = calculator(skin=0.0)
    forces = atoms.get_forces()
    assert count.n == 2
    close(forces, fresh.get_forces(), atol=1e-11)
    close(atoms.get_potential_energy(), fresh.get_potential_energy(), rtol=1e-13)


def test_results_are_the_callers_own():
    atoms = atoms_of(crystal())
    atoms.get_forces()[:] = 0.0
    atoms.get_stress()[:] = 0.0
    assert atoms.get_forces().any() and atoms.get_stress().any()


def test_one_calculator_for_two_structures(count):
    shared = calculator()
    a, b = to_atoms(crystal()), to_atoms(molecule())
    a.calc = b.calc = shared
    for _ in range(2):
        for atoms, structure in ((a, crystal()), (b, molecule())):
            expected = make_potential().evaluate(structure).forces
            close(atoms.get_forces(), expected, atol=1e-11)


def test_calculate_without_get():
    """As ase/test/calculator/test_lj: system_changes may be a part of the truth."""
    atoms = atoms_of(crystal())
    atoms.calc.calculate(atoms, system_changes=["positions"])
    assert atoms.calc.results["energy"] == atoms.get_potential_energy()


def test_neighbour_list_is_reused():
    atoms = atoms_of(crystal(), skin=0.4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        atoms.positions += rng.uniform(-0.01, 0.01, atoms.positions.shape)
        atoms.set_cell(atoms.cell * rng.uniform(0.999, 1.001))
        fresh = atoms.copy()
        fresh.calc = calculator(skin=0.0)
        close(atoms.get_forces(), fresh.get_forces(), atol=1e-11)
    assert atoms.calc.neighbours.n_builds == 1


# --- files, copies, mixtures ------------------------------------------------------------------


def test_export_properties():
    atoms = atoms_of(crystal())
    atoms.get_stresses()
    exported = atoms.calc.export_properties()
    assert set(exported) - {"natoms"} == set(HipnnCalculator.implemented_properties)
    close(exported["forces"], atoms.get_forces())


@pytest.mark.parametrize("make", [crystal, slab, molecule])
@pytest.mark.parametrize("suffix", ["traj", "extxyz"])
def test_written_and_read_again(tmp_path, make, suffix):
    atoms = atoms_of(make())
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    write(tmp_path / f"a.{suffix}", atoms)
    again = read(tmp_path / f"a.{suffix}")
    # extended XYZ holds eight decimals
    tolerance = 1e-12 if suffix == "traj" else 1e-7
    close(again.get_potential_energy(), energy, atol=tolerance)
    close(again.get_forces(), forces, atol=tolerance)
    if atoms.pbc.all():
        close(again.get_stress(), atoms.get_stress(), atol=tolerance)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("used", [False, True])
def test_copies_live_on_their_own(duplicate, used):
    atoms = to_atoms(crystal())
    original = calculator(order=2, info={"r_closest": 0.5})
    expected = original.get_potential_energy(atoms) if used else None
    twin = duplicate(original)
    if used:
        assert twin.results["energy"] == expected
    moved = atoms.copy()
    moved.rattle(0.05, seed=1)
    forces = twin.get_forces(moved)
    close(forces, original.get_forces(moved), atol=0)
    with torch.no_grad():
        for parameter in twin.potential.model.parameters():
            parameter.zero_()
    atoms.rattle(0.01, seed=2)
    assert original.get_forces(atoms).any()


def test_deepcopy_of_atoms_keeps_the_calculator():
    atoms = atoms_of(crystal())
    energy = atoms.get_potential_energy()
    again = copy.deepcopy(atoms)
    assert again.calc is not atoms.calc
    assert again.get_potential_energy() == energy


def test_mixing():
    atoms = to_atoms(crystal())
    parts = [calculator(), LennardJones(sigma=1.0, epsilon=0.05, rc=4.0)]
    single = [
        [getattr(part, f"get_{name}")(atoms) for name in ("potential_energy", "forces", "stress")]
        for part in parts
    ]
    for weights, mixed in (
        ((1.0, 1.0), SumCalculator(parts)),
        ((0.3, 2.0), LinearCombinationCalculator(parts, [0.3, 2.0])),
    ):
        atoms.calc = mixed
        found = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        for value, a, b in zip(found, *single, strict=True):
            close(value, weights[0] * a + weights[1] * b, rtol=1e-12, atol=1e-12)


def test_ensemble_of_calculators_shares_nothing():
    atoms = to_atoms(crystal())
    energies = [calculator(seed=seed).get_potential_energy(atoms) for seed in (0, 1, 0)]
    assert energies[0] == energies[2] != energies[1]


# --- optimisers and molecular dynamics --------------------------------------------------------


@pytest.mark.parametrize("make", [molecule, slab])
@pytest.mark.parametrize("optimizer", [BFGS, FIRE])
def test_optimisers_go_downhill(make, optimizer):
    atoms = atoms_of(make(), order=1, seed=5)
    energy, force = atoms.get_potential_energy(), abs(atoms.get_forces()).max()
    optimizer(atoms, logfile=None).run(fmax=0.02, steps=80)
    assert atoms.get_potential_energy() < energy
    assert abs(atoms.get_forces()).max() < 0.3 * force


def test_cell_filter():
    atoms = atoms_of(crystal(), order=1, seed=5)
    energy, stress = atoms.get_potential_energy(), abs(atoms.get_stress()).max()
    FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0.02, steps=80)
    assert atoms.get_potential_energy() < energy
    assert abs(atoms.get_stress()).max() < 0.1 * stress
    assert atoms.calc.neighbours.n_builds < 10


def moving(make, temperature, **kwargs):
    atoms = atoms_of(make(), **kwargs)
    atoms.set_masses([12.0] * len(atoms))
    scale = np.sqrt(12.0 * units.kB * temperature)
    atoms.set_momenta(np.random.default_rng(0).normal(scale=scale, size=(len(atoms), 3)))
    return atoms


@pytest.mark.parametrize("make", [crystal, slab, molecule])
@pytest.mark.parametrize("dtype", ["float64", "mixed"])
def test_nve_conserves_energy(make, dtype, count):
    atoms = moving(make, 100.0, dtype=dtype, order=1)
    energies = []
    dynamics = VelocityVerlet(atoms, timestep=0.2 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(60)
    kinetic = 1.5 * len(atoms) * units.kB * 100.0
    assert np.ptp(energies) < 0.05 * kinetic
    # one evaluation per step, one list for the whole run
    assert count.n == 61
    assert atoms.calc.neighbours.n_builds == 1


def test_langevin_and_npt():
    thermostat = {"timestep": 0.5 * units.fs, "temperature_K": 300}
    barostat = {"pressure_au": 0.0, "compressibility_au": 0.1}
    for make, kind, settings in (
        (slab, Langevin, {"friction": 0.02, "fixcm": False}),
        (crystal, NPTBerendsen, barostat),
    ):
        atoms = moving(make, 300.0, dtype="mixed")
        volume = atoms.get_volume() if atoms.pbc.all() else None
        kind(atoms, **thermostat, **settings).run(25)
        assert np.isfinite(atoms.positions).all() and np.isfinite(atoms.get_total_energy())
        assert volume is None or atoms.get_volume() != volume
        fresh = atoms.copy()
        fresh.calc = calculator("mixed", skin=0.0)
        # float32 sums whose order differs by the zeros of the skin
        close(atoms.get_forces(), fresh.get_forces(), atol=1e-4)


def test_mtk_barostat():
    chain = pytest.importorskip("ase.md.nose_hoover_chain")
    if not hasattr(chain, "IsotropicMTKNPT"):
        pytest.skip("this ASE has no IsotropicMTKNPT")
    atoms = moving(crystal, 300.0)
    settings = {"temperature_K": 300, "pressure_au": 0.0, "tdamp": 50.0, "pdamp": 500.0}
    dynamics = chain.IsotropicMTKNPT(atoms, timestep=0.2 * units.fs, **settings)
    start = dynamics.get_conserved_energy()
    dynamics.run(30)
    assert abs(dynamics.get_conserved_energy() - start) < 0.05


# --- what a user can get wrong ----------------------------------------------------------------


def test_unknown_element_is_named():
    atoms = Atoms("HTaSi", positions=np.eye(3))
    atoms.calc = calculator()
    message = r"the model knows H, C, O, but the structure also has Si, Ta; use a model that was"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            atoms.get_potential_energy()
    atoms.symbols[:] = "H"
    assert np.isfinite(atoms.get_potential_energy())
    atoms.symbols[1] = "N"
    with pytest.raises(ValueError, match="also has N;"):
        atoms.get_forces()


@pytest.mark.parametrize("make", [crystal, molecule])
def test_positions_that_are_not_finite(make):
    atoms = atoms_of(make())
    atoms.get_forces()
    atoms.positions[2, 1] = np.nan
    with pytest.raises(ValueError, match="positions are not finite: the first bad row is 2"):
        atoms.get_forces()
    atoms.positions[2, 1] = 0.1
    assert np.isfinite(atoms.get_forces()).all()


@pytest.mark.parametrize("order", [0, 1])
def test_atoms_at_the_same_place(order):
    atoms = atoms_of(molecule(), order=order)
    atoms.positions[4] = atoms.positions[1]
    with pytest.raises(ValueError, match="atoms 1 and 4 are at the same place"):
        atoms.get_forces()
    atoms.positions[4] += 1.0
    assert np.isfinite(atoms.get_forces()).all()


def test_network_that_overflows():
    atoms = atoms_of(molecule())
    with torch.no_grad():
        atoms.calc.potential.model.readouts[1].weight.fill_(1e308)
    with pytest.raises(ValueError, match="energy or forces are not finite although the positions"):
        atoms.get_potential_energy()


def test_bad_cells():
    atoms = Atoms("C", pbc=True, calculator=calculator())
    with pytest.raises(ValueError, match="lattice vector 0 is zero; set the cell or switch off"):
        atoms.get_potential_energy()
    atoms.set_cell([[3, 0, 0], [3, 0, 0], [0, 0, 3]])
    with pytest.raises(ValueError, match="coplanar"):
        atoms.get_potential_energy()
    atoms.set_cell([np.nan, 3, 3])
    with pytest.raises(ValueError, match="cell vectors are not finite"):
        atoms.get_potential_energy()


def test_bad_settings(tmp_path, monkeypatch):
    path = tmp_path / "a.hipnn"
    save_model(path, make_model())
    for settings, error, message in (
        ({"dtype": "float16"}, ValueError, "dtype must be one of float64, float32, mixed"),
        ({"skin": -0.1}, ValueError, "skin must not be negative, got -0.1 Å"),
        ({"skin": float("nan")}, ValueError, "skin must not be negative, got nan Å"),
        ({"device": "abacus"}, ValueError, "device 'abacus' is not"),
        ({"backend": "abacus"}, BackendError, "unknown backend 'abacus'. Available: torch"),
    ):
        with pytest.raises(error, match=message):
            HipnnCalculator(path, **settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' was asked for, but torch sees no CUDA"):
        HipnnCalculator(path, device="cuda")


def test_missing_model_lists_the_bundled_ones():
    with pytest.raises(CheckpointError, match=r"no model file 'tq', .* \(bundled: ") as caught:
        HipnnCalculator("tq")
    assert all(repr(name) in str(caught.value) for name in bundled_models())


@pytest.mark.parametrize("name", list(bundled_models()))
def test_bundled_models_have_names(name):
    assert HipnnCalculator(name, device="cpu").potential.info


def test_close_atoms_are_told_once_with_the_distance(caplog):
    atoms = atoms_of(molecule(), info={"r_closest": 0.9})
    with caplog.at_level(logging.WARNING, logger="md_plugin"):
        atoms.get_forces()
        assert not caplog.records
        atoms.positions[1] = atoms.positions[0] + [0.75, 0, 0]
        atoms.get_forces()
        atoms.positions[1] = atoms.positions[0] + [0.65, 0, 0]
        atoms.get_forces()
    (record,) = caplog.records
    assert "atoms are 0.750 Å apart; the closest pair in the training data" in record.getMessage()
    assert "0.900 Å" in record.getMessage()


def test_models_that_know_no_closest_pair_stay_silent(caplog):
    atoms = atoms_of(molecule())
    atoms.positions[1] = atoms.positions[0] + [0.1, 0, 0]
    with caplog.at_level(logging.WARNING, logger="md_plugin"):
        atoms.get_forces()
    assert not caplog.records


def test_made_from_path_and_repr(tmp_path):
    save_model(tmp_path / "a.hipnn", make_model())
    made = HipnnCalculator(
        str(tmp_path / "a.hipnn"), device="cpu", dtype="float64", backend="torch", skin=0.2
    )
    text = repr(made)
    assert text.startswith("HipnnCalculator(Potential(HIP-NN, H, C, O,") and "skin=0.2" in text
    assert "dtype='float64'" in text and "backend='torch'" in text
    atoms = to_atoms(crystal())
    close(made.get_forces(atoms), calculator().get_forces(atoms), atol=1e-12)


# --- many atoms -------------------------------------------------------------------------------


@pytest.mark.parametrize("pbc", [True, (True, False, True)])
def test_many_atoms_are_renumbered_inside_and_nobody_sees_it(monkeypatch, pbc):
    atoms = atoms_of(crystal())
    atoms = (atoms * (3, 2, 2))[np.random.default_rng(0).permutation(12 * len(atoms))]
    atoms.rattle(0.05, seed=1)
    atoms.pbc = pbc
    members = [make_potential(seed=seed) for seed in (0, 1)]
    names = ["energies", "forces"] + (["stress", "stresses"] if pbc is True else [])
    found = []
    for many in (10**6, 1):
        monkeypatch.setattr(neighbours, "MANY_ATOMS", many)
        calc = HipnnCalculator(members, skin=0.3)
        moved = atoms.copy()
        for _ in range(3):  # the list is reused, then built again
            calc.calculate(moved, names)
            moved.positions += 0.1 * np.sin(np.arange(3 * len(atoms))).reshape(-1, 3)
        found.append(calc.results)
        assert (calc.neighbours.order is None) == (many > 1)
        assert calc.neighbours.n_builds == 2
    assert found[0].keys() == found[1].keys() >= {*names, "forces_std", "energies_std"}
    for name, expected in found[0].items():
        close(found[1][name], expected, atol=1e-11)


@pytest.mark.parametrize("many", [1, 100])
def test_atoms_at_the_same_place_have_the_callers_numbers(monkeypatch, many):
    monkeypatch.setattr(neighbours, "MANY_ATOMS", many)
    atoms = (atoms_of(crystal()) * (2, 1, 1))[::-1]
    atoms.positions[5] = atoms.positions[1]
    atoms.calc = calculator()
    with pytest.raises(ValueError, match=r"atoms (1 and 5|5 and 1) are at the same place"):
        atoms.get_forces()
