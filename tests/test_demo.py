"""The demo as a user runs it, made small."""

import numpy as np
import pytest

from md_plugin.cli import main
from md_plugin.demo import DemoError, parse_log, run_demo


def test_demo_agrees_in_three_engines(tmp_path, capsys):
    runs = run_demo(tmp_path, steps=50)
    assert [run.name for run in runs] == ["ASE", "LAMMPS 1 rank", "LAMMPS 2 ranks"]
    ase, *others = runs
    assert len(ase.forces) == 250
    for run in others:
        # The network is float32: energies per atom agree to its rounding, as do forces.
        assert abs(run.energy - ase.energy) / 250 < 1e-6
        assert np.abs(run.forces - ase.forces).max() < 1e-4
        assert np.abs(run.total_energy - ase.total_energy).max() / 250 < 1e-5
        assert np.allclose(run.time, ase.time)
    for name in ("demo.png", "ase.xyz", "lammps_1.dump", "lammps_2.dump", "in.lammps_1"):
        assert (tmp_path / name).stat().st_size > 0
    assert "meV/atom/ps" in capsys.readouterr().out


def test_demo_shows_what_lammps_said(tmp_path, monkeypatch):
    monkeypatch.setattr("md_plugin.demo.SCRIPT", "units metal\nno_such_command\n")
    with pytest.raises(DemoError, match="no_such_command"):
        run_demo(tmp_path, steps=50)


def test_demo_refuses_too_few_steps(capsys):
    assert main(["demo", "--steps", "3"]) == 2
    assert "at least 50 steps" in capsys.readouterr().err


def test_parse_log_takes_the_last_run():
    log = "Step Time PotEng\n 0 0 -1\n 5 0.5 -2\nLoop time of 9 on 1\nStep Time PotEng\n 5 0.5 -3\n"
    rows, seconds = parse_log(
        log + "WARNING: something\n 10 1.0 -4\nLoop time of 0.25 on 1 procs\n"
    )
    assert rows["PotEng"].tolist() == [-3, -4] and rows["Time"].tolist() == [0.5, 1.0]
    assert seconds == 0.25
