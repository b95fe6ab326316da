"""md-plugin bench: every case made small, wrong providers, hippynn absent; no time is asserted."""

import json
import math
import sys

import pytest
import torch
from lammps_helpers import needs_lammps

from md_plugin import bench, bench_core, bench_machine, bench_report, bench_scale
from md_plugin.bench_core import HIPPYNN, OTHER, OURS, Contest, Options, Provider, Row
from md_plugin.bench_race import loop_times
from md_plugin.bench_systems import Problem, aluminium, silver
from md_plugin.cli import main

QUICK = Options(atoms=32, rounds=2, quick=True, seed=5)
IN_PYTHON = ("sums", "layer", "model", "train", "ase")


def by_provider(rows, what=None):
    return {row.provider: row for row in rows if what in (None, row.what)}


@pytest.fixture
def no_hippynn(monkeypatch):
    monkeypatch.setitem(sys.modules, "hippynn", None)


@pytest.mark.parametrize("case", IN_PYTHON)
def test_each_case_checks_and_times_everybody(case):
    pytest.importorskip("hippynn", reason="the peer of the benchmark is not installed")
    rows = bench.run_bench([case], QUICK)
    timed = [row for row in rows if not row.status.startswith(("not yet", "not installed"))]
    for row in timed:
        assert row.status == "ok", row
        assert row.error < 2e-4 and row.seconds >= row.low >= 0 and row.ratio > 0, row
    assert {OURS, HIPPYNN} <= {row.side for row in timed}
    assert any(row.provider.endswith("(again)") for row in timed)
    peers = [row for row in timed if row.provider == "hippynn, numba"]
    assert peers and all(row.ratio == 1.0 for row in peers)


@needs_lammps
def test_lammps_runs_both_potentials():
    pytest.importorskip("hippynn", reason="the peer of the benchmark is not installed")
    rows = by_provider(bench.run_bench(["lammps"], QUICK))
    assert set(rows) == {"ours", "ours (again)", "hippynn, MLIAPInterface"}
    for row in rows.values():
        assert row.status == "ok" and row.error < 2e-5 and row.ratio > 0, row


@needs_lammps
def test_others_run_beside_ours():
    rows = by_provider(bench.run_bench(["others"], QUICK))
    for name in ("ours, 1 layer", "ours, 2 layers", "snap (Ta06A)", "eam/alloy (Al_zhou)"):
        assert rows[name].status == "ok" and rows[name].us_per_atom > 0, rows[name]
        assert rows[name].ratio is None
    assert rows["MACE, 2 layers, 8x0e + 8x1o"].status.startswith(("ok", "not installed: pip"))


def test_silver_without_lammps_or_hippynn(no_hippynn, monkeypatch):
    monkeypatch.setattr("md_plugin.bench_race.lammps_absence", lambda: "not installed: LAMMPS")
    rows = bench.run_bench(["silver"], QUICK)
    assert by_provider(rows, "silver, 568 atoms")["ours, closed"].status == "ok"
    assert by_provider(rows, "silver, LAMMPS step")["ours"].status == "not installed: LAMMPS"


def test_scale_says_time_and_memory(monkeypatch):
    rows = bench.run_bench(["scale"], QUICK)
    assert [row.status for row in rows] == ["ok"] and rows[0].us_per_atom > 0
    assert rows[0].notes["bytes per atom of the list"] > 0 and rows[0].error < 2e-5
    monkeypatch.setattr(bench_scale, "available_bytes", lambda: 1e6)
    assert bench.run_bench(["scale"], QUICK)[0].status.startswith("skipped: 108 atoms need about")


def test_scale_shows_why_a_child_failed(monkeypatch):
    monkeypatch.setattr(bench_scale.sys, "executable", "false")
    assert "exit code 1" in bench.run_bench(["scale"], QUICK)[0].status


def test_json_has_a_certificate(tmp_path, no_hippynn, capsys):
    words = ["bench", "train", "--quick", "--atoms", "32", "--rounds", "2", "-o", str(tmp_path)]
    assert main(words) == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    certificate = document["certificate"]
    assert certificate["threads"] == 1 and certificate["dtype"] == "float32"
    assert certificate["cpu"]["model"] and "flags" in certificate["cpu"]
    assert {"torch", "numba", "hippynn", "md-plugin"} <= set(certificate["versions"])
    assert {"date", "commit", "seed", "rounds", "clock"} <= set(certificate)
    assert all(value > 0 for value in document["ceilings"].values())
    assert {row["provider"] for row in document["rows"]} == {
        *("ours, closed", "ours, closed (again)", "hippynn, numba")
    }
    assert document["rows"][0]["notes"]["neighbours"] > 0
    assert (tmp_path / "bench.png").stat().st_size > 0
    assert "| train | training step, 1 layer |" in (tmp_path / "bench.md").read_text()
    printed = capsys.readouterr().out
    assert "hippynn is not installed: pip install 'md-plugin[hippynn]'" in printed


def test_a_missing_peer_is_not_timed(no_hippynn):
    rows = by_provider(bench.run_bench(["ase"], QUICK))
    assert rows["hippynn, numba"].status == bench_core.NO_PEER
    assert rows["ours"].status == "ok" and rows["ours"].ratio is None


def providers(calls):
    def wrong():
        raise AssertionError("a wrong provider was timed")

    def broken():
        raise ZeroDivisionError("no reason")

    return (
        Provider("right", OURS, lambda: calls.append("right"), lambda: 1e-7),
        Provider("wrong", HIPPYNN, wrong, lambda: 1e-3),
        Provider("not a number", OURS, wrong, lambda: math.nan),
        Provider("broken", OURS, wrong, broken),
        Provider("absent", OTHER, wrong, broken, absent="not installed: pip install it"),
        Provider("peer", HIPPYNN, lambda: 2.0, lambda: 0.0, own_clock=True),
        Provider("for scale", OTHER, lambda: 4.0, lambda: None, own_clock=True),
    )


def test_a_wrong_provider_is_caught_and_not_timed():
    calls = []
    contest = Contest("work", providers(calls), "peer", atoms=10, flop=1e9)
    rows = by_provider(bench_core.run("case", contest, Options(rounds=3)))
    assert rows["wrong"].status == "wrong: error 1.0e-03, allowed 2e-05"
    assert rows["not a number"].status.startswith("wrong: error nan")
    assert rows["broken"].status == "failed: ZeroDivisionError: no reason"
    assert rows["absent"].status == "not installed: pip install it"
    for name in ("wrong", "not a number", "broken", "absent"):
        assert rows[name].seconds is None and rows[name].ratio is None
    assert len(calls) == 2 * 4  # twice a round, as "(again)" too, and the warm-up
    assert rows["peer"].ratio == 1.0 and rows["for scale"].ratio == 0.5
    assert rows["for scale"].us_per_atom == 4e5 and rows["for scale"].gflops == 0.25


def test_a_provider_that_fails_while_it_is_timed_ends_its_contest_only():
    def fails():
        raise MemoryError("too large")

    contest = Contest("work", (Provider("ours", OURS, fails, lambda: 0.0),))
    rows = bench_core.run("case", contest, Options(rounds=1))
    assert {row.status for row in rows} == {"failed: MemoryError: too large"}


def test_errors_see_poison_and_shapes():
    bench_core.poison(1)
    one = torch.ones(3)
    assert math.isnan(bench_core.relative(torch.tensor([1.0, math.nan, 1.0]), one))
    assert bench_core.relative(torch.ones(4), one) == math.inf
    assert math.isnan(bench_core.worst(0.0, math.nan)) and bench_core.worst(1.0, 2.0) == 2.0


def test_unknown_cases_and_senseless_options(capsys):
    assert main(["bench", "sums", "nothing_like_this"]) == 2
    said = capsys.readouterr().err
    assert "unknown case nothing_like_this" in said
    assert all(case in said for case in bench.CASES)
    assert main(["bench", "--rounds", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_list_names_every_case(capsys):
    assert main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert set(bench.CASES) < set(lines) and all("*" in lines[name] for name in bench.DEFAULT)


def test_the_bench_leaves_threads_and_seeds_as_they_were(no_hippynn):
    before, other = torch.get_num_threads(), 2 if torch.get_num_threads() == 1 else 1
    bench.run_bench(["train"], Options(atoms=32, rounds=1, quick=True, threads=other))
    assert torch.get_num_threads() == before


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


def test_rows_without_peer_are_drawn(tmp_path):
    rows = [Row("scale", "1 layer", "ours", OURS, "ok", 0.0, 1.0, 0.9, 1.1, us_per_atom=3.0)]
    certificate = bench_machine.certificate(QUICK, ["scale"])
    bench_report.plot(rows, tmp_path / "a.png", certificate)
    bench_report.plot([], tmp_path / "b.png", certificate)
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()
