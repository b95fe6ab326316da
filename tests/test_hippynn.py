"""The same weights in hippynn: atom energies, forces and stress, for every order."""

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from model_helpers import STRUCTURES, crystal, make_model, make_potential, molecule, to_atoms
from physics_suite import close

from md_plugin.calculator import HipnnCalculator
from md_plugin.hippynn_import import hippynn_energy_node

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hippynn  # noqa: F401
except ImportError as error:
    HIPPYNN = f"hippynn cannot be imported ({error}); it comes with pip install 'md-plugin[test]'"
else:
    HIPPYNN = ""

needs_hippynn = pytest.mark.skipif(bool(HIPPYNN), reason=HIPPYNN)

# Float64 through two different orders of summation, per eV and eV/Å.
RELATIVE = 1e-10


@pytest.fixture(autouse=True)
def plain_torch_sums():
    """hippynn's original sums: its numba ones drop sensitivities below 1e-10, its newer torch ones
    need a compiler. And its dtype is torch's default one."""
    if HIPPYNN:
        yield
        return
    from hippynn import custom_kernels

    active, dtype = custom_kernels.CUSTOM_KERNELS_ACTIVE, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        custom_kernels.set_custom_kernels("_legacy")
        yield
    torch.set_default_dtype(dtype)
    custom_kernels.set_custom_kernels(active)


def hippynn_calculator(model):
    from hippynn.interfaces.ase_interface import HippynnCalculator

    calculator = HippynnCalculator(hippynn_energy_node(model), en_unit=1.0)
    calculator.to(torch.float64)
    return calculator


NETWORKS = [
    pytest.param(
        {"order": order, "n_interactions": n_interactions, "n_atom_layers": order},
        id=f"order{order}x{n_interactions}",
    )
    for order, n_interactions in product((0, 1, 2), (1, 2, 3))
]


@needs_hippynn
@pytest.mark.parametrize("changes", NETWORKS)
@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "slab"])
def test_same_as_its_ase_calculator(name, changes):
    """Energy, forces and stress; hippynn knows no mixed periodicity, hence no slab."""
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
    """Atom energies and each level of the hierarchy, from the graph that trains in hippynn."""
    from hippynn.graphs import GraphModule

    structure = molecule()
    potential = make_potential(**changes)
    node = hippynn_energy_node(potential.model)
    inputs = {i.db_name: i for i in node.get_all_parents() if getattr(i, "db_name", None)}
    module = GraphModule([inputs["Z"], inputs["R"], inputs["C"]], [node.atom_energies])
    species, x = (torch.from_numpy(a)[None] for a in (structure.species, structure.positions))
    # A cube so large that the images are out of reach.
    (atom_energies,) = module(species, x, 100.0 * torch.eye(3).double()[None])
    expected = atom_energies.detach().reshape(-1)
    result = potential.evaluate(structure)
    close(result.atom_energy, expected, rtol=RELATIVE)


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
    twin = hippynn_energy_node(model)
    with torch.no_grad():
        for parameter in twin.torch_module.parameters():
            parameter.zero_()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_without_hippynn_the_message_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "hippynn", None)
    monkeypatch.setitem(sys.modules, "hippynn.graphs", None)
    with pytest.raises(ImportError, match=r"pip install 'md-plugin\[test\]'"):
        hippynn_energy_node(make_model())
