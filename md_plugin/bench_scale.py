"""The case `scale`: ours alone, from 256 to a million atoms, time and memory of a child process.

    python -m md_plugin.bench_scale '{"atoms": N, "layers": K, "threads": T, "steps": R}'

The child checks 256 other atoms against float64, builds the structure and its list, evaluates
energy and forces R times after a warm-up,
and writes one line of JSON: seconds per evaluation, bytes that the process held at most during the
evaluations beyond what it held before them, and bytes of the list. Memory per atom is a slope:
(peak of 2N - peak of N) / N, so that constants drop out. Sizes that memory cannot hold, by the
slope of the whole child's peak at smaller sizes, are skipped and said so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from md_plugin.bench_core import FLOAT32, OURS, Options, Row, poison
from md_plugin.bench_models import energy_error, fused
from md_plugin.bench_systems import Problem, aluminium, network, threads_and_kernels
from md_plugin.potential import Potential

SIZES = (256, 2048, 16384, 131072, 1_000_000)
FIRST_GUESS = 20_000.0  # bytes per atom, until there is a slope
MEANINGFUL = 16384  # atoms, from where on a slope of the whole peak says something
LIMIT = 900.0  # s, for one child


def scale(options: Options) -> Iterator[Row]:
    """Ours alone, 256 to 1e6 atoms, memory per atom, on one thread and on all."""
    sizes = (108,) if options.quick else SIZES
    counts = sorted({1, options.threads, 1 if options.quick else os.cpu_count() or 1})
    for threads in counts:
        per_atom = FIRST_GUESS
        for n in sizes:
            what = f"1 layer, {n} atoms, {threads} thread{'s' * (threads > 1)}"
            row = Row("scale", what, "ours", OURS, "ok")
            if n * per_atom > available_bytes():
                yield replace(row, status=skipped(n, per_atom))
                continue
            twice = [2 * n] if 2 * n * per_atom <= available_bytes() else []
            try:
                found = [measure(size, threads, options) for size in (n, *twice)]
            except (RuntimeError, subprocess.TimeoutExpired) as problem:
                yield replace(row, status=f"failed: {problem}")
                continue
            yield finished(row, found)
            per_atom = max(per_atom if n < MEANINGFUL else 1000.0, slope_of(found, "peak") or 0.0)


def slope_of(found: list[dict[str, Any]], key: str) -> float | None:
    """Bytes per atom between a size and its double; None where the double did not fit."""
    if len(found) < 2 or found[1]["atoms"] == found[0]["atoms"]:
        return None
    small, large = found
    return float((large[key] - small[key]) / (large["atoms"] - small["atoms"]))


def finished(row: Row, found: list[dict[str, Any]]) -> Row:
    """The row of a size from its child and, where it fits, that of twice the size."""
    small, slope = found[0], slope_of(found, "during")
    low, median, high = np.quantile(small["seconds"], [0.2, 0.5, 0.8]).tolist()
    return replace(
        row,
        seconds=median,
        low=low,
        high=high,
        us_per_atom=1e6 * median / small["atoms"],
        error=small["error"],
        notes={
            "atoms": small["atoms"],
            "path": small["path"],
            "bytes per atom beyond the list": None if slope is None else round(slope),
            "bytes per atom of the list": round(small["list"] / small["atoms"]),
            "peak of the process, MB": round(small["peak"] / 2**20),
        },
    )


def skipped(n: int, per_atom: float) -> str:
    """Why a size is not measured."""
    need, there = n * per_atom / 2**30, available_bytes() / 2**30
    return f"skipped: {n} atoms need about {need:.1f} GB, {there:.1f} GB are free"


def available_bytes() -> float:
    """Memory that the system can give; infinite where it does not say."""
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return float("inf")


def measure(n_atoms: int, threads: int, options: Options) -> dict[str, Any]:
    """What the child says.

    Raises:
        RuntimeError: it ended without saying anything.
    """
    rounds = max(2, min(options.rounds, 2_000_000 // n_atoms))
    task = {"atoms": n_atoms, "threads": threads, "steps": rounds, "seed": options.seed}
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    command = [sys.executable, "-W", "ignore", "-m", "md_plugin.bench_scale", json.dumps(task)]
    done = subprocess.run(
        command, env=os.environ | counts, capture_output=True, text=True, timeout=LIMIT
    )
    if done.returncode != 0 or not done.stdout.strip():
        words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{n_atoms} atoms: {words[0]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(task: dict[str, Any]) -> dict[str, Any]:
    """Build, evaluate, and say what it took; see the module."""
    options = Options(threads=task["threads"], seed=task["seed"])
    with threads_and_kernels(options):
        net = network(1)
        problem = Problem(aluminium(task["atoms"], task["seed"]), net.rcut)
        geometry, species = problem.geometry, problem.species
        potential = Potential(net, dtype="float32")
        warm = Problem(aluminium(256, task["seed"] + 1), net.rcut)
        poison()
        error = energy_error(net, warm, fused(potential, warm))
        if not error <= FLOAT32:
            raise ValueError(f"wrong: error {error:.1e}, allowed {FLOAT32:.0e}")
        before = _status("VmRSS")
        whole_peak = _status("VmHWM")
        _reset_peak()
        seconds = []
        for _ in range(task["steps"] + 1):
            start = options.clock()
            found = potential.evaluate_geometry(species, geometry)
            assert found.forces is not None and bool(found.forces.isfinite().all())
            seconds.append(options.clock() - start)
        pairs, shift = geometry.pairs, geometry.translation
        arrays = [pairs.row_ptr, pairs.sender, *([] if shift is None else [shift])]
        peak = _status("VmHWM")
        return {
            "atoms": len(problem.atoms),
            "seconds": seconds[1:],
            "during": max(0, peak - before),
            "list": sum(a.numel() * a.element_size() for a in arrays),
            "peak": max(peak, whole_peak),
            "error": error,
            "path": potential.why_not_fused() or "fused",
        }


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


if __name__ == "__main__":
    sys.stdout.write(json.dumps(child(json.loads(sys.argv[1]))) + "\n")
