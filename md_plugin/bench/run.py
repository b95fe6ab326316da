"""Bench: this project beside hippynn, same weights, same structures, same run. `md-plugin bench`.

`cases` names the cases; each runs in a process of its own (`process`), once for each
wanted number of threads. Every provider is checked against float64 on fresh random inputs before
anything is timed; rounds are interleaved (`contest`); medians with 20 and 80 % quantiles; the
machine's ceilings are measured in the same run (`machine`). Speed is claimed as a ratio
within one run only: machines differ and are shared. Where hippynn is not installed the rows of ours
stand alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from md_plugin.bench import core, machine, report
from md_plugin.bench.cases import CASES, CEILINGS, DEFAULT, PRECISION
from md_plugin.bench.core import Options, Row
from md_plugin.bench.process import CaseError, run_case

WIDTH = 110  # of tables in files and pipes
Ceilings = dict[int, dict[str, float]]  # threads -> name -> value


def run_bench(
    cases: Sequence[str] = (),
    options: Options | None = None,
    output: Path | None = None,
    threads: Sequence[int] = (),
) -> list[Row]:
    """Measure, print a table per case, and write JSON, markdown and PNG where a folder is given.

    Args:
        cases: names of `CASES`; none: `DEFAULT`.
        options: sizes, rounds, seed.
        output: folder for `bench.json`, `bench.md` and `bench.png`.
        threads: numbers of threads, one process of each case for each; none: that of options.

    Raises:
        ValueError: a case that does not exist, or options without sense.
        CaseError: processes failed; after everything else was measured, printed and written.
    """
    from rich.console import Console

    options, console = options or Options(), Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    counts = list(dict.fromkeys(threads)) or [options.threads]
    names = _checked(list(cases) or list(DEFAULT), options, counts)
    run = _Run(console, [replace(options, threads=count) for count in counts])
    ceilings = run.ceilings()
    missing = core.peer_absence()
    if missing:
        console.print(f"hippynn is {missing}", highlight=False, soft_wrap=True, markup=False)
    rows = [row for name in names for row in run.case(name, ceilings)]
    if output is not None:
        document = {
            "certificate": machine.certificate(options, names, counts),
            "ceilings": ceilings,
        }
        written = report.write(output, document, rows)
        console.print("wrote " + ", ".join(map(str, written)), soft_wrap=True, highlight=False)
    if run.failures:
        raise CaseError("; ".join(run.failures))
    return rows


class _Run:
    """The processes of one run, and what it prints.

    Args:
        console: of rich.
        settings: options of each number of threads.
    """

    def __init__(self, console: Any, settings: list[Options]):
        self.console, self.settings = console, settings
        self.failures: list[str] = []

    def ceilings(self) -> Ceilings:
        """Of this machine; a process that fails ends the run: without them nothing is known."""
        found: Ceilings = {}
        with self.console.status("ceilings of this machine"):
            for options in self.settings:
                heard: list[dict[str, Any]] = []
                run_case(CEILINGS, options, heard.append)
                found[options.threads] = heard[0][CEILINGS]
        for threads, values in found.items():
            words = "  ".join(f"{name} {value:.1f}" for name, value in values.items())
            self.console.print(f"{words}  threads {threads}")
        return found

    def case(self, name: str, ceilings: Ceilings) -> list[Row]:
        """Rows of one case on all numbers of threads; prints their table."""
        rows: list[Row] = []
        with self.console.status(name) as status:
            for options in self.settings:

                def heard(message: dict[str, Any], threads: int = options.threads) -> None:
                    if "doing" in message:
                        status.update(f"{name}, {threads} thread(s): {message['doing']}")
                    if "row" in message:
                        rows.append(Row(**message["row"]))

                try:
                    run_case(name, options, heard)
                except CaseError as problem:
                    self.failures.append(str(problem))
                    self.console.print(f"failed: {problem}", style="red", markup=False)
        title = f"{PRECISION.get(name, 'float32')}, {self.settings[0].rounds} rounds"
        self.console.print(report.table(name, rows, title, report.peaks(ceilings)))
        for line in report.sentences(rows):
            self.console.print(line, highlight=False, markup=False)
        return rows


def thread_counts(text: str) -> tuple[int, ...]:
    """Numbers of threads of "2", "1,2" or "1,all"; 0 and "all" are all cores.

    Raises:
        ValueError: something else, or more threads than cores.
    """
    cores = machine.cores()
    counts = []
    for word in text.split(","):
        word = word.strip()
        if word != "all" and not (word.isascii() and word.isdigit()):
            raise ValueError(f"--threads {text}: numbers, or all, with commas between; as in 1,all")
        count = cores if word == "all" else int(word) or cores
        if count > cores:
            raise ValueError(f"--threads {text}: there are {cores} cores")
        counts.append(count)
    return tuple(dict.fromkeys(counts))


def _checked(names: list[str], options: Options, counts: list[int]) -> list[str]:
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"unknown case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    if min(options.atoms, options.rounds, *counts) < 1:
        raise ValueError("--atoms, --rounds and --threads must be at least 1")
    return list(dict.fromkeys(names))
