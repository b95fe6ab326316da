"""Time and memory of one provider at one size, in a process of its own; and the case `memory`.

    python -m md_plugin.bench.memory '{"kind": "fused", "layers": K, "atoms": N, "threads": T,
                                       "steps": R, "seed": S}'

The process checks 256 other atoms against float64, builds the structure and its lists, evaluates
energy and forces R times after a warm-up, and once more for memory: bytes that it held at most
during this evaluation beyond what it held before. So lists and other inputs do not count, nor what
stays between evaluations. Memory per atom is a slope between two sizes: constants drop out.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from md_plugin.bench import models, work
from md_plugin.bench.core import FLOAT32, HIPPYNN, OURS, Options, Row, peer_absence, poison
from md_plugin.bench.process import environment
from md_plugin.bench.systems import Problem, Twin, aluminium, network, threads_and_kernels
from md_plugin.bench.work import Results
from md_plugin.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
from md_plugin.model.hipnn import Hipnn
from md_plugin.potential import Potential

KINDS = {"fused": "ours, fused", "closed": "ours, closed", "peer": models.PEER}
SIZES, QUICK_SIZES = (4000, 8000), (108, 256)
BLOCK = 2**16  # bytes: larger blocks of memory are fresh pages of the system
LIMIT = 900.0  # s, for one process


class MeasureError(RuntimeError):
    """A process ended without a result."""


@dataclass(frozen=True)
class Measured:
    """What a process says.

    Attributes:
        atoms: of the structure.
        seconds: of each timed evaluation.
        during: bytes held at most in one evaluation beyond what was held before.
        listed: bytes of the neighbour list.
        peak: bytes that the process held at most, whenever.
        error: of energy and forces against float64, relative.
        path: "fused", or why not.
    """

    atoms: int
    seconds: list[float]
    during: int
    listed: int
    peak: int
    error: float
    path: str


def memory(options: Options) -> Iterator[Row]:
    """Bytes per atom, slope between 4,000 and 8,000 atoms: one and two layers, ours and hippynn."""
    sizes = QUICK_SIZES if options.quick else SIZES
    for layers in (1,) if options.quick else (1, 2):
        what = f"energy and forces, {layers} layer{'s' * (layers > 1)}"
        for kind, name in KINDS.items():
            side = HIPPYNN if kind == "peer" else OURS
            if side == HIPPYNN and peer_absence():
                yield Row("memory", what, name, side, peer_absence())
                continue
            try:
                small, large = (measure(kind, layers, n, options, timed=False) for n in sizes)
            except MeasureError as problem:
                yield Row("memory", what, name, side, f"failed: {problem}")
                continue
            notes = {"atoms": [small.atoms, large.atoms], "path": small.path}
            row = Row("memory", what, name, side, "ok", small.error, notes=notes)
            yield replace(row, bytes_per_atom=slope(small, large))


def slope(small: Measured, large: Measured, name: str = "during") -> float:
    """Bytes per atom of one of the attributes, between two sizes."""
    difference: int = getattr(large, name) - getattr(small, name)
    return difference / (large.atoms - small.atoms)


def measure(
    kind: str, layers: int, n_atoms: int, options: Options, *, timed: bool = True
) -> Measured:
    """One of `KINDS` at one size; without times where they are not wanted.

    Raises:
        MeasureError: the process failed, or took too long.
    """
    task = {
        "kind": kind,
        "layers": layers,
        "atoms": n_atoms,
        "steps": max(2, min(options.rounds, 2_000_000 // n_atoms)) if timed else 0,
        "threads": options.threads,
        "seed": options.seed,
    }
    command = [sys.executable, "-W", "ignore", "-m", "md_plugin.bench.memory", json.dumps(task)]
    try:
        done = subprocess.run(
            command,
            env=environment(options.threads),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired as late:
        raise MeasureError(f"{n_atoms} atoms: did not end within {LIMIT:g} s") from late
    if done.returncode != 0 or not done.stdout.strip():
        words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise MeasureError(f"{n_atoms} atoms: {words[0]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def child(task: dict[str, Any]) -> Measured:
    """Build, check, evaluate, and say what it took; see the module."""
    options = Options(threads=task["threads"], seed=task["seed"])
    with threads_and_kernels(options, peer=task["kind"] == "peer"):
        net = network(task["layers"])
        problem = Problem(aluminium(task["atoms"], task["seed"]), net.rcut)
        potential = Potential(net, dtype="float32")
        evaluate = _evaluation(task["kind"], net, potential)
        _ = problem.species, problem.geometry if task["kind"] == "fused" else problem.inside
        # What is compiled, is compiled here: its memory does not count.
        small = Problem(aluminium(256, task["seed"] + 1), net.rcut)
        poison()
        error = work.energy_error(net, small, evaluate(small))
        if not error <= FLOAT32:
            raise ValueError(f"wrong: error {error:.1e}, allowed {FLOAT32:.0e}")
        seconds = []
        for _ in range(task["steps"] + 1):
            start = options.clock()
            _, forces = evaluate(problem)
            seconds.append(options.clock() - start)
            if not bool(forces.isfinite().all()):
                raise ValueError("wrong: forces are not finite")
            del forces
        _give_back()
        before, peak = _status("VmRSS"), _status("VmHWM")
        _reset_peak()
        evaluate(problem)
        during = _status("VmHWM") - before
        pairs, shift = problem.geometry.pairs, problem.geometry.translation
        arrays = [pairs.row_ptr, pairs.sender, *([] if shift is None else [shift])]
        return Measured(
            atoms=len(problem.atoms),
            seconds=seconds[1:],
            during=during,
            listed=sum(a.numel() * a.element_size() for a in arrays),
            peak=max(peak, before + during),
            error=error,
            path=potential.why_not_fused() or "fused",
        )


def _evaluation(kind: str, net: Hipnn, potential: Potential) -> Callable[[Problem], Results]:
    if kind == "peer":
        return partial(work.peer, Twin(net))
    return partial(work.fused if kind == "fused" else work.closed, potential)


def _status(name: str) -> int:
    """Bytes of this process; 0 where the system does not say."""
    file = Path("/proc/self/status")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0


def _reset_peak() -> None:
    """Linux: VmHWM starts again from what is held now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _give_back() -> None:
    """glibc: freed memory goes back to the system, now and at once, or its reuse would not show."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(M_MMAP_THRESHOLD, BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, BLOCK)
        libc.malloc_trim(0)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(vars(child(json.loads(sys.argv[1])))) + "\n")
