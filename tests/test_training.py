"""Training: gradients, resuming, stopping, what is saved, what a wrong configuration is told."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from md_plugin import training
from md_plugin.checkpoint import load_model, read_header, save_model
from md_plugin.data import DataError, label_batches, minibatches, read_dataset
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn, HipnnSum
from md_plugin.training import prepare, train_from_config
from md_plugin.training_config import ConfigError, Terms, TrainingConfig, read_config
from md_plugin.training_loss import errors_of, evaluate_labelled, force_weights, loss_of, predict

MODEL = {"n_feat": 4, "n_nu": 4, "n_interactions": 2, "n_atom_layers": 1, "order": 2}
MODEL |= {"rcut": 4.5, "r_min": 2.0, "r_max": 4.2}
SETTINGS = {"max_epochs": 4, "atoms_per_batch": 16, "learning_rate": 0.01, "threads": 1}


def frames(seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        atoms = bulk("Al", cubic=True)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(0, 0.02, (3, 3))), True)
        atoms.rattle(0.1, seed=seed)
        atoms.info["config_type"] = ("even", "odd")[seed % 2]
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        if seed % 4 != 3:
            labels["stress"] = atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, **labels)
        yield atoms


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for name, seeds in (("train", range(12)), ("valid", range(12, 16)), ("test", range(16, 20))):
        write(path / f"{name}.xyz", list(frames(seeds)))
    return path


@pytest.fixture
def configure(folder, tmp_path):
    """Write a configuration, sections updated; returns its path."""

    def write_config(name="config", **sections):
        content = {
            "data": {k: str(folder / f"{k}.xyz") for k in ("train", "valid", "test")},
            "model": dict(MODEL),
            "training": dict(SETTINGS),
            "output": name,
        }
        for key, value in sections.items():
            if isinstance(value, dict):
                content.setdefault(key, {}).update(value)
            else:
                content[key] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write_config


def test_end_to_end(configure, tmp_path):
    state = torch.random.get_rng_state()
    summary = train_from_config(configure(training={"max_epochs": 8}))
    assert torch.equal(state, torch.random.get_rng_state())
    output = tmp_path / "config"
    with (output / "history.csv").open() as file:
        losses = [float(row["valid_loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    assert summary["best_epoch"] == 1 + int(np.argmin(losses))
    assert json.loads((output / "summary.json").read_text()) == summary
    for name in ("parity.png", "learning_curve.png", "state.pt"):
        assert (output / name).stat().st_size > 1000
    assert not list(output.glob("*.partial"))
    assert set(summary["by_config_type"]["test"]) == {"even", "odd"}
    info = read_header(output / "best.hipnn")["info"]
    assert info["training"]["errors"] == summary["errors"]
    assert 2.0 < info["r_closest"] < 2.8

    # The saved model is the one whose errors were reported, and it has what the files have.
    best = load_model(output / "best.hipnn", device="cpu", dtype="float32")
    valid = label_batches(read_dataset(read_config(configure()).data.valid), best.rcut)
    predicted = predict(best, minibatches(valid, 16), TrainingConfig(**SETTINGS))
    assert predicted.loss == pytest.approx(min(losses), rel=1e-6)
    assert errors_of(predicted) == summary["errors"]["valid"]
    assert len(best.model.config.reference_energies) == 1


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("scheduler", ["cosine", "plateau"])
def test_resume_is_bit_for_bit(configure, tmp_path, monkeypatch, scheduler):
    settings = {"scheduler": scheduler, "plateau_patience": 1}
    train_from_config(configure("whole", training=settings))

    save_state = training.Trainer._save_state

    def die_after_two(self):
        save_state(self)
        if len(self.history) == 2:
            raise Killed

    config = configure("killed", training=settings)
    monkeypatch.setattr(training.Trainer, "_save_state", die_after_two)
    with pytest.raises(Killed):
        train_from_config(config)
    monkeypatch.setattr(training.Trainer, "_save_state", save_state)
    train_from_config(config, resume=True)

    whole, killed = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "killed")
    )
    for part in ("model", "average"):
        assert all(torch.equal(v, killed[part][k]) for k, v in whole[part].items())
    for a, b in zip(whole["history"], killed["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_resume_refuses_another_run(configure):
    with pytest.raises(ConfigError, match=r"nothing to resume: .*state.pt does not exist"):
        train_from_config(configure(), resume=True)
    train_from_config(configure(training={"max_epochs": 1}))
    with pytest.raises(ConfigError, match=r"cannot resume from .*: model was "):
        train_from_config(configure(model={"n_feat": 5}), resume=True)
    with pytest.raises(ConfigError, match=r"cannot resume from .*: training was "):
        train_from_config(configure(training={"learning_rate": 0.02}), resume=True)


@pytest.mark.parametrize(
    "kind",
    [
        {"order": 3, "n_max": 4},
        {"n_feat": [3, 5], "n_hidden": 6, "activation": "SiLU", "n_gaussians": 6},
        {"residual": False, "activation": "ELU(alpha=0.5)"},
    ],
)
def test_other_kinds_learn(configure, tmp_path, kind):
    """Invariants, widths, activations, bottlenecks: from the YAML file to a better model."""
    summary = train_from_config(configure(model=kind, training={"max_epochs": 8}))
    with (tmp_path / "config/history.csv").open() as file:
        losses = [float(row["valid_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.8 * losses[0]
    config = load_model(tmp_path / "config/best.hipnn", device="cpu").model.config
    assert config == HipnnConfig(**summary["model"])
    for name, value in kind.items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)


def test_sums_are_not_trained_further(configure, tmp_path):
    parts = [Hipnn(HipnnConfig(species=(13,), rcut=4.5, r_max=4.0)) for _ in range(2)]
    save_model(tmp_path / "sum.hipnn", HipnnSum(parts))
    path = configure(start_from=str(tmp_path / "sum.hipnn"))
    content = yaml.safe_load(path.read_text())
    del content["model"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"sum\.hipnn is a sum of networks: train each"):
        train_from_config(path)


def test_start_from(configure, tmp_path):
    first = train_from_config(configure("first"))
    path = configure("second", start_from="first/best.hipnn", training={"learning_rate": 1e-12})
    with pytest.raises(ConfigError, match="give either model or start_from, not both"):
        train_from_config(path)
    content = yaml.safe_load(path.read_text())
    del content["model"]
    content["training"]["min_learning_rate"] = 0
    path.write_text(yaml.safe_dump(content))
    second = train_from_config(path)
    assert second["model"] == first["model"]
    for key, value in first["errors"]["test"].items():
        assert second["errors"]["test"][key] == pytest.approx(value, rel=1e-4)


def test_early_stopping(configure):
    # Steps too small to change a number: the first epoch stays the best.
    settings = {"max_epochs": 50, "learning_rate": 1e-300, "min_learning_rate": 0.0}
    settings |= {"early_stopping": 2, "ema_decay": 0, "scheduler": "constant", "dtype": "float64"}
    summary = train_from_config(configure(training=settings))
    assert summary["ended"] == "no improvement in 2 epochs"
    assert summary["epochs"] == 3 and summary["best_epoch"] == 1


def test_time_limit(configure):
    settings = {"max_epochs": 10**6, "time_limit_minutes": 0.01}
    summary = train_from_config(configure(training=settings))
    assert summary["ended"] == "time limit of 0.01 minutes"
    assert summary["epochs"] < 1000 and summary["errors"]["test"]["energy_mae"] is not None


def test_divergence_is_told(configure):
    config = read_config(configure())
    trainer, parts = prepare(
        config, {k: read_dataset(getattr(config.data, k)) for k in ("train", "valid")}
    )
    parts["train"][0].batch.r_ij[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1: lower learning_rate"):
        trainer.fit()


@pytest.mark.parametrize("weights", [Terms(1, 0, 0), Terms(0, 1, 0), Terms(0, 0, 1)])
def test_gradient_of_the_loss(configure, weights):
    """Double backward against central differences, each term alone, float64."""
    config = read_config(configure(training={"dtype": "float64"}))
    trainer, parts = prepare(
        config, {k: read_dataset(getattr(config.data, k)) for k in ("train", "valid")}
    )
    # Wide Huber bounds: finite differences must not straddle the kink.
    settings = TrainingConfig(weights=weights, huber=Terms(1e3, 1e3, 1e3), dtype="float64")
    labels = next(minibatches(parts["train"][:4], 100))

    def loss():
        return loss_of(evaluate_labelled(trainer.potential, labels, True), labels, settings)

    model = trainer.potential.model
    first, second = model.blocks[0][0].layer, model.blocks[1][0].layer
    chosen = [first.sensitivity.mu, first.sensitivity.sigma, first.weight, second.weight]
    chosen += [second.quadrupole_scale, second.vector_scale, model.blocks[0][1].layer.weight]
    gradients = torch.autograd.grad(loss(), chosen)
    for parameter, gradient in zip(chosen, gradients, strict=True):
        flat, k = parameter.data.view(-1), parameter.numel() // 2
        here, step = float(flat[k]), 1e-5 * max(1.0, abs(float(flat[k])))
        values = []
        for x in (here + step, here - step):
            flat[k] = x
            values.append(loss().item())
        flat[k] = here
        numeric = (values[0] - values[1]) / (2 * step)
        # Truncation error step^2 ~ 1e-10 relative to curvature, rounding 1e-16 / 1e-5.
        assert float(gradient.view(-1)[k]) == pytest.approx(numeric, rel=2e-5, abs=1e-9)


def test_force_weights():
    forces = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]])
    assert force_weights(forces, 5.0).tolist() == [1.0, 0.25]
    assert force_weights(forces, None).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"learning_rat": 1}}, "unknown key 'learning_rat'; did you mean"),
        ({"modle": {}}, r"unknown key 'modle'; did you mean 'model'\?"),
        ({"model": {"n_features": 3}}, "model: unknown key 'n_features'"),
        ({"data": {"tset": "a"}}, "data: unknown key 'tset'"),
        ({"training": {"max_epochs": 1.5}}, "training: max_epochs must be int, got 1.5"),
        ({"training": {"learning_rate": "fast"}}, "learning_rate must be float, got 'fast'"),
        ({"training": {"scheduler": "cos"}}, "scheduler must be cosine, plateau or constant"),
        ({"training": {"dtype": "half"}}, "dtype must be float32 or float64"),
        ({"training": {"max_epochs": 0}}, "max_epochs and learning_rate must be positive"),
        ({"training": {"ema_decay": 1}}, r"ema_decay must lie in \[0, 1\)"),
        ({"training": {"weights": {"force": 1}}}, "weights: unknown key 'force'"),
        ({"training": [1]}, "training: expected keys and values, got list"),
    ],
)
def test_wrong_configuration(configure, sections, message):
    with pytest.raises(ConfigError, match=message) as error:
        path = configure()
        content = yaml.safe_load(path.read_text())
        for key, value in sections.items():
            if isinstance(value, dict) and key in content:
                content[key].update(value)
            else:
                content[key] = value
        path.write_text(yaml.safe_dump(content))
        read_config(path)
    assert "config.yaml" in str(error.value)


def test_wrong_files(tmp_path, configure):
    with pytest.raises(ConfigError, match=r"cannot read configuration .*none.yaml"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad.yaml is not valid YAML"):
        read_config(tmp_path / "bad.yaml")
    (tmp_path / "few.yaml").write_text("data: {train: a.xyz}")
    with pytest.raises(ConfigError, match="data: the key 'valid' is missing"):
        read_config(tmp_path / "few.yaml")
    (tmp_path / "none.yaml").write_text("training: {}")
    with pytest.raises(ConfigError, match="the key 'data' is missing"):
        read_config(tmp_path / "none.yaml")


def test_numbers_and_partial_weights(configure):
    config = read_config(configure(training={"learning_rate": "1e-3", "weights": {"forces": 7}}))
    assert config.training.learning_rate == 1e-3
    assert config.training.weights == Terms(10.0, 7.0, 1.0)
    assert config.training.huber == TrainingConfig().huber


def test_model_and_data_must_fit(configure, tmp_path):
    with pytest.raises(ConfigError, match=r"model: needs 0 < r_min < r_max <= rcut"):
        train_from_config(configure(model={"r_min": 9.0}))
    with pytest.raises(ConfigError, match=r"model: species \[1\] lacks \[13\]"):
        train_from_config(configure(model={"species": [1]}))
    other = next(frames([0]))
    other.numbers[0] = 29
    write(tmp_path / "copper.xyz", [other])
    with pytest.raises(DataError, match=r"copper.xyz holds species \[29\] that are not in"):
        train_from_config(configure(data={"test": str(tmp_path / "copper.xyz")}))
