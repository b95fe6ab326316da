"""Configures and compiles LAMMPS with cmake, and collects what is to be kept of it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lammps_interface.build import BuildError
from lammps_interface.lammps_source import numeric_date, version_of
from lammps_interface.lammps_tools import Platform, first_error, run

logger = logging.getLogger("md_plugin")

PACKAGES = ("MANYBODY", "MC", "ML-IAP", "ML-SNAP", "PLUGIN", "PYTHON")
SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_CXX_FLAGS_RELEASE": "-O2 -DNDEBUG",
    "BUILD_SHARED_LIBS": "ON",
    "BUILD_MPI": "ON",
    "BUILD_OMP": "OFF",
    "MLIAP_ENABLE_PYTHON": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    **{f"WITH_{name}": "OFF" for name in ("JPEG", "PNG", "FFMPEG", "CURL", "GZIP")},
}
LAUNCHER = """#!/bin/sh
# LAMMPS with Python inside: that of the environment which built it, with LAMMPS's package of here.
root=$(dirname "$(dirname "$(readlink -f "$0")")")
PATH="{bin}${{PATH:+:$PATH}}"
PYTHONPATH="$root/site${{PYTHONPATH:+:$PYTHONPATH}}"
{library}export PATH PYTHONPATH
exec "$root/libexec/lmp" "$@"
"""
LIBRARY = """LD_LIBRARY_PATH="$root/libpython${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export LD_LIBRARY_PATH
"""
TEST_INPUTS = "unittest/force-styles/tests"


@dataclass(frozen=True)
class Kokkos:
    """The Kokkos library of the user.

    Attributes:
        path: of the source tree, or of the folder with KokkosConfig.cmake.
        installed: whether it is an installation.
        version: such as "4.6.1".
    """

    path: Path
    installed: bool
    version: str


@dataclass(frozen=True)
class Plan:
    """One compilation.

    Attributes:
        tree: LAMMPS source, ours to change.
        build: folder for cmake.
        log: file that output is added to.
        platform: compiler, Python, MPI.
        tools: cmake, ninja, cythonize.
        kokkos: the user's Kokkos.
        no_kokkos: leave KOKKOS out even where the source has it.
        defines: further cmake settings.
        jobs: compilers at a time; 0 for one on each core.
    """

    tree: Path
    build: Path
    log: Path
    platform: Platform
    tools: Mapping[str, Path]
    kokkos: Kokkos | None = None
    no_kokkos: bool = False
    defines: tuple[str, ...] = ()
    jobs: int = 0

    def with_options(self, no_kokkos: bool, defines: tuple[str, ...], jobs: int) -> Plan:
        """The same with the user's wishes."""
        return replace(self, no_kokkos=no_kokkos, defines=defines, jobs=jobs)

    @property
    def version(self) -> int:
        """Of the LAMMPS source."""
        return version_of(self.tree)

    @property
    def packages(self) -> tuple[str, ...]:
        """LAMMPS packages to be compiled."""
        bundled = (self.tree / "lib" / "kokkos" / "CMakeLists.txt").is_file()
        with_kokkos = not self.no_kokkos and (bundled or self.kokkos is not None)
        return (*PACKAGES, "KOKKOS") if with_kokkos else PACKAGES


def find_kokkos(path: str | Path | None) -> Kokkos | None:
    """Kokkos at that path: its source tree, or an installation.

    Raises:
        BuildError: neither.
    """
    if path is None:
        return None
    path = Path(path).expanduser().resolve()
    lists = path / "CMakeLists.txt"
    if (path / "core" / "src").is_dir() and lists.is_file():
        numbers = re.findall(r"Kokkos_VERSION_(?:MAJOR|MINOR|PATCH)\s+(\d+)", lists.read_text())
        return Kokkos(path, False, ".".join(numbers[:3]))
    for pattern in ("", "lib*/cmake/Kokkos", "lib/*/cmake/Kokkos"):
        for config in sorted(path.glob(f"{pattern}/KokkosConfig.cmake".lstrip("/"))):
            text = (config.parent / "KokkosConfigVersion.cmake").read_text(errors="replace")
            found = re.search(r'PACKAGE_VERSION "([\d.]+)"', text)
            return Kokkos(config.parent, True, found[1] if found else "")
    raise BuildError(
        f"--kokkos {path}: neither a Kokkos source tree (core/src) nor an installation "
        "(lib/cmake/Kokkos/KokkosConfig.cmake)"
    )


def configure(plan: Plan) -> None:
    """Runs cmake.

    Raises:
        BuildError: its first complaint.
    """
    logger.info("LAMMPS: configuring with %s", " ".join(plan.packages))
    done = run(_cmake(plan), plan.log)
    if done.returncode:
        raise BuildError(
            f"cmake cannot configure LAMMPS: {first_error(done.stdout)}; see {plan.log}"
        )


def _cmake(plan: Plan) -> list[str]:
    settings = SETTINGS | {f"PKG_{name}": "ON" for name in plan.packages}
    places = [
        "$ORIGIN",
        "$ORIGIN/../lib",
        plan.platform.mpi_library,
        plan.platform.libpython.parent,
    ]
    settings |= {
        "CMAKE_MAKE_PROGRAM": str(plan.tools["ninja"]),
        "CMAKE_INSTALL_RPATH": ";".join(map(str, places)),
        "CMAKE_CXX_COMPILER": str(plan.platform.compiler),
        "MPI_CXX_COMPILER": str(plan.platform.mpicxx),
        "Python_EXECUTABLE": str(plan.platform.python),
        "Cythonize_EXECUTABLE": str(plan.tools["cythonize"]),
    }
    if "KOKKOS" in plan.packages:
        settings |= _kokkos_settings(plan)
    settings |= dict(word.split("=", 1) for word in plan.defines)
    words = [f"-D{name}={value}" for name, value in settings.items()]
    command = [plan.tools["cmake"], "-G", "Ninja", "-S", plan.tree / "cmake", "-B", plan.build]
    return [*map(str, command), *words]


def _kokkos_settings(plan: Plan) -> dict[str, str]:
    demands = plan.tree / "cmake" / "Modules" / "Packages" / "KOKKOS.cmake"
    newer = re.search(r"CMAKE_CXX_STANDARD LESS (\d+)", demands.read_text())
    settings = {"Kokkos_ENABLE_SERIAL": "ON", "CMAKE_CXX_STANDARD": newer[1] if newer else "17"}
    if plan.kokkos is None:
        return settings
    if plan.kokkos.installed:
        return settings | {"EXTERNAL_KOKKOS": "ON", "Kokkos_DIR": str(plan.kokkos.path)}
    place = plan.tree / "lib" / "kokkos"
    shutil.rmtree(place, ignore_errors=True)
    place.symlink_to(plan.kokkos.path)
    return settings


def compile_lammps(plan: Plan) -> None:
    """Runs ninja; says every tenth of the way how far it is.

    Raises:
        BuildError: the first error of the compiler.
    """
    jobs = plan.jobs or len(os.sched_getaffinity(0))
    command = [str(plan.tools["ninja"]), "-C", str(plan.build), "-j", str(jobs)]
    lines: list[str] = []
    start, said = time.monotonic(), 0
    with (
        plan.log.open("a", buffering=1) as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            lines.append(line)
            step = re.match(r"\[(\d+)/(\d\d\d+)\]", line)  # at first ninja counts other things
            if step and 10 * int(step[1]) // int(step[2]) > said:
                said = 10 * int(step[1]) // int(step[2])
                minutes = (time.monotonic() - start) / 60
                logger.info("LAMMPS: compiled %s of %s, %.1f min", step[1], step[2], minutes)
    if process.returncode:
        raise BuildError(
            f"LAMMPS cannot be compiled: {first_error(''.join(lines))}; see {plan.log}"
        )


def needs_libpython_name(library: Path | None) -> bool:
    """Whether libpythonX.Y.so, which lammps.mliap asks for, is missing beside the library."""
    return library is not None and not (library.parent / _short_name(library)).exists()


def _short_name(library: Path) -> str:
    return library.name.split(".so")[0] + ".so"


def collect(plan: Plan, root: Path) -> None:
    """Copies what is to be kept to a new folder."""
    for name in ("bin", "libexec", "lib", "include", "examples"):
        (root / name).mkdir(parents=True)
    shutil.copy(plan.build / "lmp", root / "libexec")
    library = next(plan.build.glob("liblammps.so.*"))
    shutil.copy(library, root / "lib")
    (root / "lib" / "liblammps.so").symlink_to(library.name)
    package = root / "site" / "lammps"
    shutil.copytree(plan.tree / "python" / "lammps", package)
    (package / "liblammps.so").symlink_to(Path("..", "..", "lib", library.name))
    _describe(root / "site", plan.version)
    (root / "include" / "lammps").mkdir()
    for name in (".", "ML-IAP", "PLUGIN", "PYTHON"):
        for path in (plan.tree / "src" / name).glob("*.h"):
            shutil.copy(path, root / "include" / "lammps")
    for name in ("fmt", "nlohmann"):  # the second since 2025
        if (plan.tree / "src" / name).is_dir():
            shutil.copytree(plan.tree / "src" / name, root / "include" / "lammps" / name)
    for part, kept in (("examples/mliap", "examples/mliap"), (TEST_INPUTS, "tests")):
        if (plan.tree / part).is_dir():
            shutil.copytree(plan.tree / part, root / kept, ignore_dangling_symlinks=True)
    _launcher(plan, root)


def _describe(site: Path, version: int) -> None:
    """Makes `lammps.__version__` right, which looks for an installed package."""
    folder = site / f"lammps-{numeric_date(version)}.dist-info"
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: lammps\nVersion: {numeric_date(version)}\n"
    (folder / "METADATA").write_text(text)


def _launcher(plan: Plan, root: Path) -> None:
    library, name = "", plan.platform.libpython
    if needs_libpython_name(name):
        (root / "libpython").mkdir()
        (root / "libpython" / _short_name(name)).symlink_to(name)
        library = LIBRARY
    text = LAUNCHER.format(bin=plan.platform.python.parent, library=library)
    (root / "bin" / "lmp").write_text(text)
    (root / "bin" / "lmp").chmod(0o755)
