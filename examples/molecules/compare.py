"""Put a model beside its teacher, nanodft: errors on held-out frames, energy along three paths.

    python compare.py --model run/finish/best.hipnn      # about a minute on one core
    python compare.py --model molecules --points 3       # the bundled model, coarse paths

Errors are over the frames of data/test.xyz. The spread is the root mean square of the force
components: the error of a model that says zero. The paths are energies relative to their lowest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.io import read
from rich.progress import track

from md_plugin import HipnnCalculator
from md_plugin.nanodft import NanoDFTCalculator

matplotlib.use("agg")

HERE = Path(__file__).parent
Frames = Sequence[Atoms]


def stretched_water(length: float) -> Atoms:
    """Return water with one O-H bond of `length`, Å."""
    atoms = molecule("H2O")
    atoms.set_distance(0, 1, length, fix=0)
    return atoms


def water_dimer(distance: float) -> Atoms:
    """Return a dimer with a straight hydrogen bond along x and the oxygens `distance` Å apart."""
    bond, half_angle, tilt = 0.97, np.radians(52.2), np.radians(55)
    bisector = np.array([np.cos(tilt), 0, np.sin(tilt)]) * np.cos(half_angle)
    across = np.array([0, np.sin(half_angle), 0])
    donor = [[0, 0, 0], [1, 0, 0], [np.cos(2 * half_angle), 0, np.sin(2 * half_angle)]]
    acceptor = [[0, 0, 0], bisector + across, bisector - across]
    x = bond * np.array([*donor, *acceptor])
    x[3:, 0] += distance
    return Atoms("OH2OH2", x)


def turned_methanol(angle: float) -> Atoms:
    """Return methanol with the hydroxyl group turned to a dihedral H-C-O-H of `angle` degrees."""
    atoms = molecule("CH3OH")
    atoms.set_dihedral(2, 0, 1, 3, angle, indices=[3])
    return atoms


PATHS = {
    "O-H bond in water / Å": (stretched_water, 0.85, 1.2),
    "O-O distance in water dimer / Å": (water_dimer, 2.5, 5.0),
    "H-C-O-H angle in methanol / degrees": (turned_methanol, 0.0, 180.0),
}
"""Coordinate -> geometry as a function of it, first and last value."""


def predict(calculator: Calculator, frames: Frames) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return energies (n_frame,), eV, and the forces (n_atom, 3) of each frame, eV/Å."""
    energies, forces = [], []
    for atoms in frames:
        copy = atoms.copy()
        copy.calc = calculator
        energies.append(copy.get_potential_energy())
        forces.append(copy.get_forces())
    return np.array(energies), forces


def errors(model: Calculator, frames: Frames) -> dict[str, float]:
    """Return counts, energy MAE (meV/atom), force RMSE and spread (meV/Å), and their ratio (%)."""
    energies, forces = predict(model, frames)
    sizes = np.array([len(atoms) for atoms in frames])
    labels = np.array([atoms.get_potential_energy() for atoms in frames])
    label_forces = np.concatenate([atoms.get_forces() for atoms in frames])
    rmse = np.sqrt(np.mean((np.concatenate(forces) - label_forces) ** 2))
    spread = np.sqrt(np.mean(label_forces**2))
    return {
        "frames": len(frames),
        "atoms": int(sizes.sum()),
        "energy MAE, meV/atom": 1e3 * float(np.mean(np.abs(energies - labels) / sizes)),
        "force RMSE, meV/Å": 1e3 * float(rmse),
        "spread, meV/Å": 1e3 * float(spread),
        "ratio, %": 100 * float(rmse / spread),
    }


def error_table(model: Calculator, frames: Frames) -> dict[str, dict[str, float]]:
    """Return `errors` by kind, by sort of sampling, and of all frames."""
    rows = {}
    for key in ("config_type", "sampling"):
        for value in sorted({atoms.info[key] for atoms in frames}):
            rows[value] = errors(model, [atoms for atoms in frames if atoms.info[key] == value])
    return rows | {"all": errors(model, frames)}


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """Return the table in Markdown."""
    lines = [["held-out", *rows["all"]], ["---"] * (1 + len(rows["all"]))]
    for name, row in rows.items():
        numbers = (f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values())
        lines.append([name, *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(calculators: dict[str, Calculator], frames: Frames, points: int, path: Path) -> None:
    """Draw held-out forces, label against model, and the energies along `PATHS`, to `path`."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    labels = np.concatenate([atoms.get_forces() for atoms in frames]).ravel()
    found = np.concatenate(predict(calculators["model"], frames)[1]).ravel()
    ends = [labels.min(), labels.max()]
    axes[0, 0].plot(ends, ends, color="0.7", lw=1)
    axes[0, 0].plot(labels, found, ".", ms=2)
    axes[0, 0].set(xlabel="force of nanodft / eV/Å", ylabel="force of the model / eV/Å")
    styles: list[dict[str, Any]] = [{"lw": 4, "alpha": 0.4}, {"lw": 1.5, "ls": "--"}]
    for axis, (name, (geometry, first, last)) in zip(axes.flat[1:], PATHS.items(), strict=True):
        values = np.linspace(first, last, points)
        for (label, calculator), style in zip(calculators.items(), styles, strict=True):
            path_frames = [geometry(value) for value in track(values, f"{label}: {name}")]
            energies, _ = predict(calculator, path_frames)
            axis.plot(values, energies - energies.min(), label=label, **style)
        axis.set(xlabel=name, ylabel="energy / eV")
    axes[0, 1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="molecules", help="bundled model or .hipnn file")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "test.xyz")
    parser.add_argument("--points", type=int, default=21, help="energies along a path")
    parser.add_argument("--output", type=Path, default=Path("molecules.png"), help="the plot")
    options = parser.parse_args(argv)
    model = HipnnCalculator(options.model, device="cpu")
    frames = read(options.data, ":")
    print(markdown(error_table(model, frames)))
    teacher = NanoDFTCalculator(xc="b3lyp", basis="6-31g", grid_level=2)
    plot({"nanodft": teacher, "model": model}, frames, options.points, options.output)


if __name__ == "__main__":
    main()
