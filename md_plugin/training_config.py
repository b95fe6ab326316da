"""Training configuration: YAML -> frozen dataclasses. Every key is a field below, with its default.

data:      train, valid, test (paths relative to the YAML file) and the names of the labels
model:     fields of `HipnnConfig`; species and reference_energies come from the data if absent
training:  fields of `TrainingConfig`
output:    folder, relative to the YAML file
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from md_plugin.data import Keys
from md_plugin.model.config import HipnnConfig


class ConfigError(ValueError):
    """The configuration file is wrong; the message names file and key."""


@dataclass(frozen=True)
class Terms:
    """One number each for energy per atom, force components and stress (virial per atom)."""

    energy: float
    forces: float
    stress: float


@dataclass(frozen=True)
class DataConfig:
    """Where the data are.

    Attributes:
        train: file to fit.
        valid: file that picks the best epoch.
        test: file for the errors that are reported; None leaves them out.
        energy_key: name of the energy, eV.
        forces_key: name of the forces, eV/Å.
        stress_key: name of the stress, eV/Å^3; frames without it are fine.
    """

    train: Path
    valid: Path
    test: Path | None = None
    energy_key: str = "energy"
    forces_key: str = "forces"
    stress_key: str = "stress"

    @property
    def keys(self) -> Keys:
        """The names of the labels."""
        return Keys(self.energy_key, self.forces_key, self.stress_key)


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        atoms_per_batch: structures are joined up to this many atoms per step.
        max_epochs: passes over the training set.
        learning_rate: largest learning rate.
        min_learning_rate: where the schedule ends.
        warmup_epochs: linear rise from zero, may be a fraction.
        scheduler: "cosine", "plateau" (halve after plateau_patience epochs) or "constant".
        plateau_patience: epochs without improvement before "plateau" halves the rate.
        weight_decay: AdamW decay of matrices.
        gradient_clip: largest norm of the gradient.
        ema_decay: decay per step of the averaged weights, which are what is saved; 0 is off.
        early_stopping: stop after this many epochs without improvement; None is off.
        weights: weights of the loss terms, whose units are (eV/atom)^2, (eV/Å)^2, (eV/atom)^2.
            Forces learn slowest: let them lead, and raise the energy in a second stage.
        huber: errors beyond this count linearly: eV/atom, eV/Å, eV/atom.
        force_scale: atoms with larger forces (eV/Å) count less, see `training.force_weights`;
            None is off.
        seed: of initial weights and of the order of structures.
        dtype: "float32" or "float64".
        threads: of torch and numba; None leaves them as they are.
        time_limit_minutes: of one call; training then stops cleanly and reports.
    """

    atoms_per_batch: int = 512
    max_epochs: int = 200
    learning_rate: float = 4e-3
    min_learning_rate: float = 3e-5
    warmup_epochs: float = 1.0
    scheduler: str = "cosine"
    plateau_patience: int = 15
    weight_decay: float = 0.0
    gradient_clip: float = 20.0
    ema_decay: float = 0.99
    early_stopping: int | None = None
    weights: Terms = Terms(10.0, 1.0, 1.0)
    huber: Terms = Terms(0.02, 0.5, 0.1)
    force_scale: float | None = 5.0
    seed: int = 0
    dtype: str = "float32"
    threads: int | None = None
    time_limit_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.scheduler not in ("cosine", "plateau", "constant"):
            raise ValueError(f"scheduler must be cosine, plateau or constant: {self.scheduler!r}")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}")
        if min(self.atoms_per_batch, self.max_epochs) < 1 or self.learning_rate <= 0:
            raise ValueError("atoms_per_batch, max_epochs and learning_rate must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True)
class Config:
    """A whole training run.

    Attributes:
        data: files.
        model: fields of `HipnnConfig` that the file gives.
        start_from: a `.hipnn` file whose network is trained further; it then says the model.
        training: how to train.
        output: folder of results.
    """

    data: DataConfig
    model: Mapping[str, Any]
    training: TrainingConfig
    output: Path
    start_from: Path | None = None


def read_config(path: str | Path, output: str | Path | None = None) -> Config:
    """Read a YAML configuration; `output` overrides the file's.

    Raises:
        ConfigError: not readable, an unknown or missing key, or a value of the wrong kind.
    """
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    sections = _mapping(content, f"{path}")
    known = {"data", "model", "training", "output", "start_from"}
    _check_keys(sections, known, {"data"}, f"{path}")
    base = path.resolve().parent

    data = _mapping(sections["data"], f"{path}, data")
    for name in ("train", "valid", "test"):
        if data.get(name) is not None:
            data[name] = base / str(data[name])
    training = _mapping(sections.get("training"), f"{path}, training")
    for name in ("weights", "huber"):
        if name in training:
            where = f"{path}, training, {name}"
            # A class attribute with the default: what is not given keeps it.
            merged = {**vars(getattr(TrainingConfig, name)), **_mapping(training[name], where)}
            training[name] = _build(Terms, merged, where)
    model = _mapping(sections.get("model"), f"{path}, model")
    _check_keys(model, {f.name for f in fields(HipnnConfig)}, set(), f"{path}, model")
    start_from = sections.get("start_from")
    if start_from is not None and model:
        raise ConfigError(f"{path}: give either model or start_from, not both")
    target = Path(output) if output is not None else base / str(sections.get("output", "training"))
    return Config(
        _build(DataConfig, data, f"{path}, data"),
        model,
        _build(TrainingConfig, training, f"{path}, training"),
        target,
        None if start_from is None else base / str(start_from),
    )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected keys and values, got {type(value).__name__}")
    return dict(value)


def _check_keys(given: Mapping[str, Any], known: set[str], needed: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            names = ", ".join(sorted(known))
            raise ConfigError(f"{where}: unknown key {key!r}{hint} (known: {names})")
    for key in sorted(needed - set(given)):
        raise ConfigError(f"{where}: the key {key!r} is missing")


def _build(kind: Any, values: dict[str, Any], where: str) -> Any:
    """A dataclass from plain values; numbers are converted to the annotated type."""
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    _check_keys(values, {f.name for f in fields(kind)}, needed, where)
    converted = dict(values)
    for f in fields(kind):
        value = values.get(f.name)
        if f.name in values and not (value is None and "None" in str(f.type)):
            converted[f.name] = _convert(value, str(f.type), f"{where}: {f.name}")
    try:
        return kind(**converted)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(value: Any, kind: str, where: str) -> Any:
    if kind.startswith(("float", "int")):
        # YAML reads 1e-3 (without a dot) as text.
        try:
            number = float(value)
            if isinstance(value, bool) or (kind.startswith("int") and number != int(number)):
                raise ValueError
        except (TypeError, ValueError):
            raise ConfigError(f"{where} must be {kind.split()[0]}, got {value!r}") from None
        return int(number) if kind.startswith("int") else number
    if kind.startswith("str") and not isinstance(value, str):
        raise ConfigError(f"{where} must be text, got {value!r}")
    return value
