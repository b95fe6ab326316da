"""md-plugin label: what ASE reads back, failed frames, resuming, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import nanodft_cases as cases
import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write

import md_plugin
from md_plugin import cli
from md_plugin.data import read_dataset
from md_plugin.nanodft import Settings, energy_forces
from md_plugin.nanodft.label import LabelError, Labelling

QUICK = Settings(xc="hf", basis="sto-3g")
ARGUMENTS = ["--xc", "hf", "--basis", "sto-3g", "--device", "cpu"]


@pytest.fixture
def good():
    """Five molecules of two compositions, in turn."""
    return [
        cases.displaced(name, seed) for seed, name in enumerate(("H2O", "HCN", "H2O", "HCN", "H2O"))
    ]


@pytest.fixture
def mixed(good):
    """The same with a radical (frame 2), a periodic box (frame 4) and a cation (frame 5)."""
    box = good[0].copy()
    box.cell, box.pbc = [9, 9, 9], True
    cation = Atoms("OH3", [[0, 0, 0], [0, 0.95, 0.2], [0.8, -0.5, 0.2], [-0.8, -0.5, 0.2]])
    cation.info["charge"] = 1
    radical = Atoms("OH", [[0, 0, 0], [0, 0, 1.0]])
    return [*good[:2], radical, good[2], box, cation, *good[3:]]


def paths(folder, frames):
    write(folder / "in.xyz", frames)
    return folder / "in.xyz", folder / "out.xyz"


def label(folder, frames, **kwargs):
    source, target = paths(folder, frames)
    run = Labelling(source, target, QUICK, **kwargs)
    list(run)
    return run


def run_cli(capsys, *arguments):
    code = cli.main(["label", *ARGUMENTS, *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments):
    """Runs a command that must end with exit code 2 and one line; returns that line."""
    code, out, err = run_cli(capsys, *arguments)
    assert code == 2 and out == ""
    return [line for line in err.splitlines() if line.startswith("md-plugin: ")][-1]


def test_labels_are_those_of_energy_forces_and_ase_reads_them(tmp_path, good):
    good[0].info["origin"], good[0].arrays["tag"] = "somewhere", np.arange(3)
    run = label(tmp_path, good)
    assert not run.failed and not run.failures.exists()
    again = read(run.target, ":")
    given = read(tmp_path / "in.xyz", ":")  # in eight decimals
    for k, (atoms, before) in enumerate(zip(again, given, strict=True)):
        expected = energy_forces(before.numbers, before.positions, xc="hf", basis="sto-3g")
        assert atoms.get_potential_energy() == pytest.approx(expected.energy, abs=1e-8)
        np.testing.assert_allclose(atoms.get_forces(), expected.forces, atol=5e-6)
        np.testing.assert_allclose(atoms.get_dipole_moment(), expected.dipole, atol=1e-5)
        assert np.array_equal(atoms.positions, before.positions)
        assert atoms.info["nanodft_frame"] == k
        assert atoms.info["nanodft_method"] == "hf/sto-3g"
        assert bool(atoms.info["nanodft_converged"])
        assert atoms.info["nanodft_iter"] > 1
        assert atoms.info["nanodft_version"] == md_plugin.__version__
    assert again[0].info["origin"] == "somewhere" and again[0].arrays["tag"].tolist() == [0, 1, 2]


def test_training_reads_the_labels(tmp_path, good):
    data = read_dataset(label(tmp_path, good).target)
    assert len(data) == 5 and data.species == (1, 6, 7, 8)
    assert np.isfinite(data.energy).all()


def test_old_labels_are_replaced(tmp_path, good):
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = good[0]
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=np.ones((3, 3)), stress=np.ones(6))
    (again,) = read(label(tmp_path, [atoms]).target, ":")
    assert again.get_potential_energy() < -1000
    assert set(again.calc.results) == {"energy", "forces", "dipole"}


def test_failed_frames_have_a_reason_and_no_numbers(tmp_path, mixed):
    run = label(tmp_path, mixed)
    frames = read(run.target, ":")
    assert [atoms.info["nanodft_frame"] for atoms in frames] == [0, 1, 3, 5, 6, 7]
    rows = [json.loads(line) for line in run.failures.read_text().splitlines()]
    assert [row["frame"] for row in rows] == [2, 4]
    assert rows[0]["reason"].startswith("UnsupportedSystem: 9 electrons (charge 0) are no closed")
    assert rows[1]["reason"].startswith("InputError: nanodft computes molecules, but pbc is")
    assert set(rows[0]) == {"frame", "reason"}
    assert frames[3].info["nanodft_method"] == "hf/sto-3g, charge 1"


def test_frames_that_do_not_converge_fail_and_the_rest_goes_on(tmp_path, good):
    source, target = paths(tmp_path, good)
    run = Labelling(source, target, Settings(xc="hf", basis="sto-3g", max_cycle=9))
    outcomes = dict(run)
    failed = {k for k, reason in outcomes.items() if reason}
    assert failed == {1, 3}  # HCN; water takes fewer
    assert all("ConvergenceError: no convergence in 9" in outcomes[k] for k in failed)
    assert len(read(target, ":")) == 3


def test_memory_beyond_the_bound_is_a_reason(tmp_path, good):
    source, target = paths(tmp_path, good)
    run = Labelling(source, target, Settings(xc="hf", basis="sto-3g", max_memory_mb=0.1))
    outcomes = dict(run)
    assert [k for k, reason in outcomes.items() if reason and "MemoryError" in reason] == [1, 3]


def content(run):
    """Frame numbers and energies of the output, and the failed frames."""
    frames = read(run.target, ":")
    numbers = [atoms.info["nanodft_frame"] for atoms in frames]
    return numbers, [atoms.get_potential_energy() for atoms in frames], run.failed


@pytest.mark.parametrize("cut", [1, 2, 40, 200, 400, 620])
def test_resuming_redoes_what_a_kill_cut(tmp_path, mixed, cut):
    """Whatever number of bytes is missing at the end, the outcome is that of an unbroken run."""
    run = label(tmp_path, mixed)
    expected = content(run)
    text = run.target.read_bytes()
    run.target.write_bytes(text[:-cut])
    again = Labelling(tmp_path / "in.xyz", run.target, QUICK, resume=True)
    assert 1 <= len(again) <= 3
    list(again)
    found = content(again)
    assert found[0] == expected[0] and found[2] == expected[2]
    np.testing.assert_allclose(found[1], expected[1], atol=1e-8)


def test_resuming_after_the_reason_was_cut(tmp_path, mixed):
    run = label(tmp_path, mixed)
    text = run.failures.read_text()
    run.failures.write_text(text[:-5])
    again = Labelling(tmp_path / "in.xyz", run.target, QUICK, resume=True)
    assert again.todo == [4]
    list(again)
    assert run.failures.read_text() == text


def test_resuming_what_is_complete_computes_nothing(tmp_path, mixed):
    run = label(tmp_path, mixed)
    before = run.target.read_bytes()
    again = Labelling(tmp_path / "in.xyz", run.target, QUICK, resume=True)
    assert len(again) == 0 and list(again) == [] and again.failed == run.failed
    assert run.target.read_bytes() == before


def test_resuming_without_an_output_begins(tmp_path, good):
    assert content(label(tmp_path, good, resume=True))[0] == [0, 1, 2, 3, 4]


def test_a_real_kill(tmp_path):
    source, target = paths(tmp_path, [cases.displaced("NH3", seed) for seed in range(40)])
    command = [sys.executable, "-m", "md_plugin.cli", "label", source, target, *ARGUMENTS]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not target.exists() or target.stat().st_size < 1000:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = Labelling(source, target, QUICK, resume=True)
    assert 0 < len(left) < 40
    list(left)
    assert content(left)[0] == list(range(40))


def test_resuming_refuses_what_is_not_its_own(tmp_path, good):
    run = label(tmp_path, good)
    source = tmp_path / "in.xyz"
    made = "was made with hf/sto-3g, but this run is svwn/sto-3g, grid level 3"
    with pytest.raises(LabelError, match=made):
        Labelling(source, run.target, Settings(xc="svwn", basis="sto-3g"), resume=True)
    write(source, good[::-1])
    good[1].rattle(0.1)
    write(tmp_path / "other.xyz", good)
    with pytest.raises(LabelError, match="does not belong to this input: frame 1 differs"):
        Labelling(tmp_path / "other.xyz", run.target, QUICK, resume=True)
    before = run.target.read_bytes()
    run.target.write_bytes(before.replace(b"3\nProperties", b"three\nProperties", 1))
    with pytest.raises(LabelError, match=r"out\.xyz is damaged in line 1"):
        Labelling(source, run.target, QUICK, resume=True)
    foreign = tmp_path / "foreign.xyz"
    write(foreign, good)
    with pytest.raises(LabelError, match="does not belong to this input"):
        Labelling(source, foreign, QUICK, resume=True)
    assert len(read(foreign, ":")) == 5


def test_order_and_neighbours_do_not_matter(tmp_path, good):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    forwards = content(label(tmp_path / "a", good))[1]
    backwards = content(label(tmp_path / "b", good[::-1]))[1]
    np.testing.assert_allclose(backwards[::-1], forwards, atol=1e-8)


def test_exit_codes_and_messages(tmp_path, good, mixed, capsys):
    source, target = paths(tmp_path, good[:2])
    code, out, _ = run_cli(capsys, source, target)
    assert code == 0 and "2 of 2 frames labelled with hf/sto-3g: " in out
    target = tmp_path / "mixed_out.xyz"
    write(source, mixed)
    code, out, err = run_cli(capsys, source, target)
    assert code == 3 and "6 of 8 frames" in out and "2 failed, reasons in " in out
    assert "mixed_out.xyz.failed.jsonl" in out and "8/8" in err
    code, out, _ = run_cli(capsys, source, target, "--resume")
    assert code == 3 and "6 of 8 frames" in out


def test_usage_errors_write_nothing(tmp_path, good, capsys):
    source, target = paths(tmp_path, good)
    empty, cut, binary = (tmp_path / f"{name}.xyz" for name in ("empty", "cut", "binary"))
    empty.touch()
    cut.write_text(source.read_text()[:-100])
    binary.write_bytes(bytes(range(256)))
    missing = fails(capsys, tmp_path / "none.xyz", target)
    assert missing.endswith("none.xyz does not exist")
    for path in (empty, cut, binary):
        assert f"{path}" in fails(capsys, path, target)
    assert "xc 'pbe' is not known" in fails(capsys, source, target, "--xc", "pbe")
    assert "no basis set 'nothing'" in fails(capsys, source, target, "--basis", "nothing")
    assert "grid_level must be" in fails(capsys, source, target, "--grid-level", "77")
    assert "unknown backend 'abacus'" in fails(capsys, source, target, "--backend", "abacus")
    assert "device 'abacus' is not" in fails(capsys, source, target, "--device", "abacus")
    nowhere = fails(capsys, source, tmp_path / "no folder" / "out.xyz")
    assert "out.xyz cannot be written: No such file or directory" in nowhere
    assert "Is a directory" in fails(capsys, source, tmp_path, "--resume")
    assert {p.name for p in tmp_path.iterdir()} == {"in.xyz", "empty.xyz", "cut.xyz", "binary.xyz"}
    target.write_text("precious")
    assert f"{target} exists; --resume goes on with it" in fails(capsys, source, target)
    assert f"{source} exists" in fails(capsys, source, source)
    assert target.read_text() == "precious"
    with pytest.raises(SystemExit) as caught:
        cli.main(["label", str(source)])
    assert caught.value.code == 2
