"""The report of a training run: errors by set and config_type, plots, summary.json.

Also writes the summary into best.hipnn, so that a model file says what it was trained on and how
well it did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from md_plugin import __version__
from md_plugin.checkpoint import save_model
from md_plugin.data import Dataset, LabelledBatch, minibatches
from md_plugin.potential import Potential
from md_plugin.training_config import Config
from md_plugin.training_loss import Predictions, errors_of, predict

Errors = dict[str, float | int | None]


def report(
    best: Potential,
    config: Config,
    sets: Mapping[str, Dataset],
    parts: Mapping[str, list[LabelledBatch]],
    history: list[dict[str, float]],
    reason: str,
) -> dict[str, Any]:
    """Evaluate the best model on every set; write summary.json, plots and the model's info."""
    predictions = {
        name: predict(best, minibatches(batches, config.training.atoms_per_batch), config.training)
        for name, batches in parts.items()
    }
    errors = {name: errors_of(p) for name, p in predictions.items()}
    summary: dict[str, Any] = {
        "md_plugin": __version__,
        "ended": reason,
        "epochs": len(history),
        "best_epoch": best.info.get("epoch"),
        "units": {"energy": "meV/atom", "forces": "meV/angstrom", "stress": "GPa"},
        "errors": errors,
        "by_config_type": {
            name: errors_by_type(predictions[name], sets[name].config_type) for name in sets
        },
        "r_closest": best.info.get("r_closest"),
        "data": {name: {"file": d.path.name, "sha256": d.digest} for name, d in sets.items()},
        "model": best.model.parts[0].config.to_dict(),
        "n_parameters": sum(p.numel() for p in best.model.parameters()),
    }
    output = config.output
    text = json.dumps(summary, indent=2)
    (output / "summary.json").write_text(text + "\n")
    info = {k: summary[k] for k in ("md_plugin", "epochs", "best_epoch", "units", "errors")}
    save_model(output / "best.hipnn", best, {"training": info})
    last = "test" if "test" in predictions else "valid"
    plot_parity(predictions[last], last, output / "parity.png")
    plot_history(history, output / "learning_curve.png")
    returned: dict[str, Any] = json.loads(text)
    return returned


def errors_by_type(predictions: Predictions, config_type: list[str]) -> dict[str, Errors]:
    """The errors of each config_type; empty where the file names none."""
    names = np.array(config_type)
    kinds = [kind for kind in sorted(set(config_type)) if kind]
    return {kind: errors_of(predictions.select(names == kind)) for kind in kinds}


def plot_parity(predictions: Predictions, name: str, path: Path) -> None:
    """Predicted over label: energy per atom and force components."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    errors = errors_of(predictions)
    for axes, pair, label, unit, key in zip(
        figure.subplots(1, 2),
        (predictions.energy, predictions.forces.reshape(2, -1)),
        ("energy per atom", "force component"),
        ("eV", "eV/Å"),
        (f"{errors['energy_mae']:.2f} meV/atom", f"{errors['forces_mae']:.1f} meV/Å"),
        strict=True,
    ):
        ends = [float(pair.min()), float(pair.max())]
        axes.plot(ends, ends, color="0.7", linewidth=1.0, zorder=0)
        axes.plot(pair[0], pair[1], ".", markersize=3, alpha=0.5)
        axes.set(xlabel=f"{label}, label ({unit})", ylabel=f"predicted ({unit})")
        axes.set_title(f"{name} set: MAE {key}", fontsize=10)
    figure.savefig(path, dpi=150)


def plot_history(history: list[dict[str, float]], path: Path) -> None:
    """Validation and training errors over epochs, logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] for row in history]
    for axes, key, unit in zip(
        figure.subplots(1, 2), ("energy", "forces"), ("meV/atom", "meV/Å"), strict=True
    ):
        for split in ("train", "valid"):
            axes.plot(epochs, [row[f"{split}_{key}_mae"] for row in history], label=split)
        axes.set(xlabel="epoch", ylabel=f"{key} MAE ({unit})", yscale="log")
        axes.legend()
    figure.savefig(path, dpi=150)
