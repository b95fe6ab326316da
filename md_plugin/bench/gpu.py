"""`md-plugin bench gpu`: what a GPU does with this project, beside hippynn on its Triton kernels.

One command measures everything, and needs torch, triton, numpy, numba and safetensors only; where
hippynn is absent its rows say so, and where matplotlib is, there is no plot. Ceilings of the card
come first, then each case of `gpu_cases` in a process of its own: a case that ends early, or takes
longer than its limit, leaves the others. Files are written after each row, the plot after each
case; `seconds` says how long the cases took:

    bench.json      {"certificate", "card", "ceilings", "seconds": {case: ...}, "rows": [...]}
    bench.md        ceilings and rows as tables
    bench.png       ratios to hippynn, or microseconds per atom

"of floor" is the least time that the card needs (`gpu_systems.floor`), over the median.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from md_plugin.bench import machine, report
from md_plugin.bench.core import Options, Row, peer_absence
from md_plugin.bench.gpu_cases import CASES, CEILINGS
from md_plugin.bench.gpu_contest import FIRST
from md_plugin.bench.gpu_systems import floor
from md_plugin.bench.process import CaseError, run_case
from md_plugin.devices import choose_device

COLUMNS = (
    *("what", "provider", "atoms", "ms (20-80 %)", "atom-steps/s", "ratio", "of floor"),
    *("kB/atom", "first, s", "error", "remarks"),
)
REMARKS = ("searches of the list", "steps", "did not fit", "not tried")
MODULE = "md_plugin.bench.gpu_cases"
LIMIT = 300.0  # s, of a case


def device_options(device: str, *, rounds: int | None, quick: bool, kept: bool) -> Options:
    """Options of a run on that device.

    Raises:
        ValueError: there is no such GPU, and Triton is not interpreted either.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and (device == "cpu" or not torch.cuda.is_available()):
        device = "cpu"
    chosen = choose_device(device)
    if chosen.type != "cuda" and not interpreted:
        raise ValueError(
            f"bench gpu measures a GPU, not {chosen}: give --device cuda; TRITON_INTERPRET=1 runs "
            "tiny sizes on a CPU, to see that everything works"
        )
    rounds = rounds if rounds is not None else 2 if quick else 5
    if rounds < 1:
        raise ValueError("--rounds must be at least 1")
    # With its number: tensors have one, and torch.cuda.set_device takes no other.
    place = f"cuda:{chosen.index or 0}" if chosen.type == "cuda" else "cpu"
    return Options(rounds=rounds, quick=quick, kept=kept, device=place)


def run_device_bench(
    options: Options,
    output: Path | None = None,
    cases: tuple[str, ...] = (),
    limit: float = LIMIT,
) -> list[Row]:
    """Measure, print tables, and write files after each row where a folder is given.

    Args:
        options: of `device_options`.
        output: folder of `bench.json`, `bench.md` and `bench.png`.
        cases: some of `CASES`, in this order; none: all, `memory` not with `quick`.
        limit: seconds after which a case is ended.

    Raises:
        ValueError: there is no such case.
        CaseError: processes failed; after everything else was measured, printed and written.
    """
    if unknown := [name for name in cases if name not in CASES]:
        raise ValueError(f"bench gpu has no case {', '.join(unknown)}; it has {', '.join(CASES)}")
    names = cases or tuple(name for name in CASES if not (name == "memory" and options.quick))
    document: dict[str, Any] = {
        "certificate": certificate(options, names),
        "card": {},
        CEILINGS: {},
        "seconds": {},
    }
    rows: list[Row] = []
    failures: list[str] = []
    missing = peer_absence()
    if missing:
        _say(f"hippynn is {missing}\n")
    for name in (CEILINGS, *names):
        before, start = len(rows), time.monotonic()
        try:
            run_case(name, options, partial(_hear, document, rows, output), MODULE, limit)
        except CaseError as problem:
            failures.append(str(problem))
            _say(f"failed: {problem}\n")
        document["seconds"][name] = round(time.monotonic() - start, 1)
        known = document[CEILINGS]
        _say(ceilings_table(document) if name == CEILINGS else table(rows[before:], known))
        _say(f"{name}: {document['seconds'][name]:.0f} s\n")
        if output is not None:
            written = write(output, document, rows)
    if output is not None:
        _say(f"wrote {', '.join(map(str, written))}\n")
    if failures:
        raise CaseError("; ".join(failures))
    return rows


def _hear(
    document: dict[str, Any], rows: list[Row], output: Path | None, message: dict[str, Any]
) -> None:
    """What a case says goes to the disk at once: this process may be cut off at any time."""
    document.update({k: message[k] for k in (CEILINGS, "card") if k in message})
    if "row" in message:
        rows.append(Row(**message["row"]))
    if output is not None:
        write(output, document, rows, plotted=False)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def certificate(options: Options, cases: tuple[str, ...]) -> dict[str, Any]:
    """Where, when and with what the rows are made; the card is known to its own process."""
    found = machine.certificate(options, list(cases), [options.threads])
    del found["atoms"]
    return found | {
        "device": options.device,
        "dtype": "mixed: geometry and sums of energies in float64, network in float32",
        "clock": "CUDA events" if options.device.startswith("cuda") else "process time",
        "protocol": "a process for each case; checked against float64 first; interleaved rounds, "
        "turns of 20 ms at least; medians, 20/80 % quantiles",
    }


def of_floor(row: Row, ceilings: dict[str, float]) -> float | None:
    """The least time over the median; None where one of them is not known."""
    counted, n = row.notes.get("floor"), row.notes.get("atoms")
    if not (counted and n and ceilings and row.seconds):
        return None
    half, passes = bool(row.notes.get("half")), row.notes["passes"]
    least: float = n * floor(counted, ceilings, half=half, passes=passes)
    return least / row.seconds


def _cells(row: Row, ceilings: dict[str, float]) -> list[str]:
    notes, fraction = row.notes, of_floor(row, ceilings)
    n, first = notes.get("atoms"), notes.get(FIRST)
    remarks = [f"{k}: {notes[k]}" for k in REMARKS if k in notes]
    status = [] if row.status == "ok" else [row.status]
    time = None
    if row.seconds is not None and row.low is not None and row.high is not None:
        time = f"{1e3 * row.seconds:.3g} ({1e3 * row.low:.3g}-{1e3 * row.high:.3g})"
    speed = f"{n / row.seconds:.3g}" if n and row.seconds else ""
    return [
        row.what,
        row.provider,
        str(n or ""),
        time or "",
        speed,
        "" if row.ratio is None else f"{row.ratio:.3g}x",
        "" if fraction is None else f"{100 * fraction:.0f} %",
        "" if row.bytes_per_atom is None else f"{1e-3 * row.bytes_per_atom:.3g}",
        "" if first is None else f"{first:.2g}",
        "" if row.error is None else f"{row.error:.0e}",
        ", ".join([*status, *remarks]).replace("|", "/"),
    ]


def table(rows: list[Row], ceilings: dict[str, float]) -> str:
    """Rows as a table of a page; columns that are empty in every row are left out."""
    cells = [_cells(row, ceilings) for row in rows]
    shown = [k for k in range(len(COLUMNS)) if k < 2 or any(row[k] for row in cells)]
    lines = [[COLUMNS[k] for k in shown], ["---"] * len(shown)]
    lines += [[row[k] for k in shown] for row in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ceilings_table(document: dict[str, Any]) -> str:
    """Name of the card, and its ceilings, as a table of a page."""
    card, found = document["card"], document[CEILINGS]
    lines = [", ".join(f"{k} {v}" for k, v in card.items()), "", "| ceiling | |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4g} |" for name, value in found.items()]
    return "\n".join(lines) + "\n"


def write(
    folder: Path, document: dict[str, Any], rows: list[Row], plotted: bool = True
) -> list[Path]:
    """bench.json, bench.md and, where wanted and matplotlib is, bench.png; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    known = document[CEILINGS]
    full = [asdict(row) | {"of_floor": of_floor(row, known)} for row in rows]
    paths = [folder / "bench.json", folder / "bench.md"]
    _replace(paths[0], json.dumps(document | {"rows": full}, indent=1) + "\n")
    _replace(paths[1], ceilings_table(document) + "\n" + table(rows, known))
    shown = [row for row in rows if row.seconds is not None]
    if plotted and shown and find_spec("matplotlib"):
        paths.append(folder / "bench.png")
        card = {"model": document["card"].get("name", document["certificate"]["device"])}
        report.plot(shown, paths[2], document["certificate"] | {"cpu": card})
    return paths


def _replace(path: Path, text: str) -> None:
    """At once or not at all: the run may be cut off while it writes."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)
