"""The LAMMPS with ML-IAP and Python for tests: that of `md-plugin lammps build`, and runs of it.

It is taken from the cache; with CI or MD_PLUGIN_BUILD_LAMMPS in the environment it is built where
there is none, some minutes on two cores. Otherwise, and where a machine cannot build it at all, the
tests that need it are skipped. What was used, or the reason, stands in pytest's summary.
"""

import os
import re
import time
from functools import cache

import numpy as np
import pytest
from lammps_helpers import dump_object, launch

from lammps_interface.apt_source import MissingError
from lammps_interface.lammps_build import BuildOptions, build_lammps, find_built

PINNED = "20260704"  # a newer one in Debian's archive may not compile, or have other faults
TOLD = []  # lines for pytest's summary
RUN_IT = "no LAMMPS with ML-IAP and Python in the cache; run: md-plugin lammps build"


def _wanted():
    """Whether one may be built here."""
    names = ("CI", "MD_PLUGIN_BUILD_LAMMPS")
    return any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in names)


@cache
def _find():
    """The build, or why there is none."""
    built = find_built()
    if built:
        return built, f"{built.title}, from the cache: {built.root}"
    if not _wanted():
        return None, RUN_IT
    start = time.monotonic()
    try:
        built = build_lammps(BuildOptions(wanted=PINNED))
    except MissingError as error:
        return None, f"cannot be built here: {error}"
    return built, f"{built.title}, built in {(time.monotonic() - start) / 60:.1f} min: {built.root}"


@cache
def _tell(line):
    TOLD.append(line)


@pytest.fixture(scope="session")
def real_lammps():
    """A LAMMPS with ML-IAP and Python, or a skip."""
    built, words = _find()
    _tell(f"LAMMPS with ML-IAP and Python: {words}")
    if built is None:
        pytest.skip(words)
    return built


@pytest.fixture(scope="session")
def harness(real_lammps):
    """LAMMPS's test_pair_style, or a skip."""
    if real_lammps.harness is None:
        _tell(f"LAMMPS's test_pair_style: {real_lammps.harness_reason}")
        pytest.skip(real_lammps.harness_reason)
    return real_lammps.harness


def pytest_terminal_summary(terminalreporter):
    """Says which LAMMPS was tested, or why none."""
    for line in TOLD:
        terminalreporter.write_line(line)


EXAMPLE = "in.mliap.unified.lj.Ar"
PICKLES = re.compile(r"python create_pickle here.*?python create_pickle invoke\n", re.DOTALL)


def write_example(built, folder, ranks):
    """LAMMPS's own example, unchanged on one rank; returns the log that LAMMPS has of it.

    On several ranks each would write the file that all read, and sometimes one reads what another
    has begun to write. There the file is written before, and the lines that write it are left out.
    """
    text = (built.examples / EXAMPLE).read_text()
    if ranks > 1:
        lj = pytest.importorskip("lammps.mliap.mliap_unified_lj")
        dump_object(folder, lj.MLIAPUnifiedLJ(["Ar"]), "mliap_unified_lj_Ar.pkl")
        text, n_blocks = PICKLES.subn("", text)
        assert n_blocks == 1
    (folder / EXAMPLE).write_text(text)
    (log,) = built.examples.glob(f"log.*.mliap.unified.lj.Ar.g++.{ranks}")
    return log


def run_real(built, folder, ranks=1, name="in.lmp", options=()):
    """Runs a built LAMMPS without a suffix; the finished process with merged output."""
    command = [built.lmp, "-log", "none", "-nocite", *options, "-in", name]
    return launch(command, folder, ranks)


def refused(process, *words):
    """Asserts that a run ended with an error that says all of `words`."""
    assert process.returncode != 0, process.stdout
    for word in words:
        assert word in process.stdout, process.stdout


def thermo_tables(text):
    """The thermo output of each run in the output or log of a LAMMPS, as arrays."""
    tables, rows = [], None
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["Step"]:
            rows = []
        elif line.startswith("Loop time"):
            tables.append(np.array(rows))
            rows = None
        elif rows is not None and words and words[0].isdigit():
            rows.append([float(word) for word in words])
    return tables
