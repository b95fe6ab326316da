"""What the bench leaves: a table per case, `bench.json` and `bench.png`.

bench.json: {"certificate": {...}, "ceilings": {threads: {...}}, "rows": [...]}; a row holds the
fields of `core.Row` and, where operations were counted, its fraction of the FMA peak of as
many cores as it has threads.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from md_plugin.bench.contest import AGAIN
from md_plugin.bench.core import HIPPYNN, OURS, Row
from md_plugin.bench.counts import BYTES, CALLS, OPERATORS

COLUMNS = (
    *("what", "provider", "threads", "ms (20-80 %)", "µs/atom", "ratio", "kB/atom"),
    *("GFLOP/s", "of peak", "error"),
)
Peaks = dict[int, float]  # threads -> GFLOP/s


def peaks(ceilings: dict[int, dict[str, float]]) -> Peaks:
    """That of the FMA units of as many cores as there are threads, GFLOP/s."""
    return {threads: threads * found["fma_gflops"] for threads, found in ceilings.items()}


def table(case: str, rows: list[Row], title: str, peaks: Peaks) -> Any:
    """A rich table of the rows of one case."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    built = Table(title=f"{case}: {title}", box=SIMPLE)
    used = [_cells(row, peaks)[1:] for row in rows]
    if len({row.threads for row in rows}) < 2:
        built.title = f"{built.title}, threads {rows[0].threads}" if rows else built.title
        used = [[cells[0], "", *cells[2:]] for cells in used]
    # A column that is empty in every row says nothing.
    shown = [k for k, _ in enumerate(COLUMNS[1:]) if k == 0 or any(cells[k] for cells in used)]
    for k in shown:
        built.add_column(COLUMNS[k + 1], justify="left" if k == 0 else "right", no_wrap=k != 2)
    before = ""
    for row, cells in zip(rows, used, strict=True):
        if row.what != before:
            built.add_row(f"[bold]{escape(row.what)}[/bold]")
        before = row.what
        built.add_row(*(f"{'  ' * (k == 0)}{escape(cells[k])}" for k in shown))
    return built


def _cells(row: Row, peaks: Peaks) -> list[str]:
    fraction = _fraction(row, peaks)
    time = "" if row.status == "ok" else row.status
    return [
        row.what,
        row.provider,
        str(row.threads),
        time if row.seconds is None else _milliseconds(row),
        "" if row.us_per_atom is None else f"{row.us_per_atom:.3g}",
        "" if row.ratio is None else f"{row.ratio:.3g}x",
        "" if row.bytes_per_atom is None else f"{1e-3 * row.bytes_per_atom:.3g}",
        "" if row.gflops is None else f"{row.gflops:.1f}",
        "" if fraction is None else f"{100 * fraction:.0f} %",
        "" if row.error is None else f"{row.error:.0e}",
    ]


def _milliseconds(row: Row) -> str:
    assert row.seconds is not None and row.low is not None and row.high is not None
    return f"{1e3 * row.seconds:.3g} ({1e3 * row.low:.3g}-{1e3 * row.high:.3g})"


def _fraction(row: Row, peaks: Peaks) -> float | None:
    peak = peaks.get(row.threads)
    return row.gflops / peak if row.gflops and peak else None


def sentences(rows: list[Row]) -> list[str]:
    """What belongs under the table of a case: counts of a call, lists, ranks; a line for each."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        notes, what = row.notes, f"{row.what}, threads {row.threads}"
        if "per call" in notes and not row.provider.endswith(AGAIN):
            n = notes["per call"]
            head = f"{what}: {OPERATORS}, kB/atom of their results, {CALLS}"
            said = f"{row.provider} {n[OPERATORS]}, {1e-3 * n[BYTES]:.3g}, {n[CALLS]}"
            lines.setdefault(head, []).append(said)
        if "bytes per atom of the list" in notes:
            listed = 1e-3 * notes["bytes per atom of the list"]
            lines[what] = [f"list {listed:.3g} kB/atom", f"path: {notes['path']}"]
        if "parallel efficiency" in notes:
            said = f"{row.provider} {100 * notes['parallel efficiency']:.0f} %"
            lines.setdefault(f"{row.what}: parallel efficiency", []).append(said)
    return [f"{head}: {'; '.join(said)}" for head, said in lines.items()]


def markdown(rows: list[Row], peaks: Peaks) -> str:
    """The rows as one table of a page, and what belongs under it."""
    lines = ["| case | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    lines += ["| " + " | ".join([row.case, *_cells(row, peaks)]) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in sentences(rows))]) + "\n"


def write(folder: Path, document: dict[str, Any], rows: list[Row]) -> list[Path]:
    """bench.json, bench.md and bench.png; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    known = peaks(document["ceilings"])
    full = [asdict(row) | {"fraction_of_fma": _fraction(row, known)} for row in rows]
    paths = [folder / f"bench.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(document | {"rows": full}, indent=1) + "\n")
    paths[1].write_text(markdown(rows, known))
    plot(rows, paths[2], document["certificate"])
    return paths


def plot(rows: list[Row], path: Path, certificate: dict[str, Any]) -> None:
    """Bars of the ratios of ours to hippynn; with hippynn absent, of microseconds per atom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ratios = [row for row in rows if row.side == OURS and row.ratio is not None]
    shown = ratios or [row for row in rows if row.us_per_atom is not None]
    shown = [row for row in shown if not row.provider.endswith((AGAIN, "reference"))]
    figure = Figure(figsize=(9, 0.3 * len(shown) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    several = len(certificate["threads"]) > 1
    names = [f"{row.what}  [{row.provider}{f', threads {row.threads}' * several}]" for row in shown]
    values = [float((row.ratio if ratios else row.us_per_atom) or 0.0) for row in shown]
    cases = sorted({row.case for row in shown})
    bars = axes.barh(range(len(shown)), values, color=[f"C{cases.index(r.case)}" for r in shown])
    axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    threads = " and ".join(map(str, certificate["threads"]))
    label = f"times faster than {HIPPYNN} (same weights, same run, {threads} thread(s))"
    axes.set(xlabel=label if ratios else "µs per atom")
    if values and min(values) > 0:
        axes.set_xscale("log")
        axes.set_xlim(0.6 * min(*values, 1.0), 2.0 * max(*values, 1.0))  # room for the numbers
    if ratios:
        axes.axvline(1.0, color="k", lw=1)
    axes.set_title(f"{certificate['cpu']['model']}, {certificate['date'][:10]}", fontsize=8)
    figure.savefig(path, dpi=150)
