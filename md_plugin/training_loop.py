"""The training loop: steps, epochs, the state that a resumed run needs.

    step     loss(E, F = -dE/dx, W) --double backward through the closed sums--> AdamW --> EMA
    epoch    shuffled minibatches; the averaged weights are judged on the validation set

The order of structures depends on seed and epoch alone and nothing else is random after the start,
so a resumed run is the run that was never interrupted, bit for bit.
"""

from __future__ import annotations

import copy
import csv
import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from md_plugin.checkpoint import save_model
from md_plugin.data import LabelledBatch, minibatches
from md_plugin.potential import Potential
from md_plugin.training_config import ConfigError, TrainingConfig
from md_plugin.training_loss import errors_of, evaluate_labelled, loss_of, predict

logger = logging.getLogger("md_plugin")


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
        self.history: list[dict[str, float]] = []
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
        for k, labels in enumerate(_with_bar(batches, f"epoch {epoch + 1}")):
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
            epoch,
            self.config.max_epochs,
            " *" if best == epoch else "  ",
            row["train_energy_mae"],
            row["valid_energy_mae"],
            row["train_forces_mae"],
            row["valid_forces_mae"],
            row["learning_rate"],
            row["seconds"],
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


def _with_bar(batches: list[LabelledBatch], label: str) -> Iterable[LabelledBatch]:
    """The batches, under a progress bar where somebody watches; logs and files stay clean."""
    if not sys.stderr.isatty():
        return batches
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    bar: Iterable[LabelledBatch] = track(
        batches, description=label, console=console, transient=True
    )
    return bar
