"""The cases of the bench, and the process that runs one of them.

    python -m md_plugin.bench.cases '{"case": NAME, "options": {...}}'

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

from md_plugin.bench import contest, kernels, lammps, machine, memory, models, nanodft, ranks, scale
from md_plugin.bench.core import Contest, Options, Row
from md_plugin.bench.process import speak
from md_plugin.bench.systems import threads_and_kernels
from md_plugin.memory import keep_freed_memory

CASES: dict[str, Callable[[Options], Iterator[Contest | Row]]] = {
    "sums": kernels.sums,
    "layer": kernels.layer,
    "model": models.model,
    "train": models.train,
    "ase": models.ase,
    "lammps": lammps.lammps,
    "memory": memory.memory,
    "silver": models.silver_case,
    "scale": scale.scale,
    "ranks": ranks.ranks,
    "others": lammps.others,
    "nanodft": nanodft.nanodft,
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
        yield {CEILINGS: machine.ceilings(options)}
        return
    for given in CASES[case](options):
        yield {"doing": given.what}
        rows = [given] if isinstance(given, Row) else contest.run(case, given, options)
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
