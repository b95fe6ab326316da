"""The cases of the bench, and the process that runs one of them.

    python -m md_plugin.bench_cases '{"case": NAME, "options": {...}}'

A case is a function from options to contests and finished rows, one after the other. Its process
writes messages, a line of JSON each, to what was its standard output: {"doing": what}, {"row":
{...}}, {"ceilings": {...}}, {"failed": why}. Whatever else prints there goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from md_plugin import (
    bench_contest,
    bench_kernels,
    bench_lammps,
    bench_machine,
    bench_memory,
    bench_models,
    bench_nanodft,
    bench_ranks,
    bench_scale,
)
from md_plugin.bench_core import Contest, Options, Row
from md_plugin.bench_process import speak
from md_plugin.bench_systems import threads_and_kernels
from md_plugin.memory import keep_freed_memory

CASES: dict[str, Callable[[Options], Iterator[Contest | Row]]] = {
    "sums": bench_kernels.sums,
    "layer": bench_kernels.layer,
    "model": bench_models.model,
    "train": bench_models.train,
    "ase": bench_models.ase,
    "lammps": bench_lammps.lammps,
    "memory": bench_memory.memory,
    "silver": bench_models.silver_case,
    "scale": bench_scale.scale,
    "ranks": bench_ranks.ranks,
    "others": bench_lammps.others,
    "nanodft": bench_nanodft.nanodft,
}
DEFAULT = ("sums", "layer", "model", "ase", "lammps", "memory")
PRECISION = {"nanodft": "float64"}  # others: float32
CEILINGS = "ceilings"  # of the machine, measured in a process of their own, as a case is


def list_cases() -> list[str]:
    """Each case and the first line of what it says about itself."""
    lines = []
    for name, case in CASES.items():
        first = (case.__doc__ or "").strip().splitlines()[0]
        lines.append(f"{name:8s}{'*' if name in DEFAULT else ' '} {first}")
    lines.append("gpu       what a GPU does, beside hippynn on its Triton kernels; runs alone")
    return [*lines, "* runs where no case is named"]


def messages(case: str, options: Options) -> Iterator[dict[str, Any]]:
    """What the process of a case says; the block around it has set threads and kernels."""
    if case == CEILINGS:
        yield {CEILINGS: bench_machine.ceilings(options)}
        return
    for given in CASES[case](options):
        yield {"doing": given.what}
        rows = [given] if isinstance(given, Row) else bench_contest.run(case, given, options)
        for row in rows:
            yield {"row": asdict(replace(row, threads=options.threads))}


def main(task: dict[str, Any]) -> int:
    """Run one case and write its messages; returns the exit code."""
    options = Options(**task["options"])

    def said() -> Iterator[dict[str, Any]]:
        if options.kept:
            keep_freed_memory()
        with threads_and_kernels(options):
            yield from messages(task["case"], options)

    return speak(said())


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
