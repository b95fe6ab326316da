"""The .hipnn file: what goes in comes out, damage is told, old formats stay readable."""

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import STRUCTURES, crystal, make_model, make_potential

from md_plugin import checkpoint
from md_plugin.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    bundled_models,
    load_model,
    load_model_bytes,
    model_bytes,
    read_header,
    save_model,
)
from md_plugin.model.hipnn import HipnnSum
from md_plugin.neighbours import Structure
from md_plugin.potential import Potential

GOLDEN = Path(__file__).parent / "golden"
DATA = model_bytes(make_model(n_feat=2, n_nu=2, n_interactions=1), {"r_closest": 0.8, "who": "me"})


def with_header(change):
    """DATA, its JSON header changed by a function, everything else as it was."""
    size = int.from_bytes(DATA[:8], "little")
    outer = json.loads(DATA[8 : 8 + size])
    header = json.loads(outer["__metadata__"]["md_plugin"])
    change(header)
    outer["__metadata__"]["md_plugin"] = json.dumps(header)
    text = json.dumps(outer).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + DATA[8 + size :]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32", "mixed"])
def test_round_trip_is_bitwise(tmp_path, order, dtype):
    potential = make_potential(dtype, order=order, info={"r_closest": 0.7, "note": "Å"})
    save_model(tmp_path / "a.hipnn", potential, {"epoch": 3})
    loaded = load_model(tmp_path / "a.hipnn", device="cpu", dtype=dtype)
    assert loaded.model.config == potential.model.config
    assert loaded.info == {"r_closest": 0.7, "note": "Å", "epoch": 3}
    assert loaded.dtype == dtype
    before, after = potential.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    a, b = potential.evaluate(crystal()), loaded.evaluate(crystal())
    assert torch.equal(a.energy, b.energy) and torch.equal(a.forces, b.forces)
    # and once more, from bytes: the file is a function of what is in it
    assert model_bytes(loaded) == (tmp_path / "a.hipnn").read_bytes()


def test_float64_weights_are_not_rounded_on_loading():
    model = make_model()
    loaded = load_model_bytes(model_bytes(model), device="cpu", dtype="float64")
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[key]), key
        assert not torch.equal(value, value.float().double()), f"{key} tests nothing"


def test_reference_energies_stay_float64():
    energies = (-13.6056931229, -37688.123456789012, -0.1)
    model = make_model(reference_energies=energies)
    for dtype in ("float64", "mixed", "float32"):
        loaded = load_model_bytes(model_bytes(model), device="cpu", dtype=dtype)
        assert loaded.model.config.reference_energies == energies
        far = Structure(np.array([6]), np.zeros((1, 3)))
        # The network part is of order one; float32 references would be off by 2e-3.
        network = make_model(reference_energies=())
        expected = energies[1] + float(load_model_bytes(model_bytes(network)).evaluate(far).energy)
        assert abs(float(loaded.evaluate(far).energy) - expected) < 1e-6


def test_loaded_network_is_for_use():
    loaded = load_model_bytes(DATA)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_loading_runs_no_pickle(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    (tmp_path / "a.hipnn").write_bytes(DATA)
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    load_model(tmp_path / "a.hipnn")
    read_header(tmp_path / "a.hipnn")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_pickles_are_refused_unopened(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(Trap(), tmp_path / "trap.hipnn")
    with pytest.raises(CheckpointError, match=r"trap\.hipnn is (not|truncated or not) a \.hipnn"):
        load_model(tmp_path / "trap.hipnn")
    assert not (tmp_path / "sprung").exists()


def test_truncated_anywhere():
    for length in (0, 1, 7, 8, 100, len(DATA) // 2, len(DATA) - 1):
        with pytest.raises(CheckpointError, match=r"truncated|damaged"):
            load_model_bytes(DATA[:length], name="cut.hipnn")
    with pytest.raises(CheckpointError, match=r"cut\.hipnn is truncated .*copy it again"):
        load_model_bytes(DATA[:50], name="cut.hipnn")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(position, flip):
    damaged = bytearray(DATA)
    damaged[position] ^= flip
    try:
        potential = load_model_bytes(bytes(damaged))
    except CheckpointError:
        return
    # A blank for a blank in the JSON, or a capital in an escape, changes nothing.
    assert model_bytes(potential) == DATA


def test_changed_parts_are_named():
    damaged = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with pytest.raises(CheckpointError, match=r"m\.hipnn was changed after it was written"):
        load_model_bytes(damaged, name="m.hipnn")
    for change in (
        lambda h: h["config"].update(rcut=4.0),
        lambda h: h["info"].update(r_closest=0.1),
        lambda h: h["units"].update(energy="kcal/mol"),
        lambda h: h.pop("hash"),
    ):
        with pytest.raises(CheckpointError, match="was changed after it was written"):
            load_model_bytes(with_header(change))


def test_newer_format():
    data = with_header(lambda h: h.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(
        CheckpointError,
        match=rf"new\.hipnn has format version {FORMAT_VERSION + 1}; this md_plugin reads up to "
        rf"{FORMAT_VERSION}: upgrade md_plugin",
    ):
        load_model_bytes(data, name="new.hipnn")


def test_older_format_is_brought_up_after_its_hash_was_checked(monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", FORMAT_VERSION + 1)

    def update(header):
        header["info"]["updated"] = True
        return header | {"format_version": FORMAT_VERSION + 1}

    monkeypatch.setitem(checkpoint._UPDATES, FORMAT_VERSION, update)
    assert load_model_bytes(DATA).info["updated"]
    with pytest.raises(CheckpointError, match="was changed"):
        load_model_bytes(with_header(lambda h: h["info"].update(r_closest=2.0)))


def test_not_a_model(tmp_path):
    from safetensors.torch import save

    others = {
        "text.hipnn": b"Once upon a time there was a file that was no model.",
        "tensors.hipnn": save({"a": torch.zeros(2)}),
        "json.hipnn": struct.pack("<Q", 2) + b"[]",
    }
    for name, content in others.items():
        path = tmp_path / name
        path.write_bytes(content)
        for read in (load_model, read_header):
            with pytest.raises(CheckpointError, match=rf"{name} .*not a \.hipnn"):
                read(path)


def test_missing_lists_what_is_bundled(monkeypatch):
    monkeypatch.setattr(checkpoint, "bundled_models", lambda: {"ta": Path("ta.hipnn")})
    with pytest.raises(
        CheckpointError, match=r"no model file 'tantalus', and no bundled .*\(bundled: 'ta'\)"
    ):
        load_model("tantalus")
    monkeypatch.setattr(checkpoint, "bundled_models", dict)
    with pytest.raises(CheckpointError, match=r"\(bundled: none\)"):
        read_header("tantalus")


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.hipnn").write_bytes(DATA)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for read in (load_model, read_header):
        with pytest.raises(CheckpointError, match=r"cannot read .*a\.hipnn: Permission denied"):
            read(tmp_path / "a.hipnn")


def test_checkpoint_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)


def test_bundled_models_load():
    for name, path in bundled_models().items():
        potential = load_model(name, device="cpu")
        assert potential.info, f"{path} says nothing about its training"
        assert path.stat().st_size < 2_000_000


def test_a_potential_is_passed_through():
    potential = make_potential()
    assert load_model(potential) is potential


def test_read_header(tmp_path):
    save_model(tmp_path / "a.hipnn", make_model(), {"origin": "test"})
    header = read_header(tmp_path / "a.hipnn")
    assert header.keys() == {"format_version", "units", "config", "info", "hash"}
    assert header["format_version"] == FORMAT_VERSION
    assert header["units"] == {"energy": "eV", "length": "angstrom"}
    assert header["config"]["rcut"] == 3.0 and header["info"] == {"origin": "test"}


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.hipnn"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        save_model(path, make_model(), {"no": object()})
    write = Path.write_bytes

    def disk_full(self, data):
        write(self, data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        with pytest.raises(OSError, match="No space left"):
            save_model(path, make_model())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    save_model(path, make_model())
    assert load_model(path).rcut == 3.0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.hipnn")), ids=lambda path: path.stem)
def test_golden_files_stay_readable(path):
    """Written once by the version that introduced the format; see golden/make.py."""
    assert path.stat().st_size < 20_000
    potential = load_model(path, device="cpu", dtype="float64")
    assert potential.info == {"r_closest": 0.75}
    labels = json.loads(path.with_suffix(".json").read_text())
    assert labels.keys() == STRUCTURES.keys()
    for label in labels.values():
        geometry = [np.array(label[key]) for key in ("species", "positions", "cell", "pbc")]
        result = potential.evaluate(Structure(*geometry))
        # energies of thousands of eV: 1e-13 relative; forces of up to tens of eV/Å
        assert float(result.energy) == pytest.approx(label["energy"], rel=1e-13)
        np.testing.assert_allclose(result.forces.numpy(), label["forces"], rtol=0, atol=1e-10)


def test_every_format_has_its_golden_file():
    assert {p.stem for p in GOLDEN.glob("*.hipnn")} == {
        f"format{k}" for k in range(1, FORMAT_VERSION + 1)
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"species": (8, 1)}, "species must be ascending atomic numbers"),
        ({"species": ()}, "species must be ascending atomic numbers"),
        ({"species": (1, 1)}, "species must be ascending atomic numbers"),
        ({"species": (0, 1)}, "species must lie between 1 and 118"),
        ({"species": (1, 119)}, "species must lie between 1 and 118"),
        ({"order": 3}, r"order must be 0, 1 or 2, or 3 for a model with invariants .*: got 3"),
        ({"order": 4, "n_max": 2}, "order must be"),
        ({"n_max": 5}, "n_max must be 0 to 4, got 5"),
        ({"n_feat": (4, 4, 5)}, "n_feat has 3 widths for 2 interaction blocks"),
        ({"n_hidden": (4, 0)}, "n_feat, n_hidden and n_gaussians must be at least 1"),
        ({"n_gaussians": 0}, "n_gaussians must be at least 1"),
        ({"n_hidden": 3, "residual": False}, "it needs residual=True"),
        ({"pair_cutoff": 3.0}, r"pair_cutoff must lie between 0 and rcut .3.0 Å., got 3.0"),
        ({"activation": "Sinus"}, "no activation 'Sinus'; known: CELU, ELU"),
        ({"activation": "ELU(0.5)"}, "is not of the form Name or Name.option=value."),
        ({"activation": "ELU(beta=0.5)"}, "activation 'ELU.beta=0.5.': .*beta"),
        ({"activation": "__import__('os')"}, "is not of the form Name"),
        ({"activation": "Softmax(dim=0)"}, "must act on the features of each atom: dim=1"),
        ({"n_feat": 0}, "must be at least 1"),
        ({"n_nu": 0}, "must be at least 1"),
        ({"n_interactions": 0}, "must be at least 1"),
        ({"n_atom_layers": -1}, "n_atom_layers at least 0"),
        ({"r_min": 0.0}, r"needs 0 < r_min < r_max <= rcut, got 0.0, 2.6, 3.0 Å"),
        ({"r_max": 3.5}, "needs 0 < r_min < r_max <= rcut"),
        ({"rcut": float("inf")}, "needs 0 < r_min < r_max <= rcut"),
        ({"rcut": float("nan")}, "needs 0 < r_min < r_max <= rcut"),
        ({"reference_energies": (1.0,)}, "one energy per species, or none"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_sums_of_networks(tmp_path):
    parts = make_model(order=1), make_model(seed=1, n_interactions=1, rcut=2.4, r_max=2.2)
    total = Potential(HipnnSum(parts), device="cpu", dtype="float64")
    save_model(tmp_path / "sum.hipnn", total)
    again = load_model(tmp_path / "sum.hipnn", device="cpu", dtype="float64")
    structure = STRUCTURES["crystal"]()
    found = again.evaluate(structure)
    assert torch.equal(found.forces, total.evaluate(structure).forces)
    alone = [Potential(p, device="cpu", dtype="float64").evaluate(structure) for p in parts]
    torch.testing.assert_close(found.energy, sum(a.energy for a in alone), rtol=1e-14, atol=0)
    assert (again.rcut, again.n_exchanges, again.n_feat) == (3.0, 1, 5)
    assert [c["rcut"] for c in read_header(tmp_path / "sum.hipnn")["networks"]] == [3.0, 2.4]
    assert "HIP-NN-TS vector + HIP-NN, H, C, O, 2 + 1 interaction layers" in repr(again)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: [make_model()], "a sum needs at least two networks, got 1"),
        (
            lambda: [make_model(), make_model(species=(1, 6), reference_energies=())],
            "must know the same species: .1, 6, 8.; .1, 6.",
        ),
    ],
)
def test_impossible_sums(parts, message):
    with pytest.raises(ValueError, match=message):
        HipnnSum(parts())


def test_loading_draws_no_random_numbers(tmp_path):
    save_model(tmp_path / "m.hipnn", make_model())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_model(tmp_path / "m.hipnn", device="cpu")
    assert torch.equal(torch.rand(3), expected)
