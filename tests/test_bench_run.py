"""md-plugin bench: wrong providers, turns, processes of cases, what is written; untimed."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from md_plugin.bench import cases, core, counts, machine, process, report
from md_plugin.bench import run as bench
from md_plugin.bench.contest import run, turn
from md_plugin.bench.core import HIPPYNN, OTHER, OURS, Contest, Options, Provider, Row
from md_plugin.cli import main

QUICK = Options(atoms=32, rounds=2, quick=True, seed=5)
CEILINGS = {"fma_gflops": 100.0, "gemm_gflops": 90.0, "copy_gb_per_s": 10.0}


@pytest.fixture
def no_hippynn(monkeypatch, tmp_path_factory):
    """Neither in this process nor in those of cases."""
    folder = tmp_path_factory.mktemp("absent")
    (folder / "hippynn.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setitem(sys.modules, "hippynn", None)


@pytest.fixture
def scripted(monkeypatch):
    """Processes of cases run this code instead; the fixture is a list that holds them."""
    started = []
    popen = subprocess.Popen

    def record(command, **options):
        started.append(popen([sys.executable, "-c", scripted_code[0]], **options))
        return started[-1]

    scripted_code = [""]
    monkeypatch.setattr(process.subprocess, "Popen", record)
    return scripted_code, started


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
    rows = {row.provider: row for row in run("case", contest, Options(rounds=3))}
    assert rows["wrong"].status == "wrong: error 1.0e-03, allowed 2e-05"
    assert rows["not a number"].status.startswith("wrong: error nan")
    assert rows["broken"].status == "failed: ZeroDivisionError: no reason"
    assert rows["absent"].status == "not installed: pip install it"
    for name in ("wrong", "not a number", "broken", "absent"):
        assert rows[name].seconds is None and rows[name].ratio is None
    # Once to compile and twice in each of three turns, at least; as "(again)", too.
    assert len(calls) >= 2 * 7 and rows["right (again)"].seconds > 0
    assert rows["peer"].ratio == 1.0 and rows["for scale"].ratio == 0.5
    assert rows["for scale"].us_per_atom == 4e5 and rows["for scale"].gflops == 0.25


def test_a_provider_that_fails_while_it_is_timed_ends_its_contest_only():
    def fails():
        raise MemoryError("too large")

    contest = Contest("work", (Provider("ours", OURS, fails, lambda: 0.0),))
    rows = run("case", contest, Options(rounds=1))
    assert {row.status for row in rows} == {"failed: MemoryError: too large"}


@pytest.mark.parametrize("renewed", [False, True])
def test_a_turn_starts_with_an_untimed_call_and_lasts(renewed):
    """A clock that counts calls: one of 4 ms, repeated for 20 ms; inputs are new before each."""
    said = []
    provider = Provider(
        "ours",
        OURS,
        lambda: said.append("call"),
        before=(lambda: said.append("new")) if renewed else None,
    )

    def clock():
        return 4e-3 * said.count("call") + 1.0 * said.count("new")

    # The clock runs on while inputs are made: that must not be seen.
    assert turn(provider, clock) == pytest.approx(4e-3)
    assert said == ["new", "call"] * 6 if renewed else ["call"] * 6


def test_counts_of_a_call():
    import numba

    x = torch.ones(10, 3)
    double = numba.njit(lambda a: 2 * a)
    double(1.0)

    def call():
        (x.T + 1.0).sum()
        double(1.0)
        double(2.0)

    counted = counts.count(call, 10)
    # T, add, sum; T is a view. 30 numbers and one of 4 bytes.
    assert counted[counts.OPERATORS] == 3 and counted[counts.CALLS] == 2
    assert counted[counts.BYTES] == round((30 + 1) * 4 / 10)
    assert "__call__" not in vars(type(double)) and double(3.0) == 6.0


def test_errors_see_poison_and_shapes():
    core.poison(1)
    one = torch.ones(3)
    assert math.isnan(core.relative(torch.tensor([1.0, math.nan, 1.0]), one))
    assert core.relative(torch.ones(4), one) == math.inf
    assert math.isnan(core.worst(0.0, math.nan)) and core.worst(1.0, 2.0) == 2.0


def test_json_has_a_certificate(tmp_path, no_hippynn, capsys):
    words = ["bench", "train", "--quick", "--atoms", "32", "--rounds", "2", "-o", str(tmp_path)]
    threads = [1, 2] if machine.cores() > 1 else [1]
    assert main([*words, "--threads", ",".join(map(str, threads))]) == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    certificate = document["certificate"]
    assert certificate["threads"] == threads and certificate["dtype"] == "float32"
    assert certificate["cpu"]["model"] and "flags" in certificate["cpu"]
    assert {"torch", "numba", "hippynn", "md-plugin"} <= set(certificate["versions"])
    assert {"date", "commit", "seed", "rounds", "clock"} <= set(certificate)
    assert set(document["ceilings"]) == set(map(str, threads))
    for found in document["ceilings"].values():
        assert set(found) == set(CEILINGS) and all(value > 0 for value in found.values())
    rows = document["rows"]
    assert set(rows[0]) == {*vars(Row("", "", "", "", "")), "fraction_of_fma"}
    assert {(row["provider"], row["threads"]) for row in rows} == {
        (name, count)
        for name in ("ours, closed", "ours, closed (again)", "hippynn, numba")
        for count in threads
    }
    assert rows[0]["notes"]["neighbours"] > 0
    assert (tmp_path / "bench.png").stat().st_size > 0
    assert "| train | training step, 1 layer |" in (tmp_path / "bench.md").read_text()
    printed = capsys.readouterr().out
    assert "hippynn is not installed: pip install 'md-plugin[hippynn]'" in printed


def test_a_missing_peer_is_not_timed(no_hippynn):
    rows = {row.provider: row for row in bench.run_bench(["ase"], QUICK)}
    assert rows["hippynn, numba"].status == core.NO_PEER
    assert rows["ours"].status == "ok" and rows["ours"].ratio is None


def test_a_case_that_fails_is_told_and_the_others_run(monkeypatch, tmp_path, capfd):
    """A seed that nothing takes, in the second case only."""
    run_case = bench.run_case

    def bad_seed(case, options, heard):
        run_case(case, replace(options, seed="none") if case == "ase" else options, heard)

    monkeypatch.setattr(bench, "run_case", bad_seed)
    monkeypatch.setattr(bench.machine, "commit", lambda: "0")
    words = ["bench", "ase", "train", "--quick", "--atoms", "32", "-o", str(tmp_path)]
    assert main(words) == 2
    said = capfd.readouterr().err
    assert "Traceback" in said, "what the process wrote to standard error is seen"
    assert "md-plugin: case ase, threads 1: " in said and "'none'" in said.splitlines()[-1]
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"train"}


def test_a_process_that_dies_is_told(scripted):
    code, _ = scripted
    code[0] = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(process.CaseError, match=r"case sums, threads 1: ended by SIGKILL, w"):
        process.run_case("sums", QUICK, lambda _: None)
    code[0] = "raise SystemExit(3)"
    with pytest.raises(process.CaseError, match=r"case sums, threads 1: exit code 3"):
        process.run_case("sums", QUICK, lambda _: None)


def test_an_interrupt_ends_the_process(scripted):
    code, started = scripted
    code[0] = (  # in a background job of a shell, interrupts would be ignored
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        'try:\n    print(\'{"doing": "it"}\', flush=True)\n    time.sleep(600)\n'
        "except KeyboardInterrupt:\n    raise SystemExit(7)"
    )

    def interrupt(message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run_case("sums", QUICK, interrupt)
    assert started[0].returncode == 7, "it was interrupted, and could clean up"


def test_what_a_case_prints_is_no_message(tmp_path):
    """Also what compiled code prints: the descriptor is another one."""
    code = (
        "import os\nfrom md_plugin.bench import cases\n"
        "def talk(case, options):\n"
        "    os.write(1, b'noise'); print('more noise', flush=True); yield {'doing': 'it'}\n"
        "cases.messages = talk\n"
        "cases.main({'case': 'sums', 'options': {}})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == '{"doing": "it"}\n'
    assert "noise" in done.stderr and "more noise" in done.stderr


def test_unknown_cases_and_senseless_options(capsys):
    assert main(["bench", "sums", "nothing_like_this"]) == 2
    said = capsys.readouterr().err
    assert "unknown case nothing_like_this" in said
    assert all(case in said for case in cases.CASES)
    assert main(["bench", "--rounds", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "two", "1,", "-1", "1.5", "1;2"])
def test_threads_that_are_no_numbers(text, capsys):
    assert main(["bench", f"--threads={text}"]) == 2
    assert "numbers, or all, with commas between; as in 1,all" in capsys.readouterr().err


def test_threads_are_counted(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    assert bench.thread_counts("2") == (2,) and bench.thread_counts("1, all") == (1, 4)
    assert bench.thread_counts("0") == (4,) and bench.thread_counts("4,all,1") == (4, 1)
    with pytest.raises(ValueError, match=r"--threads 1,5: there are 4 cores"):
        bench.thread_counts("1,5")


def test_list_names_every_case(capsys):
    assert main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert set(cases.CASES) < set(lines)
    assert all("*" in lines[name] for name in cases.DEFAULT)


def test_tables_name_threads_where_there_are_several():
    row = Row("layer", "a layer", "ours", OURS, "ok", 0.0, 1.0, 0.9, 1.1, gflops=100.0)
    peaks = report.peaks({1: CEILINGS, 2: CEILINGS})
    page = report.markdown([row, replace(row, threads=2)], peaks)
    assert "| ours | 1 |" in page and "| 100 % |" in page
    assert "| ours | 2 |" in page and "| 50 % |" in page, "of the peak of two cores"
    one, two = (report.table("layer", rows, "float32", peaks) for rows in ([row], [row] * 2))
    assert one.title == "layer: float32, threads 1" and len(one.columns) == len(two.columns)
    both = report.table("layer", [row, replace(row, threads=2)], "float32", peaks)
    assert "threads" in [column.header for column in both.columns]
    assert "threads" not in [column.header for column in one.columns]


def test_rows_without_peer_are_drawn(tmp_path):
    rows = [Row("scale", "1 layer", "ours", OURS, "ok", 0.0, 1.0, 0.9, 1.1, us_per_atom=3.0)]
    certificate = machine.certificate(QUICK, ["scale"], [1, 2])
    report.plot(rows, tmp_path / "a.png", certificate)
    report.plot([], tmp_path / "b.png", certificate)
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


def test_no_process_is_left_where_the_bench_is_terminated(tmp_path):
    """A case runs in a session of its own, which a signal to the bench alone does not reach."""
    code = (
        "import sys\n"
        "from md_plugin.bench.core import Options\n"
        "from md_plugin.bench.process import started\n"
        "sleeper = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "with started(sleeper, Options()) as child:\n"
        "    print(child.pid, flush=True)\n"
        "    child.wait()\n"
    )
    bench = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    child = int(bench.stdout.readline())
    bench.terminate()
    assert bench.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
