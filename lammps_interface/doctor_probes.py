"""The machine as `md-plugin doctor` sees it: Python, torch, GPUs, backends, compilers, packages.

Each function makes one section. Nothing is imported here that could fail: packages are asked in
processes of their own (`Asker`), programs run with a time limit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lammps_interface import build
from lammps_interface.doctor_child import MARK
from lammps_interface.lammps_runs import LammpsRunError, run_limited
from lammps_interface.run_environment import clean_environment

OK, NOTE, FAIL = "ok", "note", "FAIL"
NOT_ASKED = "not asked (--no-run)"
PACKAGES = {
    "ase": "the ASE door",
    "vesin": "neighbour lists",
    "numba": "kernels on the CPU",
    "triton": "kernels on the GPU",
    "lammps": "the LAMMPS door",
    "mpi4py": "LAMMPS on several ranks from Python",
    "hippynn": "reading its checkpoints, comparing speed",
    "matscipy": "tests",
}
REQUIRED = ("ase", "vesin", "numba", "lammps", "mpi4py")
SHARED_PYTHON = (
    "run LAMMPS as: md-plugin lmp -sf py -in in.script; or use a Python with a shared library "
    "(Debian's and conda's have one, pyenv's with PYTHON_CONFIGURE_OPTS=--enable-shared)"
)


@dataclass(frozen=True)
class Line:
    """One finding: `mark` is ok, note or FAIL; `remedy` says what to do, "" where nothing is."""

    mark: str
    what: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Section:
    """Findings about one thing."""

    title: str
    lines: tuple[Line, ...]


class Asker:
    """Asks `doctor_child` and other programs, with a time limit; each question once.

    Args:
        start: whether to start anything at all.
    """

    def __init__(self, start: bool = True):
        self.start = start
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}

    def ask(self, question: str, *arguments: str, limit: float = 150.0) -> dict[str, Any]:
        """The answer of `doctor_child`, or {"error": why there is none}."""
        if not self.start:
            return {"error": NOT_ASKED}
        key = (question, *arguments)
        if key not in self._known:
            self._known[key] = self.answers([], *key, limit=limit)[0]
        return self._known[key]

    def answers(
        self, starter: Sequence[str], *question: str, limit: float = 60.0
    ) -> list[dict[str, Any]]:
        """The answers of all ranks that `starter` (mpiexec with its options) starts; one at least.

        Where there is none, one {"error": how the program ended}.
        """
        command = [*starter, sys.executable, "-m", "lammps_interface.doctor_child", *question]
        try:
            # threads are as the user's own programs have them
            threads = {k: v for k, v in os.environ.items() if k == "OMP_NUM_THREADS"}
            env = {k: v for k, v in clean_environment().items() if k != "OMP_NUM_THREADS"}
            done = run_limited(command, limit=limit, env=env | threads)
        except LammpsRunError as error:
            return [{"error": str(error)}]
        found = [line for line in done.text.splitlines() if line.startswith(MARK)]
        if not found:
            return [{"error": f"{done.verdict}: {done.last_words(1)}"}]
        return [json.loads(line.removeprefix(MARK)) for line in found]

    def first_line(self, *command: str) -> str:
        """The first line that a program prints; how it failed, if it does."""
        if not self.start:
            return NOT_ASKED
        try:
            done = run_limited(command, limit=15.0)
        except LammpsRunError as error:
            return str(error)
        lines = [" ".join(line.split()) for line in done.text.splitlines() if line.strip()]
        if done.code != 0 or not lines:
            return done.verdict
        # MPICH's mpiexec begins with a heading, and tells its version below
        version = [line for line in lines[1:3] if line.startswith("Version:")]
        return " ".join([lines[0], *(version if lines[0].endswith(":") else [])])


def installed(package: str) -> str:
    """Version of an installed package, "" if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "" if importlib.util.find_spec(package) is None else "of unknown version"


def python_section(asker: Asker) -> Section:
    """Interpreter and its shared library."""
    library = build.libpython()
    shared = Line(OK, "libpython", f"{library}: lmp can start this Python")
    if library is None:
        shared = Line(NOTE, "libpython", "none: lmp cannot start this Python", SHARED_PYTHON)
    version = f"{platform.python_version()}, {sys.executable}"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    ours = Line(OK, "md_plugin", installed("md-plugin") or "not installed, only importable")
    return Section("Python", (Line(OK, "Python", version), shared, ours, Line(OK, "on", machine)))


def torch_section(asker: Asker) -> Section:
    """Version, threads, GPUs and the kernels that run on them."""
    if not installed("torch"):
        line = Line(FAIL, "torch", "not installed", "pip install torch")
        return Section("torch and kernels", (line,))
    answer = asker.ask("torch")
    if "error" in answer:
        mark = FAIL if asker.start else NOTE
        text = f"{installed('torch')}: {answer['error']}"
        return Section("torch and kernels", (Line(mark, "torch", text),))
    how = f"built for CUDA {answer['cuda']}" if answer["cuda"] else "built for the CPU"
    threads = os.environ.get("OMP_NUM_THREADS")
    lines = [
        Line(OK, "torch", f"{answer['version']}, {how}"),
        Line(OK, "threads", f"{answer['threads']}, OMP_NUM_THREADS {threads or 'not set'}"),
    ]
    driver = _driver(asker)
    for k, gpu in enumerate(answer["gpus"]):
        lines.append(Line(OK, f"GPU {k}", f"{gpu}, driver {driver or 'unknown'}"))
    if not answer["gpus"]:
        there = f"; there is a driver: {driver}" if driver else "; no NVIDIA driver either"
        remedy = "install a torch built for CUDA: https://pytorch.org" if driver else ""
        lines.append(Line(NOTE, "GPU", f"none: {answer['why_no_gpu']}{there}", remedy))
    for name, reason in answer["backends"].items():
        lines.append(Line(NOTE if reason else OK, f"backend {name}", reason or "available"))
    return Section("torch and kernels", tuple(lines))


def _driver(asker: Asker) -> str:
    """Version of the NVIDIA driver, "" if there is none."""
    if shutil.which("nvidia-smi"):
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        return asker.first_line("nvidia-smi", *query)
    kernel = Path("/proc/driver/nvidia/version")
    return kernel.read_text().splitlines()[0] if kernel.is_file() else ""


def compiler_section(asker: Asker) -> Section:
    """C++ compilers, and which of them compiles the pair style."""
    chosen = build.find_compiler()
    lines: list[Line] = []
    for name in dict.fromkeys([os.environ.get("CXX", ""), "g++", "c++", "clang++"]):
        if name and (found := shutil.which(name)):
            used = ""
            if Path(found).resolve() == chosen and not any("compiles" in x.text for x in lines):
                used = ", compiles the pair style"
            lines.append(Line(OK, name, f"{found}: {asker.first_line(found, '--version')}{used}"))
    if chosen is None:
        said = f"CXX={os.environ['CXX']} is no program" if "CXX" in os.environ else "none found"
        lines.append(Line(NOTE, "C++ compiler", said, build.INSTALL_COMPILER))
    return Section("C++ compilers", tuple(lines))


def cache_section(asker: Asker) -> Section:
    """Where compiled plugins are, and which of them is current."""
    folder = build.cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    remedy = "" if writable else "set MD_PLUGIN_CACHE to a folder that can be written"
    text = f"{folder}{'' if folder.exists() else ' (not made yet)'}"
    text += ", writable" if writable else ", cannot be written"
    lines = [Line(OK if writable else FAIL, "folder", text, remedy)]
    answer = asker.ask("plugin")
    current = Path(answer["folder"]) if "folder" in answer else None
    if asker.start and current is None:
        lines.append(Line(FAIL, "pair style mliap/py", answer["error"].partition(": ")[2]))
    stale = []
    for file in sorted((folder / "plugin").glob(f"*/*/{build.FILE_NAME}")):
        if file.parent == current:
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
            size = f"{file.stat().st_size / 1024:.0f} kB"
            lines.append(Line(OK, "current plugin", f"{file}, {size}, compiled {made}"))
        else:
            stale.append(file)
    if stale:
        total = sum(file.stat().st_size for file in stale) / 1024
        what = "other plugins" if current else "compiled plugins"
        why = "stale, or of other environments" if current else "current or stale: not looked into"
        lines.append(Line(OK, what, f"{len(stale)}, {total:.0f} kB, {why}"))
    for info in sorted((folder / "lammps").glob("*/built.json")):
        parts = [path.lstat() for path in info.parent.rglob("*")]
        megabytes = sum(part.st_size for part in parts) / 2**20
        lines.append(Line(OK, "LAMMPS build", f"{info.parent}, {megabytes:.0f} MB"))
    return Section("plugin cache", tuple(lines))


def package_section(asker: Asker) -> Section:
    """Python packages that are used where they are installed."""
    lines = []
    for name, use in PACKAGES.items():
        version = installed(name)
        text = f"{version or 'not installed'} ({use})"
        missing = FAIL if name in REQUIRED else NOTE
        remedy = f"pip install {name}" if name in REQUIRED and not version else ""
        lines.append(Line(OK if version else missing, name, text, remedy))
    return Section("packages", tuple(lines))
