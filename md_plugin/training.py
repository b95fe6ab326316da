"""Training: a configuration and labelled structures -> the best model, resumable at every epoch.

    step     loss(E, F = -dE/dx, W) --double backward through the closed sums--> AdamW --> EMA
    epoch    shuffled minibatches; the averaged weights are judged on the validation set
    output   best.hipnn     averaged weights of the best epoch
             state.pt       everything needed to go on, written whole or not at all every epoch
             history.csv    one line per epoch
             summary.json, *.png    see `training_report`

The order of structures depends on seed and epoch alone and nothing else is random after the start,
so a resumed run is the run that was never interrupted, bit for bit.
"""

from __future__ import annotations

import copy
import csv
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from md_plugin.checkpoint import load_model, save_model
from md_plugin.data import (
    DataError,
    Dataset,
    LabelledBatch,
    closest_distance,
    fit_reference_energies,
    label_batches,
    minibatches,
    read_dataset,
)
from md_plugin.model.hipnn import Hipnn, HipnnConfig
from md_plugin.potential import Potential
from md_plugin.training_config import Config, ConfigError, TrainingConfig, read_config
from md_plugin.training_loss import errors_of, evaluate_labelled, loss_of, predict

logger = logging.getLogger("md_plugin")

History = list[dict[str, float]]


class Trainer:
    """The training loop.

    Args:
        potential: network to train, in the training dtype.
        config: how.
        train: one labelled batch per structure.
        valid: likewise.
        output: folder for best.hipnn, state.pt and history.csv.
        identity: what must agree when a run is resumed (model, data, settings).
    """

    def __init__(
        self,
        potential: Potential,
        config: TrainingConfig,
        train: list[LabelledBatch],
        valid: list[LabelledBatch],
        output: Path,
        identity: Mapping[str, Any] | None = None,
    ):
        self.potential, self.config, self.output = potential, config, output
        self.train, self.identity = train, dict(identity or {})
        self.valid = list(minibatches(valid, config.atoms_per_batch))
        average = copy.deepcopy(potential.model).requires_grad_(False)
        self.average = Potential(average, dtype=config.dtype, info=potential.info)
        self.parameters = [p for p in potential.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if p.ndim > 1]},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.history: History = []
        self.n_steps, self.plateau_factor, self.plateau_epoch = 0, 1.0, 0

    @property
    def best_epoch(self) -> int:
        """Number of the epoch with the lowest validation loss, 0 before the first."""
        losses = [row["valid_loss"] for row in self.history]
        return losses.index(min(losses)) + 1 if losses else 0

    def fit(self) -> str:
        """Train until an end is reached; returns why it ended."""
        start = time.monotonic()
        limit = self.config.time_limit_minutes
        while len(self.history) < self.config.max_epochs:
            self._epoch()
            late = len(self.history) - self.best_epoch
            if self.config.early_stopping is not None and late >= self.config.early_stopping:
                return f"no improvement in {late} epochs"
            last = self.history[-1]["seconds"]
            if limit is not None and time.monotonic() - start + last > 60.0 * limit:
                return f"time limit of {limit:g} minutes"
        return f"all {self.config.max_epochs} epochs done"

    def _epoch(self) -> None:
        began = time.monotonic()
        epoch = len(self.history)
        config = self.config
        batches = list(minibatches(self.train, config.atoms_per_batch, config.seed + 7919 * epoch))
        total, energy_error, force_error = 0.0, 0.0, 0.0
        for k, labels in enumerate(batches):
            rate = self._learning_rate(epoch + (k + 1) / len(batches))
            loss, energy, forces = self._step(labels, rate)
            total += loss * labels.batch.n_structures / len(self.train)
            energy_error += energy * 1e3 / len(self.train)
            force_error += forces * 1e3 / sum(p.forces.numel() for p in self.train)
        predicted = predict(self.average, self.valid, config)
        errors = errors_of(predicted)
        row = {
            "epoch": epoch + 1,
            "learning_rate": rate,
            "train_loss": total,
            "valid_loss": predicted.loss,
            "train_energy_mae": energy_error,
            "train_forces_mae": force_error,
            "valid_energy_mae": errors["energy_mae"],
            "valid_forces_mae": errors["forces_mae"],
            "valid_stress_mae": errors["stress_mae"],
            "seconds": time.monotonic() - began,
        }
        self.history.append({k: math.nan if v is None else float(v) for k, v in row.items()})
        self._finish_epoch()

    def _step(self, labels: LabelledBatch, rate: float) -> tuple[float, float, float]:
        """One step; returns loss and the sums of absolute errors of energy per atom and forces."""
        result = evaluate_labelled(self.potential, labels, create_graph=True)
        loss = loss_of(result, labels, self.config)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} in epoch {len(self.history) + 1}: lower learning_rate, "
                "or look for structures with atoms on top of each other"
            )
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.n_steps += 1
        # Early weights are far from the end; the average forgets them faster.
        decay = min(self.config.ema_decay, self.n_steps / (self.n_steps + 10.0))
        if self.config.ema_decay == 0:
            decay = 0.0
        with torch.no_grad():
            averaged: list[Tensor] = list(self.average.model.parameters())
            current: list[Tensor] = list(self.potential.model.parameters())
            torch._foreach_lerp_(averaged, current, 1.0 - decay)
            assert result.forces is not None
            energy = ((result.energy - labels.energy) / labels.batch.n_atoms).abs().sum()
            forces = (result.forces - labels.forces).abs().sum()
        return value, float(energy), float(forces)

    def _learning_rate(self, progress: float) -> float:
        """Learning rate after `progress` epochs."""
        c = self.config
        if progress < c.warmup_epochs:
            return c.learning_rate * progress / c.warmup_epochs
        if c.scheduler == "plateau":
            return max(c.min_learning_rate, c.learning_rate * self.plateau_factor)
        if c.scheduler == "constant":
            return c.learning_rate
        x = (progress - c.warmup_epochs) / max(c.max_epochs - c.warmup_epochs, 1e-9)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(x, 1.0)))
        return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * cosine

    def _finish_epoch(self) -> None:
        epoch, row = len(self.history), self.history[-1]
        best = self.best_epoch
        if epoch - max(best, self.plateau_epoch) >= self.config.plateau_patience:
            self.plateau_factor, self.plateau_epoch = 0.5 * self.plateau_factor, epoch
        if best == epoch:
            save_model(self.output / "best.hipnn", self.average, {"epoch": epoch})
        self._save_state()
        with (self.output / "history.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            writer.writeheader()
            writer.writerows(self.history)
        logger.info(
            "epoch %4d/%d%s  energy MAE %.2f | %.2f meV/atom  forces MAE %.1f | %.1f meV/Å  "
            "(train | valid)  lr %.1e  %.1f s",
            epoch, self.config.max_epochs, " *" if best == epoch else "  ",
            row["train_energy_mae"], row["valid_energy_mae"],
            row["train_forces_mae"], row["valid_forces_mae"],
            row["learning_rate"], row["seconds"],
        )

    def _save_state(self) -> None:
        state = {
            "identity": self.identity,
            "model": self.potential.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "n_steps": self.n_steps,
            "plateau": [self.plateau_factor, self.plateau_epoch],
        }
        partial = self.output / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self.output / "state.pt")

    def load_state(self, path: Path) -> None:
        """Go on where the run that wrote this state.pt stopped.

        Raises:
            ConfigError: no such file, or it belongs to another model, data set or settings.
        """
        if not path.is_file():
            raise ConfigError(f"nothing to resume: {path} does not exist")
        state = torch.load(path, weights_only=True)
        for key, value in self.identity.items():
            if state["identity"].get(key) != value:
                raise ConfigError(
                    f"cannot resume from {path}: {key} was {state['identity'].get(key)!r} and is "
                    f"now {value!r}; start anew in another output folder"
                )
        self.potential.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.n_steps = state["history"], state["n_steps"]
        self.plateau_factor, self.plateau_epoch = state["plateau"]


def train_from_config(
    path: str | Path, resume: bool = False, output: str | Path | None = None
) -> dict[str, Any]:
    """Train as a YAML file says, and report.

    Args:
        path: configuration, see `training_config`.
        resume: go on from state.pt in the output folder.
        output: folder for the results; overrides the file's.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        ConfigError: the configuration is wrong.
        DataError: the data are.
    """
    config = read_config(path, output)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        return _train(config, resume)


def _train(config: Config, resume: bool) -> dict[str, Any]:
    _set_threads(config.training.threads)
    files = {"train": config.data.train, "valid": config.data.valid, "test": config.data.test}
    sets = {k: read_dataset(p, config.data.keys) for k, p in files.items() if p is not None}
    trainer, parts = prepare(config, sets)
    if resume:
        trainer.load_state(config.output / "state.pt")
    reason = trainer.fit()
    logger.info("training ended: %s", reason)

    from md_plugin.training_report import report

    best = load_model(config.output / "best.hipnn", device="cpu", dtype=config.training.dtype)
    return report(best, config, sets, parts, trainer.history, reason)


def prepare(
    config: Config, sets: Mapping[str, Dataset]
) -> tuple[Trainer, dict[str, list[LabelledBatch]]]:
    """The trainer, and the labelled batches of each set."""
    train = sets["train"]
    for name, dataset in sets.items():
        unknown = sorted(set(dataset.species) - set(train.species))
        if unknown:
            raise DataError(f"{dataset.path} holds species {unknown} that are not in {train.path}; "
                            f"add such structures to the training set or drop them from {name}")
    start = None if config.start_from is None else load_model(config.start_from, device="cpu")
    if start is not None:
        start.check_species(np.array(train.species))
    model_config = _model_config(config, train) if start is None else start.model.config
    parts = {name: label_batches(dataset, model_config.rcut) for name, dataset in sets.items()}
    info = {
        "r_closest": closest_distance(parts["train"]),
        "data": {name: dataset.digest for name, dataset in sets.items()},
    }
    torch.manual_seed(config.training.seed)
    network = Hipnn(model_config)
    if start is not None:
        network.load_state_dict(start.model.state_dict())
    potential = Potential(network, dtype=config.training.dtype, info=info)
    if start is None:
        _centre_energy(potential, parts["train"], config.training.atoms_per_batch)
    config.output.mkdir(parents=True, exist_ok=True)
    free = ("max_epochs", "time_limit_minutes", "threads", "early_stopping")
    settings = {k: v for k, v in asdict(config.training).items() if k not in free}
    identity = {"model": model_config.to_dict(), "data": info["data"], "training": settings}
    trainer = Trainer(
        potential, config.training, parts["train"], parts["valid"], config.output, identity
    )
    return trainer, parts


def _model_config(config: Config, train: Dataset) -> HipnnConfig:
    values: dict[str, Any] = {"species": train.species, **config.model}
    missing = sorted(set(train.species) - set(values["species"]))
    if missing:
        raise ConfigError(f"model: species {list(values['species'])} lacks {missing}, which "
                          f"{train.path} holds")
    if "reference_energies" not in values:
        fitted = fit_reference_energies(train)
        values["reference_energies"] = [fitted.get(z, 0.0) for z in values["species"]]
    try:
        return HipnnConfig(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error


def _centre_energy(potential: Potential, parts: list[LabelledBatch], atoms: int) -> None:
    """Set the last bias such that the untrained network is right about the median structure."""
    residual = []
    for labels in minibatches(parts, atoms):
        energy = potential.evaluate(labels.batch, forces=False).energy
        residual.append((labels.energy - energy) / labels.batch.n_atoms)
    last = potential.model.readouts[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.add_(torch.cat(residual).median())


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import numba

        torch.set_num_threads(threads)
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
