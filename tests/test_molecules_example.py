"""The molecules example: labels that are nanodft's, a model that learned them, scripts that run."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from ase import Atoms, units
from ase.io import read
from ase.md.verlet import VelocityVerlet
from lammps_helpers import BIN, environment, launch, needs_lammps, tables

from md_plugin import HipnnCalculator
from md_plugin.cli import main
from md_plugin.nanodft import energy_forces

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "molecules"
needs_pyscf = pytest.mark.skipif(
    importlib.util.find_spec("pyscf") is None,
    reason="nanodft needs PySCF: pip install 'md-plugin[dft]'",
)
PAGE = (ROOT / "docs" / "molecules.md").read_text()


@pytest.fixture(scope="module")
def example():
    """The example's modules, as `python compare.py` would find them."""
    sys.path.insert(0, str(FOLDER))
    names = ("make_structures", "compare")
    modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in names}
    yield modules
    sys.path.remove(str(FOLDER))
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def parts():
    return {name: read(FOLDER / f"data/{name}.xyz", ":") for name in ("train", "valid", "test")}


def dimer(example, distance=2.9):
    atoms = example["compare"].water_dimer(distance)
    atoms.calc = HipnnCalculator("molecules", device="cpu", dtype="float64")
    return atoms


# --- data -------------------------------------------------------------------------------------


def test_labels_are_complete_and_of_one_method(parts):
    frames = [atoms for part in parts.values() for atoms in part]
    assert {atoms.info["nanodft_method"] for atoms in frames} == {"b3lyp/6-31g, grid level 2"}
    for atoms in frames:
        assert np.isfinite(atoms.get_potential_energy())
        # Each force is derived on a grid that moves with the atoms: nothing is left over.
        assert np.abs(atoms.get_forces().sum(axis=0)).max() < 1e-6


def test_parts_hold_the_same_kinds_and_no_frame_twice(parts, example):
    kinds = set(example["make_structures"].KINDS)
    for frames in parts.values():
        assert {atoms.info["config_type"] for atoms in frames} == kinds
        assert {atoms.info["sampling"] for atoms in frames} == {"displaced", "dynamics"}
    fingerprints = [
        tuple(np.sort(atoms.get_all_distances(), axis=None).round(3))
        for frames in parts.values()
        for atoms in frames
    ]
    assert len(set(fingerprints)) == len(fingerprints)


@needs_pyscf
@pytest.mark.parametrize("kind", ["water", "formaldehyde"])
def test_labels_are_nanodfts(parts, kind):
    atoms = next(x for x in parts["test"] if x.info["config_type"] == kind)
    method = {"xc": "b3lyp", "basis": "6-31g", "grid_level": 2}
    result = energy_forces(atoms.numbers, atoms.positions, **method)
    assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    # The label's cycles began from another frame's density: as far as conv_tol_grad binds forces.
    np.testing.assert_allclose(result.forces, atoms.get_forces(), atol=3e-6)


# --- the bundled model ------------------------------------------------------------------------


def test_held_out_errors_are_those_of_the_page(parts, example):
    rows = example["compare"].error_table(HipnnCalculator("molecules", device="cpu"), parts["test"])
    assert rows["all"]["ratio, %"] < 20
    for name, row in rows.items():
        found = re.search(rf"^\| {name} \| (.*) \|$", PAGE, flags=re.M)
        stated = [float(x) for x in found[1].split("|")]
        # One unit of the last digit that the page prints, and float32.
        np.testing.assert_allclose(stated, list(row.values()), atol=0.11, rtol=1e-3)


def test_energy_is_conserved(example):
    atoms = dimer(example)
    widths = np.sqrt(300 * units.kB * atoms.get_masses())[:, None]
    atoms.set_momenta(widths * np.random.default_rng(2).normal(size=(6, 3)))
    energies = []
    dynamics = VelocityVerlet(atoms, timestep=0.25 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(200)
    kinetic = atoms.get_kinetic_energy()
    # Fluctuations of Verlet grow with the square of the step; a drift would outgrow them.
    assert kinetic > 0.1 and np.ptp(energies) < 0.03 * kinetic
    first, last = np.mean(energies[:80]), np.mean(energies[-80:])
    assert abs(last - first) < 0.005 * kinetic


@needs_lammps
def test_lammps_and_ase_agree(tmp_path):
    assert main(["export", "molecules", "-o", str(tmp_path / "molecules.pt")]) == 0
    command = [BIN / "lmp", "-sf", "py", "-log", "none", "-var", "steps", 60]
    done = launch([*command, "-in", FOLDER / "in.dimer"], tmp_path, env=environment())
    assert done.returncode == 0, done.stdout
    (rows,) = tables(done.stdout)
    frames = (tmp_path / "dimer.dump").read_text().split("ITEM: TIMESTEP\n")[1:]
    assert len(frames) == 4
    for frame in (frames[0], frames[-1]):
        columns = [line.split() for line in frame.splitlines()[8:]]
        values = np.array([row[2:] for row in columns], float)
        atoms = Atoms([row[1] for row in columns], values[:, :3])
        atoms.calc = HipnnCalculator("molecules", device="cpu")
        # float32: 6e-8 per rounding of forces of some eV/Å
        np.testing.assert_allclose(values[:, 3:], atoms.get_forces(), atol=1e-4)
        # Step, time, temperature, potential energy, total energy
        row = rows[0] if frame is frames[0] else rows[-1]
        assert row[3] == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
    assert rows[-1, 4] == pytest.approx(rows[0, 4], abs=0.01)


# --- the way there ----------------------------------------------------------------------------


@needs_pyscf
def test_from_nothing_to_a_model(example, tmp_path, capsys):
    make_structures = example["make_structures"]
    kinds = ["water", "methanol"]
    arguments = ["--kinds", *kinds, "--scale", "0.05", "--output", str(tmp_path / "structures")]
    make_structures.main(arguments)
    again = make_structures.make("test", kinds, seed=1, scale=0.05)
    stored = read(tmp_path / "structures" / "test.xyz", ":")
    for a, b in zip(again, stored, strict=True):
        assert a.info == b.info
        np.testing.assert_allclose(a.positions, b.positions, atol=1e-7)  # eight decimals
    (tmp_path / "data").mkdir()
    for part in ("test", "valid", "train"):
        source = tmp_path / "structures" / f"{part}.xyz"
        method = ["--xc", "hf", "--basis", "sto-3g"]
        assert main(["label", str(source), str(tmp_path / f"data/{part}.xyz"), *method]) == 0
    for stage in ("train", "finish"):
        config = yaml.safe_load((FOLDER / f"{stage}.yaml").read_text())
        config["training"] |= {"max_epochs": 2, "threads": None}
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(config))
        assert main(["train", str(tmp_path / f"{stage}.yaml")]) == 0
    capsys.readouterr()
    model = ["--model", str(tmp_path / "run/finish/best.hipnn")]
    files = ["--data", str(tmp_path / "data/test.xyz"), "--output", str(tmp_path / "plot.png")]
    example["compare"].main([*model, *files, "--points", "2"])
    assert "| methanol | 2 | 12 |" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_block_of_the_page_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(compile(block, "docs/molecules.md", "exec"), {})
    # Methanol has -115.7 Ha.
    assert re.search(r"-31[45]\d\.\d+ eV", capsys.readouterr().out)
