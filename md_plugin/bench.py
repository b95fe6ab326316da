"""Bench: this project beside hippynn, same weights, same structure, same process, same run.

    kernels    envsum, sensesum, featsum: raw sums, list reused and list new at every call
    ASE step   energy and forces of perturbed fcc aluminium through both ASE calculators, with
               one and two interaction layers; atoms move at every step, lists are reused

Rules. One thread each. Every provider is first checked on a small system against float64, before
any timing. Rounds are interleaved (A B A B ...), process time is taken, medians and the 20 and 80 %
quantiles are reported, and only ratios are claimed: machines differ and are shared.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from md_plugin.calculator import HipnnCalculator
from md_plugin.hippynn_io import to_hippynn
from md_plugin.kernels import get_backend, reference
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn
from md_plugin.neighbours import neighbour_pairs
from md_plugin.pairs import Pairs
from md_plugin.potential import Potential

RCUT, R_MIN, R_MAX = 6.5, 1.25, 5.5  # Å
N_NU, N_FEAT, N_ATOM_LAYERS = 20, 64, 3
CHECKED_ATOMS = 256
PACKAGES = ("torch", "numba", "numpy", "hippynn", "ase", "vesin")

Sum = Callable[[Tensor, Tensor, Pairs], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        case: what was measured.
        ours: median seconds per call, this project.
        peer: median seconds per call, hippynn.
        ours_spread: 20 and 80 % quantiles, s.
        peer_spread: 20 and 80 % quantiles, s.
        error: largest deviation from float64 of ours, relative to the largest value.
        peer_error: the same for hippynn.
    """

    case: str
    ours: float
    peer: float
    ours_spread: tuple[float, float]
    peer_spread: tuple[float, float]
    error: float
    peer_error: float

    @property
    def ratio(self) -> float:
        """How many times faster than the peer."""
        return self.peer / self.ours


def run_bench(n_atoms: int = 2048, rounds: int = 7, output: Path | None = None) -> list[Row]:
    """Measure, print one table, and write JSON and PNG where an output folder is given.

    Args:
        n_atoms: wanted number of atoms; the nearest cubic fcc cell is taken.
        rounds: timed rounds per provider.
        output: folder for `bench.json` and `bench.png`.

    Raises:
        ImportError: hippynn is not installed.
    """
    import numba
    from hippynn import custom_kernels
    from rich.console import Console

    # The bench owns its process; nothing else in the package touches thread counts.
    # In this order: numba's pool, when it starts, overwrites the thread count of torch.
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    custom_kernels.set_custom_kernels("numba")
    torch.manual_seed(0)
    atoms = aluminium(n_atoms)
    console = Console()
    rows: list[Row] = []
    with console.status("measuring") as status:
        for name in ("envsum", "sensesum", "featsum"):
            for fresh in (False, True):
                status.update(f"{name}, list {'new' if fresh else 'reused'}")
                rows.append(_kernel_row(name, atoms, rounds, fresh))
        for layers in (1, 2):
            status.update(f"ASE step, {layers} interaction layers")
            rows.append(_step_row(layers, atoms, rounds))
    console.print(_table(rows, len(atoms)))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        document = {"certificate": _certificate(len(atoms), rounds)}
        document["rows"] = [asdict(row) | {"ratio": row.ratio} for row in rows]  # type: ignore[assignment]
        (output / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
        _plot(rows, output / "bench.png")
        console.print(f"wrote {output / 'bench.json'} and {output / 'bench.png'}")
    return rows


def aluminium(n_atoms: int, seed: int = 1) -> Atoms:
    """Perturbed fcc aluminium, a cube of about n_atoms."""
    repeat = max(1, round((n_atoms / 4) ** (1 / 3)))
    atoms = bulk("Al", "fcc", a=4.05, cubic=True) * (repeat, repeat, repeat)
    atoms.rattle(0.05, seed=seed)
    return atoms


def interleave(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Process seconds of both, A B A B ..., after one warm-up of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for call, kept in zip((ours, peer), times, strict=True):
            start = time.process_time()
            call()
            if round_ > 0:
                kept.append(time.process_time() - start)
    return times


def _row(case: str, times: tuple[list[float], list[float]], errors: tuple[float, float]) -> Row:
    def spread(t: list[float]) -> tuple[float, float]:
        return float(np.quantile(t, 0.2)), float(np.quantile(t, 0.8))

    medians = [float(np.median(t)) for t in times]
    return Row(case, medians[0], medians[1], spread(times[0]), spread(times[1]), *errors)


def _kernel_row(name: str, atoms: Atoms, rounds: int, fresh: bool) -> Row:
    from hippynn import custom_kernels

    ours: Sum = getattr(get_backend("numba").kernels, name)
    function = getattr(custom_kernels, name)

    def peer(first: Tensor, second: Tensor, pairs: Pairs) -> Tensor:
        result: Tensor = function(first, second, pairs.receiver, pairs.sender_long)
        return result

    pairs, arguments = _kernel_problem(name, aluminium(CHECKED_ATOMS))
    exact = getattr(reference, name)(*(a.double() for a in arguments), pairs)
    errors = [float(relative(f(*arguments, pairs), exact)) for f in (ours, peer)]

    pairs, arguments = _kernel_problem(name, atoms)

    def renewed() -> Pairs:
        if not fresh:
            return pairs
        new = Pairs(pairs.row_ptr.clone(), pairs.sender.clone(), pairs.n_send)
        # hippynn takes int64 index arrays; making them is not its cost.
        new.__dict__["receiver"] = pairs.receiver.clone()
        new.__dict__["sender_long"] = pairs.sender_long.clone()
        return new

    lists = iter([renewed() for _ in range(2 * (rounds + 1))])
    times = interleave(
        lambda: ours(*arguments, next(lists)), lambda: peer(*arguments, next(lists)), rounds
    )
    return _row(f"{name}, list {'new' if fresh else 'reused'}", times, (errors[0], errors[1]))


def _kernel_problem(name: str, atoms: Atoms) -> tuple[Pairs, tuple[Tensor, Tensor]]:
    pairs, image = neighbour_pairs(atoms.positions, atoms.cell[:], atoms.pbc, RCUT)
    x, h = torch.from_numpy(atoms.positions), torch.from_numpy(atoms.cell[:])
    r_ij = x[pairs.sender_long] - x[pairs.receiver] + image @ h
    model = Hipnn(_config(1))
    sense = model.blocks[0][0].layer.sensitivity(r_ij.norm(dim=1).float())  # type: ignore[index]
    inputs = {
        "sense": sense.detach(),
        "features": torch.randn(pairs.n_send, N_FEAT),
        "env": torch.randn(pairs.n_recv, N_NU, N_FEAT),
    }
    names = {"envsum": ("sense", "features"), "sensesum": ("env", "features")}
    first, second = names.get(name, ("env", "sense"))
    return pairs, (inputs[first], inputs[second])


def _step_row(layers: int, atoms: Atoms, rounds: int) -> Row:
    model = Hipnn(_config(layers))
    errors = _step_errors(model)
    ours, peer = _calculators(model, atoms)
    rng = np.random.default_rng(0)

    def step(system: Atoms) -> None:
        system.positions += rng.normal(scale=1e-3, size=system.positions.shape)
        system.get_forces()
        system.get_potential_energy()

    times = interleave(lambda: step(ours), lambda: step(peer), rounds)
    return _row(f"ASE step, {layers} interaction layer{'s' * (layers > 1)}", times, errors)


def _step_errors(model: Hipnn) -> tuple[float, float]:
    small = aluminium(CHECKED_ATOMS)
    exact = small.copy()
    twin = Hipnn(model.config)
    twin.load_state_dict(model.state_dict())
    exact.calc = HipnnCalculator(Potential(twin, dtype="float64"))
    want = torch.from_numpy(exact.get_forces())
    ours, peer = (
        relative(torch.from_numpy(a.get_forces()), want) for a in _calculators(model, small)
    )
    return float(ours), float(peer)


def _calculators(model: Hipnn, atoms: Atoms) -> tuple[Atoms, Atoms]:
    from ase import units
    from hippynn.interfaces.ase_interface import HippynnCalculator

    ours, peer = atoms.copy(), atoms.copy()
    ours.calc = HipnnCalculator(Potential(model, dtype="float32"), skin=1.0)
    peer.calc = HippynnCalculator(to_hippynn(model), en_unit=units.eV, skin=1.0)
    peer.calc.to(torch.float32)
    return ours, peer


def _config(layers: int) -> HipnnConfig:
    return HipnnConfig(
        species=(13,),
        n_feat=N_FEAT,
        n_nu=N_NU,
        n_interactions=layers,
        n_atom_layers=N_ATOM_LAYERS,
        rcut=RCUT,
        r_min=R_MIN,
        r_max=R_MAX,
    )


def relative(got: Tensor, want: Tensor) -> Tensor:
    """Largest deviation relative to the largest value."""
    return (got.double() - want).abs().max() / want.abs().max()


def _certificate(n_atoms: int, rounds: int) -> dict[str, Any]:
    return {
        "machine": platform.processor() or platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in (*PACKAGES, "md-plugin")},
        "dtype": "float32",
        "threads": 1,
        "rounds": rounds,
        "shapes": {"n_atoms": n_atoms, "n_nu": N_NU, "n_feat": N_FEAT, "rcut": RCUT},
        "clock": "process time, interleaved rounds, medians, 20/80 % quantiles",
    }


def _table(rows: list[Row], n_atoms: int) -> Any:
    from rich.table import Table

    table = Table(title=f"{n_atoms} Al atoms, float32, one thread, process time")
    for column in ("case", "ours (ms)", "hippynn (ms)", "ratio", "our error", "hippynn error"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        cells = [
            f"{1e3 * median:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"
            for median, (low, high) in ((row.ours, row.ours_spread), (row.peer, row.peer_spread))
        ]
        errors = (f"{row.error:.0e}", f"{row.peer_error:.0e}")
        table.add_row(row.case, *cells, f"{row.ratio:.1f}x", *errors)
    return table


def _plot(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh([row.case for row in rows], [row.ratio for row in rows], color="tab:blue")
    axes.axvline(1.0, color="k", lw=1)
    axes.invert_yaxis()
    axes.set(xlabel="times faster than hippynn (same weights, same run, one thread)", xscale="log")
    figure.savefig(path, dpi=150)
