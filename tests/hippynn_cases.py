"""Seeded draws of hippynn networks and energies, and what hippynn itself says about structures."""

import random
import warnings
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list
from model_helpers import to_atoms

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hippynn  # noqa: F401
except ImportError as error:
    HIPPYNN = f"hippynn cannot be imported ({error}); it comes with pip install 'md-plugin[test]'"
else:
    HIPPYNN = ""

needs_hippynn = pytest.mark.skipif(bool(HIPPYNN), reason=HIPPYNN)

ACTIVATIONS = [
    *("CELU", "ELU", "GELU", "LeakyReLU", "Mish", "PReLU", "SELU", "SiLU", "Sigmoid"),
    *("Softplus", "Softsign", "Tanh", "Tanhshrink"),
]
KINDS = ["Hipnn", "HipnnVec", "HipnnQuad", "HipHopnn"]
HEADS = ["HEnergy", "HEnergy", "interacting", "Atomization", "targets", "heads", "combined", "two"]
N_DRAWS = 48


@contextmanager
def hippynn_in_float64():
    """hippynn's dtype is torch's default one; its plainest sums, see hippynn_io.compare."""
    from md_plugin.hippynn_io.compare import plain_sums

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with plain_sums():
            yield
    finally:
        torch.set_default_dtype(dtype)


def activation(draw):
    name = draw.choice(ACTIVATIONS)
    options = {"ELU": {"alpha": 0.7}, "LeakyReLU": {"negative_slope": 0.2}}.get(name, {})
    if name == "Softplus" and draw.random() < 0.3:
        options = {"beta": 2.0}
    return getattr(torch.nn, name)(**options)


def draw_kwargs(draw, kind):
    """module_kwargs of a network for H, C and O."""
    from hippynn.layers.hiplayers import SensitivityBottleneck

    layers = draw.choice([1, 2, 2, 3])
    species = [1, 6, 8] + draw.choice([[], [7]])
    draw.shuffle(species)
    hard = draw.uniform(2.6, 3.4)
    width = draw.randint(2, 6)
    features = draw.choice([width, [draw.randint(2, 6) for _ in range(layers)]])
    bottleneck = partial(SensitivityBottleneck, n_dist_bare=draw.randint(5, 9))
    kwargs = {
        "possible_species": [0, *species],
        "n_features": features,
        "n_sensitivities": draw.randint(2, 6),
        "dist_soft_min": draw.uniform(0.6, 1.0),
        "dist_soft_max": draw.uniform(2.0, 3.6),  # beyond the cutoff is fine in hippynn
        "dist_hard_max": hard,
        "n_interaction_layers": layers,
        "n_atom_layers": draw.randint(0, 2),
        "resnet": draw.choice([True, True, False, 5, [draw.randint(2, 6) for _ in range(layers)]]),
        "activation": activation(draw),
        "sensitivity_type": draw.choice(["inverse", "inverse", "linear", bottleneck]),
    }
    if kind in ("HipnnVec", "HipnnQuad"):
        kwargs["cusp_reg"] = draw.choice([1e-6, 1e-3])
    if kind == "HipHopnn":
        pairs = [(n, l) for n in (1, 2, 3, 4) for l in range(4)]
        kwargs["n_max"], kwargs["l_max"] = draw.choice([*pairs, (3, 2), (4, 3), (4, 3)])
        kwargs["group_norm"] = draw.random() < 0.6
        kwargs["group_norm_eps"] = draw.choice([1e-5, 1e-2])
    return kwargs


def strengthen(module, seed):
    """Weights that give forces of some eV/Å, and that float32 cannot hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.mul_(1.5 + 0.5 * noise if "weight" in name else 1.0 + 0.05 * noise)


def draw_energy(number):
    """An energy node, the options that `from_hippynn` needs for it, and the kind of its network."""
    from hippynn.graphs import inputs, networks, targets

    draw = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    head = HEADS[(number // len(KINDS)) % len(HEADS)]
    torch.manual_seed(number)
    parents = inputs.SpeciesNode(db_name="Z"), inputs.PositionsNode(db_name="R")
    parents = (*parents, inputs.CellNode(db_name="C"))
    kwargs = draw_kwargs(draw, kind)
    node = getattr(networks, kind)("network", parents, module_kwargs=kwargs, periodic=True)
    node.torch_module.double()  # the maps of HIP-HOP-NN have the dtype of hippynn's import
    options = {}
    if head == "interacting":
        energy = targets.HEnergyNode("energy", node, first_is_interacting=True)
    elif head == "Atomization":
        energy = targets.AtomizationEnergyNode("energy", node)
        for layer in energy.torch_module.layers:  # hippynn starts them near zero
            torch.nn.init.normal_(layer.weight)
    else:
        n_target = 3 if head == "targets" else 1
        options = {"target": 1} if head == "targets" else {}
        energy = targets.HEnergyNode("energy", node, module_kwargs={"n_target": n_target})
    if head in ("heads", "combined", "two"):
        second = node
        if head == "two":  # a second network, with its own pair finder and cutoff
            other = draw_kwargs(draw, "Hipnn") | {"possible_species": kwargs["possible_species"]}
            other["dist_hard_max"] = draw.choice([2.2, 3.0])  # beyond its pair finder: fine
            shared = node.find_unique_relative(lambda n: type(n).__name__ == "PaddingIndexer")
            encoder = node.find_unique_relative(lambda n: type(n).__name__ == "OneHotEncoder")
            from hippynn.graphs.nodes.pairs import PeriodicPairIndexer

            finder = PeriodicPairIndexer(
                "near", (parents[1], encoder, shared, parents[2]), dist_hard_max=2.2
            )
            second = networks.Hipnn("near", (shared, finder), module_kwargs=other)
        extra = targets.HEnergyNode("more", second)
        strengthen(extra.torch_module, number + 1)
        strengthen(second.torch_module, number + 2)
        if head == "heads":
            energy_sum = 0.5 * energy.atom_energies - extra.atom_energies / 4.0
        else:
            from hippynn.graphs.nodes.physics import CombineEnergyNode

            energy_sum = CombineEnergyNode("sum", (energy, extra))
        strengthen(energy.torch_module, number)
        energy = energy_sum
    else:
        strengthen(energy.torch_module, number)
    strengthen(node.torch_module, number + 3)
    return energy, options, kind


class Hippynn:
    """hippynn's graph of an energy node, fed with ASE's neighbours: any boundary conditions.

    Its ASE calculator refuses slabs; the graph behind it does not.
    """

    def __init__(self, energy, target=None):
        from hippynn.interfaces.ase_interface.calculator import setup_ASE_graph

        self.target = target
        if target is not None:
            energy = pick(energy, target)
        extra = {}
        if hasattr(energy, "atom_energies"):
            extra = {"atom_energies": energy.atom_energies}
        self.rcut, _, self.names, self.graph, self.pbc = setup_ASE_graph(
            energy, extra_properties=extra or None
        )

    def __call__(self, structure):
        """Energy, forces, -virial (3, 3), and atom energies or None."""
        atoms = to_atoms(structure)
        i, j, shift = neighbor_list("ijS", atoms, self.rcut)
        self.pbc.set(False)  # the strain derivative itself, not divided by a volume
        arrays = (structure.species[None], structure.positions[None], structure.cell[None])
        values = [torch.from_numpy(np.asarray(a)) for a in (*arrays, i, j, shift)]
        values[5] = values[5].double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            energy, forces, strain, *rest = self.graph(*values)
        atom_energy = rest[0].detach().numpy().ravel() if rest else None
        return (
            float(energy.sum()),
            forces[0].detach().numpy(),
            strain[0].detach().numpy(),
            atom_energy,
        )


def pick(energy, target):
    """A head of one energy, cut out of a head of several."""
    from copy import deepcopy

    from hippynn.graphs import targets

    module = deepcopy(energy.torch_module)
    for layer in module.layers:
        layer.weight = torch.nn.Parameter(layer.weight[target : target + 1].detach())
        if layer.bias is not None:
            layer.bias = torch.nn.Parameter(layer.bias[target : target + 1].detach())
    return targets.HEnergyNode("picked", energy.parents, module=module)
