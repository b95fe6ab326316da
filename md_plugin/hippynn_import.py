"""hippynn: the same network there, with the same weights; `bench` runs it as the peer.

hippynn is optional (`pip install 'md-plugin[test]'` brings it) and needed only to compare. Names
map layer for layer:

    here                                        hippynn
    blocks[k][0].layer.weight (n_nu, in, out)   blocks[k][0].base_layer.int_weights (n_nu, out, in)
    blocks[k][0].layer.self_interaction         blocks[k][0].base_layer.selfint
    blocks[k][l].out / .adjust                  blocks[k][l].res_layer / .adjust_layer
    ....sensitivity.mu, .sigma (n_nu,)          ....sensitivity.mu, .sigma (1, n_nu)
    readouts[k]                                 HEnergy.layers[k]
    reference energies + readouts[0]            HEnergy.layers[0] (no bias, on one-hot species)
"""

from __future__ import annotations

from typing import Any

import torch

from md_plugin.model.hipnn import Hipnn

_NODES = ("Hipnn", "HipnnVec", "HipnnQuad")


def hippynn_energy_node(model: Hipnn) -> Any:
    """A hippynn energy node (HEnergyNode) that computes the same energy as `model`.

    Args:
        model: the network to copy; it is not changed. The twin has the same dtype.

    Returns:
        The node; `hippynn.interfaces.ase_interface.HippynnCalculator(node, ...)` runs it.

    Raises:
        ImportError: hippynn is not installed.
    """
    try:
        from hippynn.graphs import inputs, networks, targets
    except ImportError as error:
        raise ImportError("hippynn is needed for this: pip install 'md-plugin[test]'") from error
    c = model.config
    species = inputs.SpeciesNode(db_name="Z")
    positions = inputs.PositionsNode(db_name="R")
    cell = inputs.CellNode(db_name="C")
    settings: dict[str, Any] = {
        "possible_species": [0, *c.species],
        "n_features": c.n_feat,
        "n_sensitivities": c.n_nu,
        "dist_soft_min": c.r_min,
        "dist_soft_max": c.r_max,
        "dist_hard_max": c.rcut,
        "n_interaction_layers": c.n_interactions,
        "n_atom_layers": c.n_atom_layers,
    }
    if c.order > 0:
        settings["cusp_reg"] = c.cusp
    node_class = getattr(networks, _NODES[c.order])
    network = node_class(
        "network", (species, positions, cell), module_kwargs=settings, periodic=True
    )
    energy = targets.HEnergyNode("energy", network)
    dtype = model.encoder.dtype
    _copy_network(model, network.torch_module.to(dtype))
    _copy_readouts(model, energy.torch_module.to(dtype))
    return energy


@torch.no_grad()
def _copy_network(model: Hipnn, network: Any) -> None:
    for block, twin_block in zip(model.blocks, network.blocks, strict=True):
        layers: list[Any] = list(block.children())
        for level, (layer, twin) in enumerate(zip(layers, twin_block, strict=True)):
            twin.res_layer.load_state_dict(layer.out.state_dict())
            if twin.needs_size_adjust:
                twin.adjust_layer.load_state_dict(layer.adjust.state_dict())
            if level > 0:
                twin.base_layer.load_state_dict(layer.layer.state_dict())
                continue
            interaction, base = layer.layer, twin.base_layer
            base.int_weights.copy_(interaction.weight.transpose(1, 2))
            base.selfint.load_state_dict(interaction.self_interaction.state_dict())
            base.sensitivity.mu.copy_(interaction.sensitivity.mu[None])
            base.sensitivity.sigma.copy_(interaction.sensitivity.sigma[None])
            if interaction.order >= 1:
                base.vecscales.copy_(interaction.vector_scale)
            if interaction.order >= 2:
                base.quadscales.copy_(interaction.quadrupole_scale)


@torch.no_grad()
def _copy_readouts(model: Hipnn, energy: Any) -> None:
    for readout, twin in zip(model.readouts, energy.layers, strict=True):
        twin.load_state_dict(readout.state_dict())
    reference = torch.tensor(model.config.reference_energies or [0.0] * len(model.config.species))
    energy.layers[0].weight.add_(reference.to(energy.layers[0].weight)[None])
