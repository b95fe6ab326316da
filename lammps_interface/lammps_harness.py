"""LAMMPS's own tester of pair styles, `test_pair_style`, compiled against a LAMMPS just built.

LAMMPS's cmake would download GoogleTest for it; the few files are compiled directly here, with
the GoogleTest and libyaml of the system. A harness that cannot be built is no reason to fail: the
caller gets told why.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lammps_interface.lammps_tools import first_error, run

if TYPE_CHECKING:
    from lammps_interface.lammps_build import BuiltLammps
    from lammps_interface.lammps_compile import Plan

logger = logging.getLogger("md_plugin")

NEEDED = ("libgtest-dev", "libgmock-dev", "libyaml-dev")
HEADERS = "#include <gmock/gmock.h>\n#include <gtest/gtest.h>\n#include <yaml.h>\n"
FILES = ("test_pair_style", "test_main", "test_config_reader", "yaml_writer", "error_stats")


def build(plan: Plan, built: BuiltLammps) -> str:
    """Compiles the harness into `harness/` of the build.

    Returns:
        "" or why there is none.
    """
    folder = plan.tree / "unittest" / "force-styles"
    found = {name: _find(folder, name) for name in FILES}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        return f"this LAMMPS source has no unittest/force-styles/{absent[0]}.cpp"
    if reason := _libraries(plan):
        return reason
    logger.info("LAMMPS: compiling its test_pair_style")
    (built.root / "harness").mkdir()
    objects = built.root.parent / "harness-objects"
    objects.mkdir()
    flags = _flags(plan)
    compiler = str(plan.platform.compiler)
    commands = [
        [compiler, *flags, "-c", str(path), "-o", str(objects / f"{name}.o")]
        for name, path in found.items()
    ]
    with ThreadPoolExecutor(plan.jobs or len(os.sched_getaffinity(0))) as pool:
        done = list(pool.map(lambda command: run(command, plan.log), commands))
    if not any(process.returncode for process in done):
        done.append(run(_link(plan, built, sorted(objects.glob("*.o"))), plan.log))
    for process in done:
        if process.returncode:
            shutil.rmtree(built.root / "harness")
            return f"test_pair_style cannot be compiled: {first_error(process.stdout)}"
    return ""


def _find(folder: Path, name: str) -> Path | None:
    places = (folder / f"{name}.cpp", folder.parent / f"{name}.cpp")
    return next((path for path in places if path.is_file()), None)


def _flags(plan: Plan) -> list[str]:
    cache = (plan.build / "CMakeCache.txt").read_text(errors="replace")
    standard = re.search(r"^CMAKE_CXX_STANDARD:\w+=(\d+)", cache, re.MULTILINE)
    folder = plan.tree / "unittest" / "force-styles"
    includes = [
        folder,
        folder.parent,
        plan.tree / "src",
        plan.platform.mpi_library.parent / "include",
    ]
    return [
        f"-std=c++{standard[1] if standard else '17'}",
        *("-O1", "-DLAMMPS_SMALLBIG", "-DTEST_INPUT_FOLDER=."),
        *(f"-I{path}" for path in includes),
    ]


def _link(plan: Plan, built: BuiltLammps, objects: list[Path]) -> list[str]:
    folders = [built.root / "lib", plan.platform.mpi_library]
    places = ["$ORIGIN/../lib", plan.platform.mpi_library, plan.platform.libpython.parent]
    return [
        str(plan.platform.compiler),
        *map(str, objects),
        *("-o", str(built.root / "harness" / "test_pair_style")),
        *(f"-L{path}" for path in folders),
        *("-llammps", "-lmpi", "-lgmock", "-lgtest", "-lyaml", "-lpthread"),
        *(f"-Wl,-rpath,{path}" for path in places),
        f"-Wl,-rpath-link,{plan.platform.libpython.parent}",
    ]


def _libraries(plan: Plan) -> str:
    """Makes sure of GoogleTest and libyaml; installs them where that is allowed."""
    if _have_headers(plan):
        return ""
    names = " ".join(NEEDED)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"GoogleTest or libyaml is missing: apt install {names}, and build with --force"
    logger.info("LAMMPS: installing %s", names)
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", *NEEDED]):
        done = run(["apt-get", *words], plan.log, environment=quiet)
    if done.returncode or not _have_headers(plan):
        return f"apt-get cannot install {names}: {first_error(done.stdout)}"
    return ""


def _have_headers(plan: Plan) -> bool:
    command = [str(plan.platform.compiler), "-E", "-x", "c++", "-"]
    done = subprocess.run(command, input=HEADERS, capture_output=True, text=True, check=False)
    return done.returncode == 0
