"""Networks of ours in hippynn: the same energies, forces and stress there, for every kind."""

import json
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hippynn_cases import hippynn_in_float64, needs_hippynn
from model_helpers import STRUCTURES, crystal, make_model, make_potential, molecule, to_atoms
from physics_suite import close

from md_plugin import export_hippynn, from_hippynn, import_hippynn, save_model, to_hippynn
from md_plugin.calculator import HipnnCalculator
from md_plugin.hippynn_io import HippynnError
from md_plugin.hippynn_io.writing import live_kwargs
from md_plugin.model.hipnn import HipnnSum

# Float64 through two different orders of summation, per eV and eV/Å.
RELATIVE = 1e-10


@pytest.fixture(autouse=True)
def float64(request):
    """hippynn's dtype is torch's default one."""
    if needs_hippynn.args[0]:
        yield
        return
    with hippynn_in_float64():
        yield


def hippynn_calculator(model):
    from hippynn.interfaces.ase_interface import HippynnCalculator

    calculator = HippynnCalculator(to_hippynn(model), en_unit=1.0)
    calculator.to(torch.float64)
    return calculator


NETWORKS = [
    pytest.param(
        {"order": order, "n_interactions": n_interactions, "n_atom_layers": order},
        id=f"order{order}x{n_interactions}",
    )
    for order, n_interactions in product((0, 1, 2), (1, 2, 3))
]
NETWORKS += [
    pytest.param({"order": 3, "n_max": 4}, id="hop"),
    pytest.param({"order": 2, "n_max": 3, "norm_eps": None}, id="hop, not normalised"),
    pytest.param({"n_feat": (4, 6), "n_hidden": (3, 5), "activation": "PReLU"}, id="widths"),
    pytest.param({"residual": False, "n_gaussians": 8, "activation": "SiLU"}, id="plain"),
]


@needs_hippynn
@pytest.mark.parametrize("changes", NETWORKS)
@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "slab"])
def test_same_as_its_ase_calculator(name, changes):
    """Energy, forces and stress; hippynn's calculator knows no mixed periodicity, hence no slab."""
    ours, theirs = to_atoms(STRUCTURES[name]()), to_atoms(STRUCTURES[name]())
    ours.calc = HipnnCalculator(make_potential(**changes))
    theirs.calc = hippynn_calculator(make_model(**changes))
    close(ours.get_potential_energy(), float(theirs.get_potential_energy()), rtol=RELATIVE)
    forces = theirs.get_forces()
    close(ours.get_forces(), forces, atol=RELATIVE * np.abs(forces).max())
    if ours.pbc.all():
        stress = np.asarray(theirs.get_stress())
        close(ours.get_stress(), stress, atol=RELATIVE * np.abs(stress).max())


@needs_hippynn
@pytest.mark.parametrize("changes", NETWORKS)
def test_same_as_its_graph(changes):
    """Atom energies, from the graph that trains in hippynn."""
    from hippynn.graphs import GraphModule

    structure = molecule()
    potential = make_potential(**changes)
    node = to_hippynn(potential)
    inputs = {i.db_name: i for i in node.get_all_parents() if getattr(i, "db_name", None)}
    module = GraphModule([inputs["Z"], inputs["R"], inputs["C"]], [node.atom_energies])
    species, x = (torch.from_numpy(a)[None] for a in (structure.species, structure.positions))
    # A cube so large that the images are out of reach.
    (atom_energies,) = module(species, x, 100.0 * torch.eye(3).double()[None])
    expected = atom_energies.detach().reshape(-1)
    result = potential.evaluate(structure)
    close(result.atom_energy, expected, rtol=RELATIVE)


@needs_hippynn
@pytest.mark.parametrize("changes", NETWORKS)
def test_there_and_back(changes):
    """ours -> hippynn -> ours: the same architecture, the same numbers."""
    model = make_model(**changes)
    back = from_hippynn(to_hippynn(model), dtype="float64", device="cpu")
    for structure in (molecule(), crystal()):
        expected = make_potential(**changes).evaluate(structure)
        close(back.evaluate(structure).energy, expected.energy, rtol=1e-13)
        close(back.evaluate(structure).forces, expected.forces, atol=1e-11)
    assert back.model.config.to_dict() | {"reference_energies": ()} == (
        model.config.to_dict() | {"reference_energies": ()}
    )


@needs_hippynn
@pytest.mark.parametrize("changes", NETWORKS)
def test_exported_files_load_in_hippynn(changes, tmp_path):
    """As a user of hippynn would: build from the settings, load the two state dicts strictly."""
    from hippynn.graphs import inputs, networks, targets

    save_model(tmp_path / "model.hipnn", make_model(**changes))
    folder = export_hippynn(tmp_path / "model.hipnn", tmp_path / "out")
    settings = json.loads((folder / "settings.json").read_text())
    parents = inputs.SpeciesNode(db_name="Z"), inputs.PositionsNode(db_name="R")
    network = getattr(networks, settings["network"])(
        "network", parents, module_kwargs=live_kwargs(settings["module_kwargs"])
    )
    energy = targets.HEnergyNode("energy", network)
    for node, name in ((network, "network"), (energy, "energy")):
        module = node.torch_module.double()
        module.load_state_dict(torch.load(folder / f"{name}.pt"), strict=True)
    back = from_hippynn(energy, dtype="float64", device="cpu")
    expected = make_potential(**changes).evaluate(crystal())
    close(back.evaluate(crystal()).forces, expected.forces, atol=1e-11)


@pytest.mark.parametrize("changes", NETWORKS)
def test_exported_files_are_imported_without_trust(changes, tmp_path, monkeypatch):
    """Neither hippynn nor pickle is needed."""
    folder = export_hippynn(make_model(**changes), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "hippynn", None)
    back = import_hippynn(folder, dtype="float64", device="cpu")
    expected = make_potential(**changes).evaluate(crystal())
    close(back.evaluate(crystal()).energy, expected.energy, rtol=1e-13)
    close(back.evaluate(crystal()).forces, expected.forces, atol=1e-11)


@needs_hippynn
def test_reference_energies_are_in_the_twin():
    without = make_model(reference_energies=())
    a, b = to_atoms(crystal()), to_atoms(crystal())
    a.calc, b.calc = hippynn_calculator(without), HipnnCalculator(make_potential())
    reference = sum(
        dict(zip((1, 6, 8), make_model().config.reference_energies, strict=True))[z]
        for z in crystal().species
    )
    close(float(a.get_potential_energy()) + reference, b.get_potential_energy(), rtol=RELATIVE)


@needs_hippynn
def test_the_original_is_left_alone():
    model = make_model(order=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = to_hippynn(model)
    with torch.no_grad():
        for parameter in twin.torch_module.parameters():
            parameter.zero_()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_without_hippynn_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "hippynn", None)
    monkeypatch.setitem(sys.modules, "hippynn.graphs", None)
    with pytest.raises(ImportError, match=r"pip install 'md-plugin\[hippynn\]'"):
        to_hippynn(make_model())


@pytest.mark.parametrize("write", [to_hippynn, lambda m: export_hippynn(m, "nowhere")])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: HipnnSum([make_model(), make_model(seed=1)]), "is the sum of 2 networks"),
        (lambda: make_model(pair_cutoff=2.0), "pairs end at 2.0 Å"),
    ],
)
def test_what_hippynn_cannot_hold(write, model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if write is to_hippynn and needs_hippynn.args[0]:
        pytest.skip(needs_hippynn.kwargs["reason"])
    with pytest.raises(HippynnError, match=message):
        write(model())
    assert not (tmp_path / "nowhere").exists()


def test_export_overwrites_nothing(tmp_path):
    export_hippynn(make_model(), tmp_path)
    with pytest.raises(FileExistsError, match="already holds network"):
        export_hippynn(make_model(seed=1), tmp_path)
