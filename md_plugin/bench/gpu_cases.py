"""The cases of `md-plugin bench gpu`, and the process that runs one of them.

    python -m md_plugin.bench.gpu_cases '{"case": NAME, "options": {...}}'

    ceilings        of the card (`gpu_ceilings`), and what it is
    A  A2  B  C     energy and forces, and the first step of fresh processes; B and C: training, too
    loop            a step of molecular dynamics on the device, rebuilds of its list included
    memory          the largest number of atoms of B that fits

Messages are those of `cases`. What ends a part of a case too early is a row with the reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from md_plugin.bench import gpu_ceilings, work
from md_plugin.bench.core import HIPPYNN, OURS, Options, Row
from md_plugin.bench.gpu_contest import (
    FAST,
    HELD,
    Entry,
    Make,
    Task,
    first_steps,
    peer_kernels,
    peer_name,
    potential,
    their,
    timed,
)
from md_plugin.bench.gpu_loop import loop
from md_plugin.bench.gpu_systems import WORKLOADS, Workload, sized
from md_plugin.bench.process import environment, speak
from md_plugin.bench.systems import threads_and_kernels
from md_plugin.devices import wait
from md_plugin.model.hipnn import Hipnn

PATIENCE = 180.0  # s, for a fresh process to make a step
LONGEST = 60.0  # s, for the doublings of one provider
MOST_ATOMS = 30_000_000  # of B, whose pairs int32 still numbers
TRAINING_PASSES = 3  # evaluations that a training step amounts to
CEILINGS = "ceilings"


def inference(name: str, options: Options, absent: str) -> Iterator[Row]:
    """Energy and forces of a workload by all, and the first step of fresh processes."""
    load = sized(WORKLOADS[name], options)
    net = load.network()
    task = Task(load.what, load, net, options)
    yield from timed(task, entries(net, load.layers, options), absent, work.energy_error)
    yield from fresh(name, load, options)


def entries(net: Hipnn, layers: int, options: Options) -> list[Entry]:
    """Who computes energy and forces; float16 is in sums of the second layer and beyond only."""

    def ours(kind: Callable[..., Any], **settings: str) -> Make:
        return lambda: partial(kind, potential(net, options, **settings))

    fused, closed = work.fused, work.closed
    found = [
        Entry("ours", OURS, ours(fused)),
        Entry("ours, no graphs", OURS, ours(fused, graphs="never")),
    ]
    if layers > 1:
        # Interpreted, a step of this takes seconds, and the units that it is made for are absent.
        absent = "" if options.device.startswith("cuda") else "absent: needs a GPU"
        fast = ours(fused, dtype="fast")
        found.append(Entry("ours, fast", OURS, fast, FAST, half=True, absent=absent))
    found.append(Entry("ours, closed", OURS, ours(closed)))
    return [*found, Entry(peer_name(options), HIPPYNN, their(work.peer, net, options))]


def train(name: str, options: Options, absent: str) -> Iterator[Row]:
    """A training step by both; a quarter of the atoms as well where somebody lacks memory."""
    whole = sized(WORKLOADS[name], options)
    for share, words in ((1, ""), (4, ", a quarter of the atoms")):
        load = replace(whole, atoms=whole.atoms // share)
        net = load.network()
        task = Task(f"{load.what}, training step{words}", load, net, options, TRAINING_PASSES)
        both = [
            Entry(
                "ours, closed",
                OURS,
                lambda net=net: partial(work.training_step, potential(net, options)),  # type: ignore[misc]
                work.TRAINED,
            ),
            Entry(
                peer_name(options),
                HIPPYNN,
                their(work.peer_step, net, options),
                work.TRAINED,
            ),
        ]
        rows = list(timed(task, both, absent, work.gradient_error))
        yield from rows
        if not any("OutOfMemory" in row.status for row in rows):
            return


def fresh(name: str, load: Workload, options: Options) -> Iterator[Row]:
    """The first step of a fresh process: with empty caches of compiled kernels, and with those."""
    with tempfile.TemporaryDirectory() as folder:
        for caches in ("empty", "warm"):
            what = f"{load.what}: first step of a process"
            row = Row("", what, f"ours, caches {caches}", OURS, "ok")
            task = json.dumps({"first": name, "options": asdict(options)})
            command = [sys.executable, "-W", "ignore", "-m", __spec__.name, task]
            env = environment(options.threads) | {"TRITON_CACHE_DIR": folder}
            settings: dict[str, Any] = {"env": env, "capture_output": True, "text": True}
            try:
                done = subprocess.run(command, timeout=PATIENCE, check=True, **settings)
                seconds = float(json.loads(done.stdout)["seconds"])
            except (subprocess.SubprocessError, ValueError, KeyError) as problem:
                said = str(getattr(problem, "stderr", "") or problem).strip().splitlines()
                yield replace(row, status=f"failed: {said[-1]}")
                return
            yield replace(row, seconds=seconds, low=seconds, high=seconds)


def first(name: str, options: Options) -> Iterator[dict[str, Any]]:
    """In that process: seconds from positions and list to forces, compilation included."""
    load = sized(WORKLOADS[name], options)
    net, problem = load.network(), load.problem(options)
    _ = problem.geometry
    wait(torch.device(options.device))
    start = time.perf_counter()
    work.fused(potential(net, options), problem)
    wait(torch.device(options.device))
    yield {"seconds": time.perf_counter() - start}


def memory(options: Options, absent: str) -> Iterator[Row]:
    """The largest number of atoms of B that fits: doubled until it does not."""
    load = sized(WORKLOADS["B"], options)
    net = load.network()
    who = [e for e in entries(net, load.layers, options) if e.name in ("ours", peer_name(options))]
    most = MOST_ATOMS if options.device.startswith("cuda") else 2 * load.atoms
    for entry in who:
        row = Row("", f"{load.what}: what fits", entry.name, entry.side, "ok")
        if entry.side == HIPPYNN and absent:
            yield replace(row, status=absent)
            continue
        n, start, reason = load.atoms, time.monotonic(), ""
        while not reason and n <= most and time.monotonic() - start < LONGEST:
            # What fails is told in the row: memory, or something else that limits the size.
            try:
                held = _step_of(entry, load, n, options)
                row = replace(row, notes={"atoms": n}, bytes_per_atom=held and held / n)
                n *= 2
            except Exception as problem:
                reason = f"{type(problem).__name__}: {str(problem)[:200]}"
        ended = {"did not fit" if reason else "not tried": n, "reason": reason}
        status = "ok" if row.notes else f"failed: {reason}"
        yield replace(row, status=status, notes={**row.notes, **ended})


def _step_of(entry: Entry, load: Workload, n: int, options: Options) -> int | None:
    """Bytes that a step of n atoms takes beyond its inputs; nothing of it stays."""
    problem = load.problem(options, n)
    _ = problem.inside if entry.side == HIPPYNN else problem.geometry
    return first_steps(partial(entry.make(), problem), options).get(HELD)


def guarded(what: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; what ends them too early is a row as well, and others go on."""
    try:
        yield from rows
    except Exception as problem:
        yield Row("", what, "all", OURS, f"failed: {type(problem).__name__}: {str(problem)[:300]}")


CASES: dict[str, tuple[Callable[[Options, str], Iterator[Row]], ...]] = {
    "A": (partial(inference, "A"),),
    "A2": (partial(inference, "A2"),),
    "B": (partial(inference, "B"), partial(train, "B")),
    "C": (partial(inference, "C"), partial(train, "C")),
    "loop": (loop,),
    "memory": (memory,),
}


def messages(case: str, options: Options) -> Iterator[dict[str, Any]]:
    """What the process of a case says; the block around it has set threads."""
    if case == CEILINGS:
        yield {CEILINGS: gpu_ceilings.ceilings(options)}
        yield {"card": gpu_ceilings.card(options)}
        return
    with peer_kernels(options) as absent:
        for part in CASES[case]:
            for row in guarded(case, part(options, absent)):
                yield {"row": asdict(replace(row, case=case))}


def main(task: dict[str, Any]) -> int:
    """Run one case, or the first step of a fresh process; returns the exit code."""
    options = Options(**task["options"])

    def said() -> Iterator[dict[str, Any]]:
        if options.device.startswith("cuda"):
            torch.cuda.set_device(options.device)
        with threads_and_kernels(options, peer=False):
            yield from (
                first(task["first"], options)
                if "first" in task
                else messages(task["case"], options)
            )

    return speak(said())


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
