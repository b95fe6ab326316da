"""What the bench leaves: a table per case, `bench.json` and `bench.png`.

bench.json: {"certificate": {...}, "ceilings": {...}, "rows": [...]}; a row holds the fields of
`bench_core.Row` and, where operations were counted, its fraction of the machine's FMA peak.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from md_plugin.bench_core import HIPPYNN, OURS, Row

COLUMNS = ("what", "provider", "ms (20-80 %)", "µs/atom", "ratio", "GFLOP/s", "of peak", "error")


def table(case: str, rows: list[Row], title: str, peak: float) -> Any:
    """A rich table of the rows of one case; `peak` is that of the FMA units, GFLOP/s."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    built = Table(title=f"{case}: {title}", box=SIMPLE)
    used = [_cells(row, peak)[1:] for row in rows]
    # A column that is empty in every row says nothing.
    shown = [k for k, _ in enumerate(COLUMNS[1:]) if k < 2 or any(cells[k] for cells in used)]
    for k in shown:
        built.add_column(COLUMNS[k + 1], justify="left" if k == 0 else "right", no_wrap=k > 1)
    before = ""
    for row, cells in zip(rows, used, strict=True):
        if row.what != before:
            built.add_row(f"[bold]{escape(row.what)}[/bold]")
        before = row.what
        built.add_row(*(f"{'  ' * (k == 0)}{escape(cells[k])}" for k in shown))
    return built


def _cells(row: Row, peak: float) -> list[str]:
    time = row.status if row.seconds is None else _milliseconds(row)
    fraction = row.gflops / peak if row.gflops and peak else None
    return [
        row.what,
        row.provider,
        time,
        "" if row.us_per_atom is None else f"{row.us_per_atom:.3g}",
        "" if row.ratio is None else f"{row.ratio:.3g}x",
        "" if row.gflops is None else f"{row.gflops:.1f}",
        "" if fraction is None else f"{100 * fraction:.0f} %",
        "" if row.error is None else f"{row.error:.0e}",
    ]


def _milliseconds(row: Row) -> str:
    assert row.seconds is not None and row.low is not None and row.high is not None
    return f"{1e3 * row.seconds:.3g} ({1e3 * row.low:.3g}-{1e3 * row.high:.3g})"


def memory_lines(rows: list[Row]) -> list[str]:
    """Sentences on memory, from the notes of the rows of `scale`."""
    key = "bytes per atom beyond the list"
    return [
        f"{row.what}: {row.notes[key]} B/atom beyond the list of "
        f"{row.notes['bytes per atom of the list']} B/atom; path: {row.notes['path']}"
        for row in rows
        if row.notes.get(key) is not None
    ]


def markdown(rows: list[Row], peak: float) -> str:
    """The rows as one table of a page."""
    lines = ["| case | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    lines += ["| " + " | ".join([row.case, *_cells(row, peak)]) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(folder: Path, document: dict[str, Any], rows: list[Row]) -> list[Path]:
    """bench.json, bench.md and bench.png; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    peak = document["ceilings"]["fma_gflops"]
    full = [asdict(row) | {"fraction_of_fma": row.gflops and row.gflops / peak} for row in rows]
    paths = [folder / f"bench.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(document | {"rows": full}, indent=1) + "\n")
    paths[1].write_text(markdown(rows, peak))
    plot(rows, paths[2], document["certificate"])
    return paths


def plot(rows: list[Row], path: Path, certificate: dict[str, Any]) -> None:
    """Bars of the ratios of ours to hippynn; with hippynn absent, of microseconds per atom."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ratios = [row for row in rows if row.side == OURS and row.ratio is not None]
    shown = ratios or [row for row in rows if row.us_per_atom is not None]
    shown = [row for row in shown if not row.provider.endswith(("(again)", "reference"))]
    figure = Figure(figsize=(9, 0.3 * len(shown) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{row.what}  [{row.provider}]" for row in shown]
    values = [float((row.ratio if ratios else row.us_per_atom) or 0.0) for row in shown]
    cases = sorted({row.case for row in shown})
    bars = axes.barh(range(len(shown)), values, color=[f"C{cases.index(r.case)}" for r in shown])
    axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    threads = certificate["threads"]
    label = f"times faster than {HIPPYNN} (same weights, same run, {threads} thread(s))"
    axes.set(xlabel=label if ratios else "µs per atom")
    if values and min(values) > 0:
        axes.set_xscale("log")
        axes.set_xlim(0.6 * min(*values, 1.0), 2.0 * max(*values, 1.0))  # room for the numbers
    if ratios:
        axes.axvline(1.0, color="k", lw=1)
    axes.set_title(f"{certificate['cpu']['model']}, {certificate['date'][:10]}", fontsize=8)
    figure.savefig(path, dpi=150)
