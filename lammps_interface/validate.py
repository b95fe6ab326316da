"""`md-plugin validate MODEL`: does this LAMMPS compute what Python computes?

Runs the structures of `validate_cases` in LAMMPS (`validate_lammps`) and prints a table. Each row
holds the largest differences of one structure at one of two times, step 0 and step 20, relative to
the scales that `validate_cases` states.

Exit codes: 0 all rows pass; 1 some do not; 2 the check could not be made (bad model, no LAMMPS, or
one that lacks the packages), raised as ValueError or LammpsRunError with the remedy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from lammps_interface import validate_cases as cases
from lammps_interface.validate_lammps import Failure, Row, Settings, Validation

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

REASON = {
    "float64": "sums in another order, over a few layers, lose some of the 16 digits of float64; "
    "a missing pair, ghost or exchange shows above 1e-6.",
    "mixed": "the network computes in float32, and sums over neighbours and layers lose one or "
    "two of its 7 digits; --dtype float64 looks closer.",
    "float32": "sums over neighbours and layers lose one or two of the 7 digits of float32; "
    "--dtype float64 looks closer.",
    "fast": "sums over neighbours multiply numbers of 3 to 4 digits; --dtype float64 looks closer.",
}


def run_validate(model: str, settings: Settings, keep: Path | None = None) -> int:
    """Compares, prints the table, and returns the exit code.

    Args:
        model: `.hipnn` file, bundled name, or exported `.pt`.
        settings: which LAMMPS, and how.
        keep: folder that keeps scripts, data and outputs; None removes them.

    Raises:
        ValueError, LammpsRunError: see `Validation`.
    """
    from rich.console import Console

    console = Console()
    with tempfile.TemporaryDirectory(prefix="md_plugin_") as scratch:
        folder = Path(scratch) if keep is None else keep
        folder.mkdir(parents=True, exist_ok=True)
        check = Validation(model, settings, folder.resolve())
        _say(console, _heading(check))
        rows: list[Row] = []
        failures: list[Failure] = []
        todo = cases.make_cases(check.potential, settings.ranks)
        for case in todo:
            with console.status(case.name):
                found, failure = check.compare(case)
            rows += found
            failures += [failure] if failure else []
            if failure and "did not end" in failure.verdict:
                break  # the next would most likely wait as long
    console.print(_table(check, rows))
    _say(console, _closing(check, rows, failures, 2 * len(todo)))
    if keep is not None:
        _say(console, f"scripts, data and output: {keep}")
    return 0 if len(rows) == 2 * len(todo) and all(row.passed for row in rows) else 1


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _heading(check: Validation) -> str:
    program, suffix = check.program, check.suffix
    how = "without suffix" if suffix == "none" else f"-sf {suffix}"
    ranks = check.settings.ranks
    on = "1 rank" if ranks == 1 else f"{ranks} ranks of {check.command[0]}"
    return f"LAMMPS {program.text}: {program.path}\n{how}, {on}, {program.mpi}\n{check.shown}"


def _table(check: Validation, rows: Sequence[Row]) -> Table:
    from rich.table import Table

    title = "largest relative difference, LAMMPS against Python"
    table = Table(box=None, title=title, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nstructure", no_wrap=True)
    table.add_column("\nstep", justify="right", no_wrap=True)
    for name in cases.QUANTITIES:
        heading = name.replace("atom ", "atom\n") if " " in name else f"\n{name}"
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        found = row.differences
        cells = ["-"] * len(cases.QUANTITIES)
        if found is not None:
            cells = [f"{found[k]:.0e}" if k in found else "-" for k in cases.QUANTITIES]
        verdict = "PASS" if row.passed else "[bold red]FAIL[/]"
        table.add_row(row.name, str(row.step), *cells, verdict)
    return table


def _closing(
    check: Validation, rows: Sequence[Row], failures: Sequence[Failure], n_rows: int
) -> str:
    n_passed = sum(row.passed for row in rows)
    reason = f"tolerance {check.tolerance:g} ({check.dtype}): {REASON[check.dtype]}"
    lines = [fill(reason, 90)]
    last = ""
    for failure in failures:
        lines.append(f"{failure.name}: {failure.verdict}")
        if failure.words and failure.words != last:
            lines += ["  what it said last:", *("  | " + w for w in failure.words.splitlines())]
        last = failure.words
    if len(rows) < n_rows:
        lines.append(f"{n_rows - len(rows)} rows were not run")
    good = n_passed == n_rows
    lines.append(f"{'PASS' if good else 'FAIL'}: {n_passed} of {n_rows} rows pass")
    return "\n".join(lines)
