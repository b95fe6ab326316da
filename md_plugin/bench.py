"""Bench: this project beside hippynn, same weights, same structures, same run. `md-plugin bench`.

Each case is a function that gives contests (`bench_core`), one after the other; `CASES` names them.
Every provider is checked against float64 on fresh random inputs before anything is timed; rounds
are interleaved; medians with 20 and 80 % quantiles; the machine's ceilings are measured in the same
run (`bench_machine`). Speed is claimed as a ratio within one run only: machines differ and are
shared. Where hippynn is not installed the rows of ours stand alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from md_plugin import (
    bench_core,
    bench_kernels,
    bench_lammps,
    bench_machine,
    bench_models,
    bench_report,
    bench_scale,
)
from md_plugin.bench_core import Contest, Options, Row
from md_plugin.bench_systems import threads_and_kernels

CASES: dict[str, Callable[[Options], Iterator[Contest | Row]]] = {
    "sums": bench_kernels.sums,
    "layer": bench_kernels.layer,
    "model": bench_models.model,
    "train": bench_models.train,
    "ase": bench_models.ase,
    "lammps": bench_lammps.lammps,
    "silver": bench_models.silver_case,
    "scale": bench_scale.scale,
    "others": bench_lammps.others,
}
WIDTH = 110  # of tables in files and pipes
# The sums last: what runs after them in the same process is slower, for a reason not yet known.
DEFAULT = ("layer", "model", "ase", "lammps", "sums")


def list_cases() -> list[str]:
    """Each case and the first line of what it says about itself."""
    lines = []
    for name, case in CASES.items():
        first = (case.__doc__ or "").strip().splitlines()[0]
        lines.append(f"{name:8s}{'*' if name in DEFAULT else ' '} {first}")
    return [*lines, "* runs where no case is named"]


def run_bench(
    cases: Sequence[str] = (), options: Options | None = None, output: Path | None = None
) -> list[Row]:
    """Measure, print a table per case, and write JSON, markdown and PNG where a folder is given.

    Args:
        cases: names of `CASES`; none: `DEFAULT`.
        options: sizes, rounds, threads.
        output: folder for `bench.json`, `bench.md` and `bench.png`.

    Raises:
        ValueError: a case that does not exist, or options without sense.
    """
    from rich.console import Console

    options, console = options or Options(), Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    names = _checked(list(cases) or list(DEFAULT), options)
    rows: list[Row] = []
    with threads_and_kernels(options):
        with console.status("ceilings of this machine"):
            ceilings = bench_machine.ceilings(options)
        console.print("  ".join(f"{name} {value:.1f}" for name, value in ceilings.items()))
        missing = bench_core.peer_absence()
        if missing:
            console.print(f"hippynn is {missing}", highlight=False, soft_wrap=True, markup=False)
        title = f"float32, {options.threads} thread(s), {options.rounds} rounds"
        for name in names:
            found = _run_case(name, options, console)
            console.print(bench_report.table(name, found, title, ceilings["fma_gflops"]))
            for line in bench_report.memory_lines(found):
                console.print(line, highlight=False)
            rows += found
    if output is not None:
        document = {
            "certificate": bench_machine.certificate(options, names),
            "ceilings": ceilings,
        }
        written = bench_report.write(output, document, rows)
        console.print("wrote " + ", ".join(map(str, written)), soft_wrap=True, highlight=False)
    return rows


def _run_case(name: str, options: Options, console: Any) -> list[Row]:
    rows: list[Row] = []
    with console.status(name) as status:
        for given in CASES[name](options):
            status.update(f"{name}: {given.what}")
            rows += [given] if isinstance(given, Row) else bench_core.run(name, given, options)
    return rows


def _checked(names: list[str], options: Options) -> list[str]:
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"unknown case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    if min(options.atoms, options.rounds, options.threads) < 1:
        raise ValueError("--atoms, --rounds and --threads must be at least 1")
    return list(dict.fromkeys(names))
