"""The page of scaling: what the case `ranks` measured, the cost model fitted to it, predictions.

    compute    T - exchange = T_0 + t_atom n + t_ghost g          of each network
    exchange   X (latency swaps) + bytes / bandwidth              of all networks together

are fitted to rows of one rank and of two in weak scaling; other rows are held out and predicted.
The exchange of a row is that of the rank that waits least. Those for GPUs (`predictions`) take
times and bandwidths that nobody has measured here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from md_plugin import scaling
from md_plugin.bench import predictions
from md_plugin.scaling import Fit, Machine, Workload

RECOMPUTE_ATOMS = (1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True, eq=False)
class Measured:
    """A row of the case `ranks`, as the cost model sees it.

    Attributes:
        what: the row in words.
        seconds: of a step.
        notes: see `ranks`.
    """

    what: str
    seconds: float
    notes: dict[str, Any]

    @property
    def ranks(self) -> int:
        """MPI ranks."""
        return int(self.notes["ranks"])

    @property
    def crowd(self) -> float:
        """Ranks that share a core."""
        return max(1.0, self.ranks / float(self.notes["cores"]))

    @property
    def fitted(self) -> bool:
        """Whether the model is fitted to it."""
        two = self.ranks == 2 and self.notes["kind"] == "weak"
        return self.crowd == 1.0 and (self.ranks == 1 or two)

    @property
    def exchange(self) -> float:
        """Seconds in exchanges of the rank that waits least."""
        return float(min(self.notes["exchange, s"]))

    @property
    def ghosts(self) -> float:
        """Of a rank, as LAMMPS counts them; the mean of all ranks."""
        return float(np.mean(self.notes["ghosts"]))

    @property
    def local(self) -> float:
        """Atoms of a rank."""
        return float(np.mean(self.notes["local"]))

    @property
    def bytes(self) -> float:
        """Of features that all ranks have exchanged in a step, both directions."""
        return float(sum(map(sum, self.notes["bytes per step"].values())))

    @cached_property
    def work(self) -> Workload:
        """The network."""
        n = self.notes
        return Workload(n["model"], n["layers"], n["width"], n["rcut"], n["skin"], n["density"])


def load(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """The document that `md-plugin bench ranks` has written, and its rows.

    Raises:
        ValueError: it has no rows of that case.
    """
    document = json.loads(path.read_text())
    rows = [
        Measured(f"{row['what']}, {row['notes']['ranks']} ranks", row["seconds"], row["notes"])
        for row in document["rows"]
        if row["case"] == "ranks" and row["status"] == "ok"
    ]
    if not rows:
        raise ValueError(f"{path} has no row of the case ranks: md-plugin bench ranks -o FOLDER")
    return document, rows


def fit(rows: list[Measured]) -> dict[str, Fit]:
    """Costs by network: floor, atom, ghost (s); and "exchange": latency (s), 1 / bandwidth (s/B).

    Raises:
        ValueError: too few rows.
    """
    used = [row for row in rows if row.fitted]
    found = {}
    for model in dict.fromkeys(row.work.name for row in used):
        mine = [row for row in used if row.work.name == model]
        costs = [(1.0, row.local, row.ghosts) for row in mine]
        found[model] = scaling.least_squares(costs, [r.seconds - r.exchange for r in mine])
    sent = [row for row in used if row.ranks > 1 and row.work.exchanges]
    columns: list[tuple[float, ...]] = []
    for row in sent:
        messages = row.work.exchanges * scaling.swaps(row.notes["sides"], row.work.halo)
        columns.append((messages, row.bytes / row.ranks))
    found["exchange"] = scaling.least_squares(columns, [row.exchange for row in sent])
    return found


def machine(fits: dict[str, Fit], model: str) -> Machine:
    """One rank of this computer."""
    floor, atom, ghost = fits[model].values
    latency, per_byte = fits["exchange"].values
    return Machine(floor, atom, latency, 1 / per_byte if per_byte else float("inf"), ghost)


def write(source: Path, folder: Path) -> list[Path]:
    """scaling.json, scaling.md and scaling.png; returns the paths.

    Args:
        source: bench.json with the case ranks, or an earlier scaling.json.
        folder: where to write.

    Raises:
        ValueError: see `load` and `fit`.
    """
    document, rows = load(source)
    fits = fit(rows)
    predicted = predictions.predictions()
    document |= {
        "fit": {name: asdict(found) for name, found in fits.items()},
        "predictions": [asdict(row) for row in predicted],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scaling.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(document, indent=1) + "\n")
    paths[1].write_text(page(document["certificate"], rows, fits, predicted))
    plot(rows, fits, paths[2], document["certificate"])
    return paths


def page(
    certificate: dict[str, Any],
    rows: list[Measured],
    fits: dict[str, Fit],
    predicted: list[predictions.Prediction],
) -> str:
    """All tables, in markdown."""
    cpu, date, commit = (certificate[key] for key in ("cpu", "date", "commit"))
    cores = rows[0].notes["cores"]
    head = f"{date[:10]}, {cpu['model']}, {cores} cores, commit {commit or 'unknown'}"
    parts = [
        "# Scaling: tables",
        f"Made by `md-plugin scaling`. {head}. What the columns mean: [scaling.md](../scaling.md).",
        "## Measured, and the cost model",
        _table(
            *("run", "ranks", "local", "ghosts", "model", "MB of features", "in exchange, ms"),
            *("step, ms", "model", "ratio", "efficiency", "process, MB"),
            rows=list(_measured(rows, fits)),
        ),
        "## The fit",
        _table("what", "value", "standard error", "unit", rows=list(_fitted(fits))),
        "## Ghosts with an exchange, and without one",
        _table(
            *("network", "atoms a rank", "ghosts", "ghosts without", "work without"),
            rows=list(_recomputed(rows)),
        ),
        "## Predicted for GPUs, from assumptions",
        predictions.ASSUMED,
        _table(*predictions.COLUMNS, rows=[row.cells() for row in predicted]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(*columns: str, rows: list[list[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def expected(row: Measured, fits: dict[str, Fit]) -> scaling.Step:
    """What the model says of a row, from its box alone."""
    place = machine(fits, row.work.name)
    return scaling.step(row.work, place, row.notes["sides"], row.ranks, row.crowd)


def _measured(rows: list[Measured], fits: dict[str, Fit]) -> Iterator[list[str]]:
    for row in rows:
        step = expected(row, fits)
        used = "fitted" if row.fitted else "held out"
        if row.crowd > 1:
            used = f"held out; {row.crowd:g} ranks a core"
        yield [
            f"{row.what.rpartition(',')[0]} ({used})",
            str(row.ranks),
            f"{row.local:.0f}",
            f"{row.ghosts:.0f}",
            f"{step.ghosts:.0f}",
            f"{1e-6 * row.bytes / row.ranks:.3g}",
            f"{1e3 * row.exchange:.3g}",
            f"{1e3 * row.seconds:.3g}",
            f"{1e3 * step.seconds:.3g}",
            f"{step.seconds / row.seconds:.2f}",
            f"{100 * row.notes['parallel efficiency']:.0f} %",
            f"{max(row.notes['peak of each process, MB'])}",
        ]


def _fitted(fits: dict[str, Fit]) -> Iterator[list[str]]:
    units = ("a step, µs", "an atom, µs", "a ghost, µs"), ("a message, µs", "a byte, ns")
    for name, found in fits.items():
        said = units[name == "exchange"]
        for unit, value, error in zip(said, found.values, found.errors, strict=True):
            scale = 1e9 if unit.endswith("ns") else 1e6
            numbers = f"{scale * value:.3g}", f"{scale * error:.2g}"
            yield [f"{name}: {unit.partition(',')[0]}", *numbers, unit.partition(", ")[2]]


def _recomputed(rows: list[Measured]) -> Iterator[list[str]]:
    for work in {row.work.name: row.work for row in rows if row.work.layers > 1}.values():
        for atoms in RECOMPUTE_ATOMS:
            sides = scaling.cube(atoms, work.density)
            needed, factor = scaling.recompute(sides, work)
            ours = scaling.ghosts(sides, work.density, work.halo)
            yield [work.name, f"{atoms:,}", f"{ours:,.0f}", f"{needed:,.0f}", f"{factor:.2f} times"]


def plot(
    rows: list[Measured], fits: dict[str, Fit], path: Path, certificate: dict[str, Any]
) -> None:
    """Measured beside the model; ghosts beside LAMMPS's counts; predictions of strong scaling."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    models = list(dict.fromkeys(row.work.name for row in rows))
    for row in rows:
        color = f"C{models.index(row.work.name)}"
        face = color if row.fitted else "none"
        at = 1e3 * row.seconds, 1e3 * expected(row, fits).seconds
        left.plot(*at, "o" if row.crowd == 1 else "s", color=color, mfc=face, ms=5)
        middle.plot(row.local, row.ghosts / row.local, "o", color="k", mfc="none", ms=5)
    for k, model in enumerate(models):
        left.plot([], [], "o", color=f"C{k}", label=model)
    ends = [0.8 * min(1e3 * r.seconds for r in rows), 1.25 * max(1e3 * r.seconds for r in rows)]
    left.plot(ends, ends, "k-", lw=1)
    left.legend(fontsize=7)
    left.set(xscale="log", yscale="log", xlabel="a step measured, ms", ylabel="by the model, ms")
    left.set_title("open: held out; squares: ranks share cores", fontsize=8)
    _plot_ghosts(middle, rows)
    predictions.plot(right)
    figure.suptitle(f"{certificate['cpu']['model']}, {certificate['date'][:10]}", fontsize=8)
    figure.savefig(path, dpi=150)


def _plot_ghosts(axes: Any, rows: list[Measured]) -> None:
    work = max((row.work for row in rows), key=lambda work: work.layers)
    atoms = np.logspace(1.4, 6, 60)
    cubes = [scaling.cube(n, work.density) for n in atoms]
    ours = [scaling.ghosts(sides, work.density, work.halo) for sides in cubes]
    axes.plot(atoms, ours / atoms, "k-", label="one cutoff: features are exchanged")
    axes.plot([], [], "o", color="k", mfc="none", label="LAMMPS's counts")
    needed = [scaling.recompute(sides, work)[0] for sides in cubes]
    axes.plot(atoms, needed / atoms, "k--", label=f"{work.layers} cutoffs: without an exchange")
    axes.set(xscale="log", yscale="log", xlabel="atoms a rank", ylabel="ghosts per atom")
    axes.set_title("ghosts, and what the model says", fontsize=8)
    axes.legend(fontsize=7)
