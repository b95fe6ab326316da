"""The examples run as their first lines say, made small."""

import sys
from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from lammps_helpers import BIN, environment, launch, needs_lammps

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_ase_npt(tmp_path):
    command = [sys.executable, EXAMPLES / "ase_npt.py", "--steps", 30, "--cells", 2]
    done = launch([*command, "--output", tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout
    table = np.loadtxt(tmp_path / "npt.txt")
    assert table.shape[1] == 4 and np.isfinite(table).all()
    # The crystal stays a crystal: within 5 % of the volume it starts from, 18.2 Å^3/atom.
    assert np.abs(table[:, 2] / 18.2 - 1).max() < 0.05
    frames = read(tmp_path / "npt.traj", ":")
    assert len(frames) > 10 and frames[-1].get_stress().shape == (6,)
    assert (tmp_path / "npt.png").stat().st_size > 1000
    assert "neighbour lists built" in done.stdout


def test_torch_sim_batch(tmp_path):
    pytest.importorskip("torch_sim", reason="torch-sim is not installed: extra torch-sim")
    command = [sys.executable, EXAMPLES / "torch_sim_batch.py", "--steps", 200, "--cells", 2]
    done = launch([*command, "--device", "cpu", "--output", tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout
    kelvin, potential = np.loadtxt(tmp_path / "energy.txt").T
    # 16 atoms, 0.3 ps: within a fifth of the 3/2 k_B of a harmonic crystal, eV.
    assert abs(kelvin @ potential / (kelvin @ kelvin) / (1.5 * 8.617e-5) - 1) < 0.2
    assert (tmp_path / "energy.png").stat().st_size > 1000
    assert "k_B per atom" in done.stdout and "neighbour lists built" in done.stdout


@needs_lammps
def test_lammps_npt_on_two_ranks(tmp_path):
    done = launch([BIN / "md-plugin", "export", "ta", "-o", "ta.pt"], tmp_path)
    assert done.returncode == 0, done.stdout
    variables = ["-var", "steps", 20, "-var", "cells", 3]
    script = ["-in", EXAMPLES / "lammps" / "in.npt"]
    command = [BIN / "lmp", "-sf", "py", *script, *variables, "-log", "none"]
    done = launch(command, tmp_path, ranks=2, env=environment())
    assert done.returncode == 0, done.stdout
    assert "Loop time of" in done.stdout
    lines = (tmp_path / "npt.dump").read_text().splitlines()
    energies = [float(line.split()[5]) for line in lines[9 : 9 + 54]]
    # One atom of bcc tantalum has about -11.85 eV on SNAP's scale.
    assert np.abs(np.array(energies) + 11.85).max() < 0.1
