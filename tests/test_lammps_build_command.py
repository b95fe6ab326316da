"""`md-plugin lammps build` without compiling or a network: sources, cache, every refusal."""

import os
import signal
import subprocess
import time

import lammps_fakes as fakes
import lammps_real
import pytest
from lammps_helpers import needs_lammps

from lammps_interface import apt_source, lammps_source, lammps_tools
from lammps_interface.apt_source import AptEntry, MissingError
from lammps_interface.build import BuildError
from lammps_interface.lammps_build import BuildOptions, build_lammps, find_built
from md_plugin.cli import main


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose tools only pretend."""
    monkeypatch.setattr(apt_source, "distribution", lambda: ("debian", "bookworm"))
    monkeypatch.setattr(apt_source, "apt_entries", lambda: [DEBIAN])
    monkeypatch.setattr(lammps_tools, "TOOLS", dict(lammps_tools.TOOLS))
    fakes.install(tmp_path, monkeypatch)
    return tmp_path


DEBIAN = AptEntry("https://mirror.example/debian", ("bookworm",), ("main",), "/keys/debian.gpg")


def build(source=None, **options):
    return build_lammps(BuildOptions(source, harness=False, **options))


# --- apt's sources


def test_the_newest_source_package(machine):
    built = build()
    assert built.version == 20260704
    assert built.source == "Debian's source package lammps 20260704-2"
    log = (built.root / "build.log").read_text()
    assert "source --download-only lammps=20260704-2" in log
    assert "sources" not in os.listdir(built.root)


def test_an_older_source_package(machine):
    assert "20250204+dfsg.1-3" in build(wanted="20250204").source
    assert find_built().source.endswith("lammps 20250204+dfsg.1-3")


@pytest.mark.parametrize(
    ("variables", "wanted", "message"),
    [
        ({"FAKE_UNREACHABLE": "1"}, None, r"cannot read the source packages of sid \(Failed to"),
        ({"FAKE_UNREACHABLE": "1"}, "trixie", r"packages of trixie .*give a source tree"),
        ({"FAKE_SHA": "abc"}, None, r"lammps\.orig\.tar\.gz has SHA256 \w{64} but .* says abc"),
        ({"FAKE_GONE": "1"}, None, r"could not fetch lammps\.orig\.tar\.gz, see .*\.log"),
        ({}, "19990101", r"of version 19990101 in sid testing .*: there are 20250204\+dfsg"),
    ],
)
def test_source_packages_that_cannot_be_had(machine, monkeypatch, variables, wanted, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match=message):
        build(wanted=wanted)
    assert find_built() is None


def test_no_apt_get(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match=r"no apt-get here .* md-plugin lammps build PATH"):
        apt_source.fetch(None, tmp_path, tmp_path / "log")


# --- trees and tarballs


def test_what_is_no_lammps(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildError, match=r"no LAMMPS source tree or tarball .*absent"):
        lammps_source.identify(tmp_path / "absent")
    with pytest.raises(BuildError, match="file is neither a LAMMPS source tree nor a tarball"):
        lammps_source.identify(tmp_path / "file")
    with pytest.raises(BuildError, match=r"empty is not the source of LAMMPS: it has no src/ver"):
        lammps_source.identify(tmp_path / "empty")
    tree = fakes.write_tree(tmp_path / "tree")
    with pytest.raises(BuildError, match="--version chooses among Debian's source packages"):
        lammps_source.identify(tree, "trixie")
    (tree / "src" / "ML-IAP" / "mliap_unified_couple.pyx").unlink()
    with pytest.raises(BuildError, match="4 Jul 2026, which has no pair_style mliap unified"):
        lammps_source.identify(tree)


@pytest.mark.parametrize("prefix", ["", "./", "lammps-4Jul2026/", "./lammps/"])
def test_tarballs_with_and_without_a_top_folder(tmp_path, prefix):
    tarball = fakes.write_tarball(tmp_path / "l.tar.gz", prefix)
    lammps_source.unpack(tarball, tmp_path / "out")
    assert lammps_source.version_of(tmp_path / "out") == 20260704
    assert not (tmp_path / "out" / "potentials").exists()
    assert (tmp_path / "out" / "examples" / "mliap" / "in.mliap.unified.lj.Ar").is_file()


def test_broken_tarballs(tmp_path):
    whole = fakes.write_tarball(tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:-60])
    with pytest.raises(BuildError, match=r"cut\.tar\.gz cannot be unpacked"):
        lammps_source.unpack(tmp_path / "cut.tar.gz", tmp_path / "out")
    other = fakes.write_tarball(tmp_path / "other.tar.gz", files={"src/main.c": "int x;\n"})
    with pytest.raises(BuildError, match=r"other\.tar\.gz is not the source of LAMMPS"):
        lammps_source.unpack(other, tmp_path / "out2")


def test_a_tree_is_copied_without_what_make_left_in_it(tmp_path):
    leftovers = {"src/style_pair.h": "x", "src/Obj_mpi/pair.o": "x", "python/lammps/l.so": "x"}
    tree = fakes.write_tree(tmp_path / "tree", fakes.FILES | leftovers)
    source = lammps_source.identify(tree)
    lammps_source.obtain(source, tmp_path / "copy", tmp_path / "log")
    copied = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*")}
    assert {"src/pair.h", "src/fmt/core.h"} <= copied
    assert not copied & {*leftovers, "src/Obj_mpi", "potentials"}
    (tree / "src" / "pair.h").write_text("class Pair {};\n")
    assert lammps_source.identify(tree).key != source.key


# --- what a machine lacks


def test_missing_parts_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(lammps_tools, "mpi_include", lambda: tmp_path / "include")
    which = {"cc": "/bin/cc"}.get
    monkeypatch.setattr(lammps_tools, "find_compiler", lambda: tmp_path / "g++")
    monkeypatch.setattr(lammps_tools.shutil, "which", which)
    with pytest.raises(MissingError, match="no mpicxx of MPICH found: pip install"):
        lammps_tools.find_platform()
    paths = {"include": str(tmp_path)}
    monkeypatch.setattr(lammps_tools.sysconfig, "get_paths", lambda: paths)
    with pytest.raises(MissingError, match=r"no Python\.h in .*apt install python3-dev"):
        lammps_tools.find_platform()
    monkeypatch.setattr(lammps_tools, "libpython", lambda: None)
    with pytest.raises(MissingError, match=r"no shared library libpython.* --enable-shared"):
        lammps_tools.find_platform()
    monkeypatch.setattr(lammps_tools, "find_compiler", lambda: None)
    with pytest.raises(MissingError, match=r"no C and C\+\+ compilers: install g\+\+"):
        lammps_tools.find_platform()
    monkeypatch.setattr(lammps_tools.sys, "platform", "darwin")
    with pytest.raises(MissingError, match="on Linux only, this is darwin"):
        lammps_tools.find_platform()


def test_tools_that_cannot_be_installed(machine, monkeypatch):
    monkeypatch.setattr(lammps_tools, "TOOLS", {"cython": ("cython", (99, 0))})
    monkeypatch.setattr(
        lammps_tools, "run", lambda *_: subprocess.CompletedProcess((), 1, "ERROR: no")
    )
    with pytest.raises(MissingError, match=r"cannot install cython .*ERROR: no.*on the PATH"):
        lammps_tools.find_tools(machine / "log")


@pytest.mark.parametrize("works", [True, False])
def test_a_cython_without_distutils_is_passed_over(works, tmp_path, monkeypatch):
    """As that of Python 3.12 is, where nothing else has brought setuptools."""
    for name in ("cython", "cythonize"):
        (tmp_path / name).write_text(
            f"#!/bin/sh\n[ $1 = --version ] && echo Cython version 3.1.0 || exit {int(not works)}\n"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = lammps_tools._on_path("cython", (3, 0))
    assert found == (tmp_path / "cython" if works else None)
    (tmp_path / "cythonize").unlink()
    assert lammps_tools._on_path("cython", (3, 0)) is None


# --- the cache


@needs_lammps
def test_a_second_call_finds_the_first_build(machine, capsys):
    tree = fakes.write_tree(machine / "tree")
    assert find_built() is None
    assert main(["lammps", "build", str(tree), "--no-harness"]) == 0
    said = capsys.readouterr().out
    built = find_built()
    assert f"export PATH={built.root / 'bin'}:" in said
    assert "LAMMPS 4 Jul 2026 with MANYBODY" in said
    start = time.perf_counter()
    assert build(tree).root == built.root
    assert time.perf_counter() - start < 1.0
    assert fakes.compilations(machine) == 1
    assert built.harness is None
    assert built.harness_reason == "left out by --no-harness"
    assert (built.headers / "pair.h").is_file()
    assert (built.inputs / "in.manybody").is_file()
    assert build(tree, force=True).root == built.root
    assert fakes.compilations(machine) == 2
    assert find_built(kokkos=True) is None


@needs_lammps
def test_other_sources_and_settings_are_other_builds(machine):
    tree = fakes.write_tree(machine / "tree")
    tarball = fakes.write_tarball(machine / "l.tar.gz")
    roots = [build(tree).root, build(tarball).root, build().root]
    roots += [build(tree, defines=("CMAKE_VERBOSE_MAKEFILE=ON",)).root]
    roots += [build(tree, no_kokkos=True).root]
    assert len(set(roots)) == fakes.compilations(machine) == 5


@needs_lammps
def test_a_build_for_another_python_is_not_used(machine, monkeypatch):
    tree = fakes.write_tree(machine / "tree")
    root = build(tree).root
    monkeypatch.setattr(lammps_tools.platform, "python_version", lambda: "3.99.0")
    assert find_built() is None
    assert build(tree).root != root


@needs_lammps
def test_processes_that_build_at_once_build_once(machine, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "1")
    command = fakes.builder(fakes.write_tree(machine / "tree"))
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    roots = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(roots) == 1
    assert fakes.compilations(machine) == 1


@needs_lammps
def test_an_interrupted_build_is_started_again(machine, monkeypatch):
    tree = fakes.write_tree(machine / "tree")
    monkeypatch.setenv("FAKE_SLEEP", "30")
    process = subprocess.Popen(fakes.builder(tree), start_new_session=True)
    deadline = time.monotonic() + 60
    while not fakes.compilations(machine) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = (machine / "cache" / "lammps").glob("*.partial")
    assert find_built() is None
    monkeypatch.setenv("FAKE_SLEEP", "0")
    assert build(tree).root == left.with_suffix("")
    assert not left.exists()
    assert fakes.compilations(machine) == 2


@needs_lammps
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FAKE_CMAKE_ERROR": "no Python"}, r"cannot configure LAMMPS: no Python; see .*\.log$"),
        ({"FAKE_NINJA_ERROR": "no luck"}, r"cannot be compiled: pair\.cpp:7:1: error: no luck; s"),
        ({"FAKE_PACKAGES": "MC PYTHON"}, r"lacks MANYBODY, ML-IAP, ML-SNAP, PLUGIN; see .*\.log"),
        ({"FAKE_ENERGY": "-6.4"}, r"gives other numbers .* on 1 ranks than through lj/cut"),
        ({"FAKE_CRASH": "no MPI"}, r"fails on 1 ranks with pair_style lj/cut: ERROR: no MPI; see"),
        ({"FAKE_LMP": "/bin/false"}, r"the LAMMPS just built does not start"),
    ],
)
def test_builds_that_fail_say_why_and_leave_no_trace(machine, monkeypatch, variables, message):
    tree = fakes.write_tree(machine / "tree")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match=message):
        build(tree)
    assert find_built() is None
    assert {path.suffix for path in (machine / "cache" / "lammps").iterdir()} == {".lock", ".log"}


@needs_lammps
@pytest.mark.parametrize("crash", ["", "no MPI"])
def test_sources_and_objects_can_be_kept(machine, monkeypatch, crash):
    tree = fakes.write_tree(machine / "tree")
    monkeypatch.setenv("FAKE_CRASH", crash)
    if crash:
        with pytest.raises(BuildError, match="no MPI"):
            build(tree, keep_source=True)
    else:
        build(tree, keep_source=True)
    (kept,) = (machine / "cache" / "lammps").glob("source-*")
    assert (kept / "source" / "src" / "pair.h").is_file()
    assert (kept / "build" / "lmp").is_file()
    assert (find_built() is None) == bool(crash)


def test_a_cache_that_cannot_be_written(machine, monkeypatch):
    (machine / "file").touch()
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(machine / "file"))
    with pytest.raises(BuildError, match=r"cannot build LAMMPS in .*MD_PLUGIN_CACHE"):
        build(fakes.write_tree(machine / "tree"))


def test_the_command_line_says_one_sentence(machine, capsys):
    assert main(["lammps", "build", str(machine / "nothing")]) == 2
    assert "there is no LAMMPS source tree or tarball" in capsys.readouterr().err


# --- what the tests of a real LAMMPS make of it


@needs_lammps
def test_tests_take_the_cached_build_or_make_it_or_say_why_not(machine, monkeypatch):
    find = lammps_real._find.__wrapped__
    for name in ("CI", "MD_PLUGIN_BUILD_LAMMPS"):
        monkeypatch.delenv(name, raising=False)
    assert find() == (None, lammps_real.RUN_IT)
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("FAKE_UNREACHABLE", "1")
    built, words = find()
    assert built is None
    assert words.startswith("cannot be built here: apt-get cannot read the source packages")
    monkeypatch.delenv("FAKE_UNREACHABLE")
    built, words = find()
    assert "LAMMPS 4 Jul 2026" in words and "built in" in words
    assert find()[1].endswith(f"from the cache: {built.root}")
