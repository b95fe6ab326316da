"""The case `scale`: ours alone, from 256 to a million atoms, and on several MPI ranks in LAMMPS.

Each size is a process of its own (`memory`), which tells time and memory. Memory per atom is
a slope to a neighbouring size. Sizes that memory cannot hold, by the slope of the whole process at
smaller sizes, are skipped and said so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from md_plugin.bench.core import OURS, Options, Row
from md_plugin.bench.lammps import ranks
from md_plugin.bench.memory import Measured, MeasureError, measure, slope

SIZES, QUICK_SIZES = (256, 2048, 16384, 131072, 1_000_000), (108,)
DOUBLED = 200_000  # atoms, above which the slope is that to the size before, to save time
FIRST_GUESS = 20_000.0  # bytes per atom of a whole process, until there is a slope
MEANINGFUL = 100_000  # atoms, from where on a slope of the whole process is not one of constants
RESERVE = 2**30  # bytes that are left to others
PER_RANK = 2**30  # bytes of a rank of LAMMPS without atoms


def scale(options: Options) -> Iterator[Row]:
    """Ours alone: 256 to 1e6 atoms, time and memory per atom; on one thread also MPI ranks."""
    per_atom, before = FIRST_GUESS, None
    for n in QUICK_SIZES if options.quick else SIZES:
        row = Row("scale", f"1 layer, {n} atoms", "ours", OURS, "ok")
        sizes = [n, *([2 * n] if n <= DOUBLED else [])]
        if reason := no_room(n, n * per_atom):
            yield replace(row, status=reason)
            continue
        try:
            found = [
                measure("fused", 1, size, options)
                for size in sizes
                if not no_room(size, size * per_atom)
            ]
        except MeasureError as problem:
            yield replace(row, status=f"failed: {problem}")
            continue
        other = found[1] if len(found) > 1 else before
        yield finished(row, found[0], other)
        before = found[-1]
        if other is not None and n >= MEANINGFUL:
            per_atom = slope(found[0], other, "peak")
    if options.threads == 1:
        yield from ranks(options, lambda n, k: no_room(n, n * FIRST_GUESS + k * PER_RANK))


def finished(row: Row, here: Measured, other: Measured | None) -> Row:
    """The row of a size; memory is a slope to another size, where there is one."""
    low, median, high = np.quantile(here.seconds, [0.2, 0.5, 0.8]).tolist()
    return replace(
        row,
        seconds=median,
        low=low,
        high=high,
        us_per_atom=1e6 * median / here.atoms,
        bytes_per_atom=None if other is None else slope(here, other),
        error=here.error,
        notes={
            "atoms": here.atoms,
            "path": here.path,
            "bytes per atom of the list": round(here.listed / here.atoms),
            "peak of the process, MB": round(here.peak / 2**20),
        },
    )


def no_room(n: int, need: float) -> str:
    """Why n atoms, which need so many bytes, are not tried; "" where they fit."""
    there = available_bytes() - RESERVE
    if need <= there:
        return ""
    return f"skipped: {n} atoms need about {need / 2**30:.1f} GB, {there / 2**30:.1f} GB are free"


def available_bytes() -> float:
    """Memory that the system can give; infinite where it does not say."""
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return float("inf")
