"""Training: a configuration and labelled structures -> the best model, resumable at every epoch.

    output   best.hipnn     averaged weights of the best epoch
             state.pt       everything needed to go on, written whole or not at all every epoch
             history.csv    one line per epoch
             summary.json, *.png    see `training_report`

`training_config` says what can be set, `training_loss` what is minimised, `training_loop` how.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from md_plugin.checkpoint import load_model
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
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn
from md_plugin.potential import Potential
from md_plugin.training_config import Config, ConfigError, read_config
from md_plugin.training_loop import Trainer

logger = logging.getLogger("md_plugin")


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
            raise DataError(
                f"{dataset.path} holds species {unknown} that are not in {train.path}; "
                f"add such structures to the training set or drop them from {name}"
            )
    start = None if config.start_from is None else load_model(config.start_from, device="cpu")
    if start is not None:
        start.check_species(np.array(train.species))
        if len(start.model.parts) > 1:
            raise ConfigError(f"{config.start_from} is a sum of networks: train each by itself")
    model_config = _model_config(config, train) if start is None else start.model.parts[0].config
    parts = {name: label_batches(dataset, model_config.rcut) for name, dataset in sets.items()}
    info = {
        "r_closest": closest_distance(parts["train"]),
        "data": {name: dataset.digest for name, dataset in sets.items()},
    }
    torch.default_generator.manual_seed(config.training.seed)  # that of GPUs is not ours
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
        raise ConfigError(
            f"model: species {list(values['species'])} lacks {missing}, which {train.path} holds"
        )
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
    last = potential.model.parts[0].readouts[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.add_(torch.cat(residual).median())


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import numba

        # In this order: numba's pool, when it starts, overwrites the thread count of torch.
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        torch.set_num_threads(threads)
