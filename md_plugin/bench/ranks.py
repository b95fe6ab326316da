"""The case `ranks`: LAMMPS on 1, 2 and 4 MPI ranks, weak and strong scaling, exchanges counted.

    weak      n atoms per rank: a row of cubes, so that every sub-box is one
    strong    n atoms in one cube, cut into sub-boxes

One LAMMPS for each row: a `run` that warms up, then one for each round. Each rank counts and times
its exchanges of features (`lammps_interface.traffic`); LAMMPS tells the rest. Seconds are those of
the wall clock. More ranks than cores are run as well, and marked: they take turns.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from md_plugin.bench.core import OURS, Options, Row
from md_plugin.bench.lammps import write_ours
from md_plugin.bench.machine import cores
from md_plugin.bench.race import Engine, Race, RaceError, lammps_absence, loop_times, run_lammps
from md_plugin.bench.systems import fcc, network
from md_plugin.model.hipnn import Hipnn

RANKS = (1, 2, 4)
GRIDS = {1: (1, 1, 1), 2: (1, 1, 2), 4: (1, 2, 2)}  # of the cubes in weak scaling
LATTICE = 4.05  # Å
GRID = re.compile(r"(\d+) by (\d+) by (\d+) MPI processor grid")
PART = re.compile(r"^(Pair|Neigh|Comm|Output|Modify|Other) *\|(?: *\S+ *\|)? *(\S+) *\|", re.M)
SKIN = 1.0  # Å, as in `race.SETUP`


@dataclass(frozen=True)
class Run:
    """One row: a network, a box, and how many ranks share it."""

    kind: str
    model: str
    net: Hipnn
    atoms: Atoms
    ranks: int

    @property
    def what(self) -> str:
        """As in the tables."""
        share = len(self.atoms) // self.ranks if self.kind == "weak" else len(self.atoms)
        return f"{self.kind}, {self.model}, {share} atoms{' a rank' * (self.kind == 'weak')}"


def ranks(options: Options) -> Iterator[Row]:
    """LAMMPS on 1, 2 and 4 MPI ranks: weak and strong scaling, exchanges counted and timed."""
    absent, alone = lammps_absence(), dict[str, float]()
    wrong: dict[tuple[str, int], float | str] = {}
    for run in runs(options):
        name = f"ours, {run.ranks} rank{'s' * (run.ranks > 1)}"
        row = Row("ranks", run.what, name, OURS, "ok")
        engine = Engine("ours", OURS, run.atoms, partial(_write_counted, run.net), run.net)
        if absent:
            yield replace(row, status=absent)
            continue
        key = run.model, run.ranks
        if key not in wrong:
            wrong[key] = _error(engine, options, run.ranks)
        error = wrong[key]
        if isinstance(error, str):
            yield replace(row, status=error)
            continue
        try:
            row = measured(replace(row, error=error), engine, run, options)
        except RaceError as problem:
            yield replace(row, status=f"failed: {problem}")
            continue
        assert row.seconds is not None
        first = alone.setdefault(run.what, row.seconds)
        ideal = first if run.kind == "weak" else first / run.ranks
        yield replace(row, notes={**row.notes, "parallel efficiency": ideal / row.seconds})


def runs(options: Options) -> Iterator[Run]:
    """All rows: of each network three sizes a rank, and the largest of them as one box."""
    factors, counts, nets = [1 / 8, 1.0, 8.0], list(RANKS), networks()
    if options.quick:
        factors, counts, nets = [1.0], list(RANKS[:2]), {"2 layers": nets["2 layers"]}
    repeats = [max(2, round((options.atoms * factor / 4) ** (1 / 3))) for factor in factors]
    for model, net in nets.items():
        for repeat in repeats:
            for k in counts:
                x, y, z = (repeat * count for count in GRIDS[k])
                yield Run("weak", model, net, fcc("Al", LATTICE, (x, y, z), options.seed), k)
        for k in counts:
            large = fcc("Al", LATTICE, (repeats[-1],) * 3, options.seed)
            yield Run("strong", model, net, large, k)


def networks() -> dict[str, Hipnn]:
    """Those of the rows: no exchange, exchanges of a scalar and of a vector network."""
    return {"1 layer": network(1), "2 layers": network(2), "2 vector layers": network(2, order=1)}


def _write_counted(net: Hipnn, folder: Path) -> str:
    from lammps_interface.traffic import count_traffic

    lines = write_ours(net, "Al", folder)
    count_traffic(folder / lines.split()[3])
    return lines


def _error(engine: Engine, options: Options, count: int) -> float | str:
    """Of the forces of small atoms on so many ranks, against float64; or what went wrong."""
    try:
        error = Race([engine], options, 1, "", count).error(engine)
    except RaceError as problem:
        return f"failed: {problem}"
    assert error is not None
    return error


def measured(row: Row, engine: Engine, run: Run, options: Options) -> Row:
    """The row with what LAMMPS and its ranks have told.

    Raises:
        RaceError: LAMMPS failed.
    """
    from lammps_interface.traffic import read_traffic

    steps, rounds = (2, 1) if options.quick else (10, min(options.rounds, 5))
    with tempfile.TemporaryDirectory(prefix="md_plugin_") as name:
        folder = Path(name)
        script = engine.script(engine.atoms, folder) + f"run {steps}\n" * (rounds + 1)
        (folder / "in.lmp").write_text(script)
        output = run_lammps(folder, options, run.ranks)
        records = read_traffic(folder, run.ranks)
    times = loop_times(output, steps, with_cpu=False)[1:]
    low, seconds, high = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
    n = len(run.atoms)
    notes = counted(records, steps, rounds) | described(run, output)
    notes["seconds in"] = parts(output, steps, rounds)
    row = replace(row, seconds=seconds, low=low, high=high, notes=notes)
    return replace(row, us_per_atom=1e6 * seconds / n)


def described(run: Run, output: str) -> dict[str, Any]:
    """What the cost model has to know of a row."""
    config = run.net.config
    grids = GRID.findall(output)
    if not grids:
        raise RaceError("LAMMPS did not tell its grid of MPI ranks")
    grid = [int(count) for count in grids[0]]
    sides = run.atoms.cell.lengths() / grid
    return {
        "kind": run.kind,
        "model": run.model,
        "atoms": len(run.atoms),
        "ranks": run.ranks,
        "cores": cores(),
        "layers": config.n_interactions,
        "width": run.net.n_feat,
        "rcut": config.rcut,
        "skin": SKIN,
        "density": len(run.atoms) / run.atoms.get_volume(),
        "sides": sides.round(6).tolist(),
    }


def counted(records: list[list[dict[str, Any]]], steps: int, rounds: int) -> dict[str, Any]:
    """Of the last `rounds` runs, each of `steps` steps: numbers of each rank, per step."""
    local, ghosts, peak, seconds = [], [], [], []
    exchanged: dict[str, list[Any]] = {"forward": [], "reverse": []}
    for rank in records:
        # Each run leaves two records, of its first evaluation and of its last step.
        pairs = list(zip(rank[-2 * rounds :: 2], rank[1 - 2 * rounds :: 2], strict=True))
        first, last = pairs[-1]
        assert last["steps"] - first["steps"] == steps, "LAMMPS asked for energies in between"
        local.append(last["local"])
        ghosts.append(last["ghosts"])
        peak.append(round(last["peak_bytes"] / 2**20))
        each = [(b["exchange_seconds"] - a["exchange_seconds"]) / steps for a, b in pairs]
        seconds.append(float(np.median(each)))
        for way, found in exchanged.items():
            of = [(last[way][k] - first[way][k]) / steps for k in ("exchanges", "bytes")]
            found.append(of)
    return {
        "local": local,
        "ghosts": ghosts,
        "peak of each process, MB": peak,
        "exchanges per step": {way: found[0][0] for way, found in exchanged.items()},
        "bytes per step": {way: [x for _, x in found] for way, found in exchanged.items()},
        "exchange, s": seconds,
    }


def parts(output: str, steps: int, rounds: int) -> dict[str, float]:
    """LAMMPS's own account of the last runs: s per step in Pair, Neigh, Comm; means of ranks."""
    found: dict[str, list[float]] = {}
    for name, average in PART.findall(output):
        found.setdefault(name, []).append(float(average) / steps)
    return {name: float(np.median(times[-rounds:])) for name, times in found.items()}
