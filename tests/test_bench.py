"""md-plugin bench: every case made small, in this process; no time is asserted."""

import json
import sys
from dataclasses import replace

import pytest
from lammps_helpers import needs_lammps

from md_plugin.bench import cases, core, memory, report, scale
from md_plugin.bench.core import HIPPYNN, OURS, Options, Row
from md_plugin.bench.counts import BYTES, CALLS, OPERATORS
from md_plugin.bench.race import loop_times
from md_plugin.bench.systems import Problem, aluminium, silver, threads_and_kernels

QUICK = Options(atoms=32, rounds=2, quick=True, seed=5)
IN_PYTHON = ("sums", "layer", "model", "train", "ase")


def rows_of(case, options=QUICK):
    """What a process of that case says, after it went through JSON."""
    with threads_and_kernels(options):
        said = [json.loads(json.dumps(m)) for m in cases.messages(case, options)]
    assert {"doing"} < {key for message in said for key in message} or case in ("scale", "memory")
    return [Row(**message["row"]) for message in said if "row" in message]


def by_provider(rows, what=None):
    return {row.provider: row for row in rows if what in (None, row.what)}


@pytest.fixture
def no_hippynn(monkeypatch):
    monkeypatch.setitem(sys.modules, "hippynn", None)


@pytest.mark.parametrize("case", IN_PYTHON)
def test_each_case_checks_and_times_everybody(case):
    pytest.importorskip("hippynn", reason="the peer of the benchmark is not installed")
    rows = rows_of(case)
    there = ("not yet", "not installed", "absent")
    timed = [row for row in rows if not row.status.startswith(there)]
    for row in timed:
        assert row.status == "ok", row
        assert row.error < 2e-4 and row.seconds >= row.low >= 0 and row.ratio > 0, row
    assert {OURS, HIPPYNN} <= {row.side for row in timed}
    assert any(row.provider.endswith("(again)") for row in timed)
    peers = [row for row in timed if row.provider == "hippynn, numba"]
    assert peers and all(row.ratio == 1.0 for row in peers)
    if case == "sums":
        assert by_provider(rows)["hippynn, triton"].status == "absent: needs a CUDA device"


def test_models_are_counted():
    pytest.importorskip("hippynn", reason="the peer of the benchmark is not installed")
    rows = [row for row in rows_of("model") if row.status == "ok"]
    for what in {row.what for row in rows}:
        found = {name: row.notes["per call"] for name, row in by_provider(rows, what).items()}
        ours, closed, peer = (found[f"ours, {k}"] for k in ("fused", "closed", "fused (again)"))
        assert ours == peer, "counts are the same in each call"
        peer = found["hippynn, numba"]
        assert 0 < ours[OPERATORS] < closed[OPERATORS] and 0 < ours[BYTES] < closed[BYTES]
        assert ours[CALLS] > 0 and closed[CALLS] > 0 and peer[CALLS] > 0
        (line,) = [s for s in report.sentences(rows) if s.startswith(what)]
        assert f"hippynn, numba {peer[OPERATORS]}, " in line and "(again)" not in line


@needs_lammps
def test_lammps_runs_both_potentials():
    pytest.importorskip("hippynn", reason="the peer of the benchmark is not installed")
    rows = by_provider(rows_of("lammps"))
    assert set(rows) == {"ours", "ours (again)", "hippynn, MLIAPInterface"}
    for row in rows.values():
        assert row.status == "ok" and row.error < 2e-5 and row.ratio > 0, row


@needs_lammps
def test_others_run_beside_ours():
    rows = by_provider(rows_of("others"))
    for name in ("ours, 1 layer", "ours, 2 layers", "snap (Ta06A)", "eam/alloy (Al_zhou)"):
        assert rows[name].status == "ok" and rows[name].us_per_atom > 0, rows[name]
        assert rows[name].ratio is None
    assert rows["MACE, 2 layers, 8x0e + 8x1o"].status.startswith(("ok", "not installed: pip"))


def test_silver_without_lammps_or_hippynn(no_hippynn, monkeypatch):
    monkeypatch.setattr("md_plugin.bench.race.lammps_absence", lambda: "not installed: LAMMPS")
    rows = rows_of("silver")
    assert by_provider(rows, "silver, 568 atoms")["ours, closed"].status == "ok"
    assert by_provider(rows, "silver, LAMMPS step")["ours"].status == "not installed: LAMMPS"


def test_memory_is_a_slope_of_both_sides():
    pytest.importorskip("hippynn", reason="the peer of the benchmark is not installed")
    rows = by_provider(rows_of("memory"))
    assert set(rows) == {"ours, fused", "ours, closed", "hippynn, numba"}
    for row in rows.values():
        assert row.status == "ok" and row.error < 2e-5 and row.notes["atoms"] == [108, 256], row
    # Closed sums hold something per pair, fused layers do not: 60 pairs of 20 float32 are 4.8 kB.
    assert rows["ours, closed"].bytes_per_atom > rows["ours, fused"].bytes_per_atom


def test_memory_without_hippynn_and_with_a_broken_process(no_hippynn, monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "false")
    rows = by_provider(rows_of("memory"))
    assert rows["hippynn, numba"].status == core.NO_PEER
    assert rows["ours, fused"].status == "failed: 108 atoms: exit code 1"


@needs_lammps
def test_scale_says_time_memory_and_efficiency():
    rows = by_provider(rows_of("scale"))
    assert set(rows) == {"ours", "ours, 1 rank", "ours, 2 ranks"}
    assert rows["ours"].us_per_atom > 0 and rows["ours"].error < 2e-5
    assert rows["ours"].notes["bytes per atom of the list"] > 0
    assert rows["ours, 1 rank"].notes["parallel efficiency"] == 1.0
    two = rows["ours, 2 ranks"]
    assert two.status.startswith("absent: needs 2 cores") or two.notes["parallel efficiency"] > 0
    assert all(row.error < 2e-5 for row in rows.values() if row.status == "ok")


def test_scale_does_not_try_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(scale, "available_bytes", lambda: 2**30 + 1e6)
    monkeypatch.setattr("md_plugin.bench.lammps.lammps_absence", lambda: "")
    monkeypatch.setattr(scale, "measure", lambda *_: pytest.fail("it was tried"))
    rows = rows_of("scale")
    assert rows[0].status == "skipped: 108 atoms need about 0.0 GB, 0.0 GB are free"
    assert rows[1].status.startswith(("skipped: 500 atoms need", "not installed"))
    several = rows_of("scale", replace(QUICK, threads=2))
    assert [row.provider for row in several] == ["ours"], "ranks have one thread each"


def test_loop_times_take_the_timed_runs():
    output = (
        "Loop time of 9 on 1 procs for 0 steps with 4 atoms\n\n50.0% CPU use\n"
        "Loop time of 0.5 on 1 procs for 10 steps with 4 atoms\n\n"
        "Performance: 1 ns/day\n50.0% CPU use with 1 MPI tasks x no OpenMP threads\n"
    )
    assert loop_times(output, 10, with_cpu=True) == [0.025]
    assert loop_times(output, 10, with_cpu=False) == [0.05]


def test_structures_have_the_sizes_of_the_cases():
    # A perfect crystal has 54 within 6.27 Å and 18 more at 6.4 Å: noise moves some of them
    problem = Problem(aluminium(2000), 6.27)
    assert len(problem.atoms) == 2048 and 55 < problem.notes()["neighbours"] < 65
    assert [len(silver(n)) for n in (568, 2272)] == [568, 2272]
