"""What has no counterpart here is refused by its name; which energy is meant is found or asked."""

import warnings
from copy import deepcopy

import pytest
import torch
from hippynn_cases import Hippynn, hippynn_in_float64, needs_hippynn
from model_helpers import crystal, molecule
from physics_suite import close

from md_plugin import from_hippynn
from md_plugin.committee import Committee
from md_plugin.hippynn_io import HippynnError

pytestmark = needs_hippynn

KWARGS = {
    "possible_species": [0, 1, 6, 8],
    "n_features": 4,
    "n_sensitivities": 5,
    "dist_soft_min": 0.8,
    "dist_soft_max": 2.6,
    "dist_hard_max": 3.0,
    "n_interaction_layers": 1,
    "n_atom_layers": 1,
}


@pytest.fixture(autouse=True)
def float64():
    with hippynn_in_float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def make_network(kind="Hipnn", parents=None, periodic=False, **changes):
    from hippynn.graphs import inputs, networks

    parents = parents or [inputs.SpeciesNode(db_name="Z"), inputs.PositionsNode(db_name="R")]
    if periodic:
        parents = [*parents, inputs.CellNode(db_name="C")]
    return getattr(networks, kind)(
        "network", parents, module_kwargs=KWARGS | changes, periodic=periodic
    )


def head(network, name="energy", **kwargs):
    from hippynn.graphs import targets

    return targets.HEnergyNode(name, network, **kwargs)


def graph(*outputs):
    from hippynn.graphs import GraphModule, get_subgraph
    from hippynn.graphs.nodes.base import InputNode

    found = [n for n in get_subgraph(list(outputs)) if isinstance(n, InputNode)]
    return GraphModule(found, outputs)


def refused(source, message, **options):
    with pytest.raises(HippynnError, match=message):
        from_hippynn(source, device="cpu", **options)


def same(a, b):
    close(a.evaluate(molecule()).forces, b.evaluate(molecule()).forces, atol=1e-12)


# --- other physics ----------------------------------------------------------------------------


def test_charges_and_dipoles_beside_the_energy():
    from hippynn.graphs import physics, targets

    network = make_network()
    energy, charges = head(network), targets.HChargeNode("charges", network)
    module = graph(energy.mol_energy, physics.DipoleNode("dipole", charges), charges.atom_charges)
    refused(
        module, r"no counterpart for charges\.atom_charges \(HChargeNode\), dipole \(DipoleNode"
    )
    refused(module, "--energy-only")
    same(
        from_hippynn(module, energy_only=True, dtype="float64"),
        from_hippynn(energy, dtype="float64"),
    )


def test_coulomb_in_the_energy():
    from hippynn.graphs import physics, targets
    from hippynn.layers.physics import QScreening

    network = make_network()
    energy, charges = head(network), targets.HChargeNode("charges", network)
    coulomb = physics.ScreenedCoulombEnergyNode(
        "coulomb", charges, energy_conversion=14.4, cutoff_distance=3.0, screening=QScreening(4)
    )
    total = physics.CombineEnergyNode("total", (energy, coulomb))
    name = r"the energy contains coulomb \(ScreenedCoulombEnergyNode"
    refused(total, name)
    refused(graph(total.mol_energy), name, energy_only=True)  # a part is not the energy
    part = from_hippynn(graph(total.mol_energy), energy="energy", dtype="float64")
    same(part, from_hippynn(energy, dtype="float64"))


@pytest.mark.parametrize("what", ["bonds", "excited"])
def test_other_targets(what):
    from hippynn.graphs import targets
    from hippynn.graphs.nodes.excited import LocalEnergyNode

    network = make_network()
    sizes = {k: v for k, v in KWARGS.items() if k.startswith("dist_")} | {"n_dist": 4}
    if what == "bonds":
        node = targets.HBondNode(
            "b",
            network,
            module_kwargs={"feature_sizes": network.torch_module.feature_sizes, **sizes},
        ).bonds
    else:
        node = LocalEnergyNode("b", network).mol_energy
    refused(graph(head(network).mol_energy, node), r"no counterpart for b\.\w+ \(\w+Node\)")
    refused(node, r"the energy contains b")


def test_gradients_and_hierarchy_are_no_loss():
    from hippynn.graphs import physics

    network = make_network()
    energy = head(network)
    positions = network.find_unique_relative(lambda n: type(n).__name__ == "PositionsNode")
    force = physics.GradientNode("forces", (energy, positions), sign=-1)
    per_atom = physics.PerAtom("per atom", energy)
    module = graph(force, energy.hierarchicality, per_atom, energy.atom_energies)
    same(from_hippynn(module, dtype="float64"), from_hippynn(energy, dtype="float64"))


# --- which energy -----------------------------------------------------------------------------


def test_several_energies():
    from hippynn.graphs import physics

    network = make_network()
    first, second = head(network, "first", db_name="E1"), head(network, "second")
    module = graph(first.mol_energy, second.mol_energy)
    refused(module, "several energies in the graph; say which .*'first', 'second'")
    refused(module, "no node 'third' in the graph; energies: 'first', 'second'", energy="third")
    exact = {k: from_hippynn(node, dtype="float64") for k, node in (("a", first), ("b", second))}
    same(from_hippynn(module, energy="E1", dtype="float64"), exact["a"])
    same(from_hippynn(module, energy="second", dtype="float64"), exact["b"])
    # The one whose gradient was trained is the energy.
    positions = network.find_unique_relative(lambda n: type(n).__name__ == "PositionsNode")
    force = physics.GradientNode("forces", (second, positions), sign=-1)
    found = from_hippynn(graph(first.mol_energy, second.mol_energy, force), dtype="float64")
    same(found, exact["b"])


def test_no_energy():
    network = make_network()
    refused(graph(network), r"no counterpart for network \(Hipnn\)")
    refused(graph(network), "no energy in the graph", energy_only=True)
    refused(network, r"the energy contains network \(Hipnn\)")
    refused(
        torch.nn.Linear(1, 1), r"a torch.nn.modules.linear.Linear is neither a node nor a graph"
    )


def test_files_are_not_for_from_hippynn():
    refused("experiment", "experiment is a path: import_hippynn reads files")


def test_targets():
    energy = head(make_network(), module_kwargs={"n_target": 3})
    refused(energy, "predicts 3 energies: say which, 0 to 2 .--target.")
    refused(energy, "no energy number 3: this head predicts 3", target=3)
    found = from_hippynn(energy, target=2, dtype="float64")
    close(found.evaluate(molecule()).energy, Hippynn(energy, 2)(molecule())[0], rtol=1e-12)


def test_products_of_energies():
    a, b = head(make_network()), head(make_network(), "other")
    refused(a * b, "MulNode")
    refused(a**2.0, "PowNode")
    refused(a / b, "DivNode")
    refused(a * torch.tensor([1.0, 2.0]), "is multiplied by .*: not one number")
    refused(a + 1.0, r"the energy contains Value\(1.0\)")
    doubled = from_hippynn(-2.0 * -a.mol_energy, dtype="float64")
    expected = from_hippynn(a, dtype="float64").evaluate(molecule())
    close(doubled.evaluate(molecule()).forces, 2.0 * expected.forces, atol=1e-12)


# --- parts of a network -----------------------------------------------------------------------


class Cosine(torch.nn.Module):
    def forward(self, x):
        return torch.cos(x)


def test_unknown_parts_of_a_network():
    from hippynn.layers.hiplayers import InverseSensitivityModule
    from hippynn.networks.hipnn import Hipnn as Module

    class Own(InverseSensitivityModule):
        pass

    class Network(Module):
        pass

    refused(
        head(make_network(activation=Cosine)), r"activation test_\w+\.Cosine has no counterpart"
    )
    refused(head(make_network(activation=torch.nn.GLU)), "activation torch.nn.*GLU has no counterp")
    refused(head(make_network(sensitivity_type=Own)), "sensitivity .*Own has no counterpart")
    changed = make_network()
    changed.torch_module.__class__ = Network
    refused(head(changed), "network network is a .*Network, which has no counterpart")
    changed = make_network()
    changed.torch_module.sensitivity_layers[0].cutoff = Cosine()
    refused(head(changed), "cutoff .*Cosine has no counterpart")


def test_layers_that_differ():
    network = make_network("HipnnVec", n_interaction_layers=2)
    network.torch_module.interaction_layers[1].cusp_reg = 1e-2
    refused(head(network), "layers with a cusp_reg of their own")
    network = make_network(n_interaction_layers=2)
    network.torch_module.sensitivity_layers[1].cutoff.hard_max_dist = 2.0
    refused(head(network), "layers with a cutoff of their own")


def test_inputs_that_are_no_species():
    from hippynn.graphs import inputs
    from hippynn.graphs.nodes.indexers import AtomReIndexer, PaddingIndexer

    plain = make_network()
    indexer = plain.find_unique_relative(lambda n: isinstance(n, PaddingIndexer))
    features = AtomReIndexer("features", (inputs.InputNode(db_name="x"), indexer))
    finder = plain.find_unique_relative(lambda n: type(n).__name__ == "OpenPairIndexer")
    network = make_network(parents=[features, finder], possible_species=None, n_input_features=2)
    refused(head(network), "does not start from one-hot species but from AtomReIndexer")
    refused(head(make_network(possible_species=[1, 6, 8])), "must be 0, for no atom, and then each")
    refused(head(make_network(possible_species=[0, 1, 600])), "species must lie between 1 and 118")


def test_networks_of_different_species():
    both = (
        head(make_network(), "a").atom_energies
        + head(make_network(possible_species=[0, 1, 6]), "b").atom_energies
    )
    refused(both, "must know the same species: .1, 6, 8.; .1, 6.")


def test_a_hippynn_that_computes_something_else(monkeypatch):
    """Classes of the same name with other content: the comparison notices."""
    from hippynn.layers.hiplayers import InverseSensitivityModule

    energy = head(make_network())
    original = InverseSensitivityModule.forward
    monkeypatch.setattr(InverseSensitivityModule, "forward", lambda s, r: original(s, 1.001 * r))
    refused(energy, "the imported model differs from hippynn by")


def test_pair_finders_that_end_early_are_told(caplog):
    from hippynn.graphs.nodes.pairs import OpenPairIndexer

    near = make_network()
    wanted = ("PositionsNode", "OneHotEncoder", "PaddingIndexer")
    nodes = [near.find_unique_relative(lambda n, w=w: type(n).__name__ == w) for w in wanted]
    finder = OpenPairIndexer("near", nodes, dist_hard_max=2.0)
    potential = from_hippynn(head(make_network(parents=[nodes[2], finder])), dtype="float64")
    assert "a pair finder of this model ends at 2.0" in caplog.text
    assert potential.model.parts[0].config.pair_cutoff == 2.0


# --- ensembles and ML-IAP ---------------------------------------------------------------------


def test_ensembles_become_committees():
    from hippynn.graphs.ensemble import make_ensemble

    energies = [head(make_network(periodic=True), f"e{k}", db_name="E") for k in range(3)]
    expected = [Hippynn(deepcopy(energy))(crystal()) for energy in energies]
    module, _ = make_ensemble(energies, quiet=True)
    committee = from_hippynn(module, dtype="float64", device="cpu")
    assert isinstance(committee, Committee) and len(committee.members) == 3
    found = committee.evaluate(crystal())
    close(found.energy, sum(e[0] for e in expected) / 3, rtol=1e-12)
    close(found.forces, sum(e[1] for e in expected) / 3, atol=1e-10)
    spread = next(n for n in module.nodes_to_compute if n.name.endswith("std"))
    refused(spread, "is the spread of an ensemble: give its mean")


def test_units_of_an_mliap_interface():
    pytest.importorskip("lammps.mliap.mliap_unified_abc")
    from hippynn.interfaces.lammps_interface import MLIAPInterface

    energy = head(make_network(periodic=True))
    elements = ["H", "C", "O"]
    plain = from_hippynn(energy, dtype="float64").evaluate(molecule())
    interface = MLIAPInterface(energy, elements, compute_dtype=torch.float64, energy_unit=27.2)
    found = from_hippynn(interface, dtype="float64").evaluate(molecule())
    close(found.forces, 27.2 * plain.forces, atol=1e-11)
    interface = MLIAPInterface(energy, elements, distance_unit=10.0)
    refused(interface, "distance_unit=10.0, with which hippynn's forces are not the slope")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy_unit": "furlong"}, "unit 'furlong' is not known; choose eV, meV, kcal/mol"),
        ({"length_unit": 0.0}, "unit 0.0 is not known; choose"),
        ({"dtype": "half"}, "dtype must be one of"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        from_hippynn(head(make_network()), **options)
