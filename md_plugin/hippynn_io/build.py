"""Networks of md_plugin from hippynn's settings and state dicts.

    E_i = E_ref(species_i) + sum_k readout_k(z_i^k)

The part of an energy head that sees nothing but the species becomes the reference energy, which
is float64 in every precision. Units are converted in the weights: 1/mu and sigma scale with the
length, readouts with the energy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from md_plugin.hippynn_io.graph import Head, NetworkPart
from md_plugin.hippynn_io.settings import ENERGIES, HippynnError, config_of
from md_plugin.hippynn_io.state import load_network
from md_plugin.kernels.registry import backend_choice
from md_plugin.model.hipnn import Hipnn, HipnnSum
from md_plugin.neighbours import Batch, Structure


def build(
    parts: list[NetworkPart],
    *,
    target: int | None = None,
    energy: float = 1.0,
    length: float = 1.0,
    backend: str | None = None,
) -> Hipnn | HipnnSum:
    """The sum of the parts as one network.

    Args:
        parts: networks with their heads.
        target: which energy, where heads predict several.
        energy: eV per unit of energy of the parts.
        length: Å per unit of length of the parts.
        backend: of the networks; None is settled as in `Hipnn`.

    Raises:
        HippynnError: weights that do not fit the settings, or several targets and no choice.
    """
    with torch.random.fork_rng(devices=[]):  # initial weights are overwritten: draw no numbers
        networks = [_rescaled(_network(part, target), energy, length) for part in parts]
        for network in networks:
            network.backend = backend_choice(backend)
            network.eval().requires_grad_(False)
        try:
            return networks[0] if len(networks) == 1 else HipnnSum(networks)
        except ValueError as error:
            raise HippynnError(str(error)) from error


def part_from_state(settings: Mapping[str, Any], state: Mapping[str, Any]) -> NetworkPart:
    """A network and its energy head in one state dict, as hippynn saves it.

    The modules are found by the names of their tensors. Where there are several,
    settings["network_prefix"] and settings["energy"]["prefix"] say which.

    Raises:
        HippynnError: no network, no energy head, or several and no choice.
    """
    energy = dict(settings.get("energy", {}))
    kind = energy.get("node", "HEnergyNode")
    if kind not in ENERGIES:
        raise HippynnError(f"energy node {kind!r} is not one of {', '.join(ENERGIES)}")
    network = _prefixed(
        state, r"blocks\.0\.0\.(base_layer\.)?int_weights$", settings.get("network_prefix")
    )
    head = _prefixed(state, r"layers\.0\.weight$", energy.get("prefix"))
    first = bool(energy.get("first_is_interacting", kind == "AtomizationEnergyNode"))
    known = _known(state, network)  # what the weights tell need not be in the settings
    if settings.get("network") not in ("HipnnVec", "HipnnQuad"):
        known.pop("cusp_reg", None)
    given = settings.get("module_kwargs", {})
    listed = list(given.get("possible_species", known.get("possible_species", ())))
    if listed != known.get("possible_species", listed):
        raise HippynnError(
            f"possible_species is {listed} in the settings and {known['possible_species']} in the "
            "weights"
        )
    settings = {**settings, "module_kwargs": {**known, **given}}
    return NetworkPart(settings, network, [Head(1.0, kind, head, first)])


def _known(state: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that a state dict holds: regularisation, and species in their order."""
    known: dict[str, Any] = {}
    cusps = {v["cusp_reg"] for k, v in network.items() if k.endswith("_extra_state")}
    if cusps:
        known["cusp_reg"] = max(cusps)
    maps = {tuple(v.tolist()) for k, v in state.items() if k.endswith("species_map")}
    if len(maps) == 1:
        columns = maps.pop()
        listed = sorted((z for z, column in enumerate(columns) if column), key=columns.__getitem__)
        known["possible_species"] = [0, *listed]
    return known


def _prefixed(state: Mapping[str, Any], pattern: str, prefix: str | None) -> dict[str, Any]:
    """Entries of one module, without their prefix."""
    found: dict[str, dict[str, Any]] = {}
    for key in state:
        match = re.search(r"(^|\.)" + pattern, key)
        if match:
            start = key[: match.start()] + match.group(1)
            found[start] = {k[len(start) :]: v for k, v in state.items() if k.startswith(start)}
    if prefix is not None:
        found = {k: v for k, v in found.items() if k == prefix}
    chosen = list(found.values())
    if not chosen:
        raise HippynnError(f"no tensors {prefix or ''}{pattern} among the weights")
    if any(not _alike(chosen[0], other) for other in chosen[1:]):
        raise HippynnError(
            f"several modules in the weights; the settings have to say which by its prefix: "
            f"{', '.join(sorted(found))}"
        )
    return chosen[0]


def _alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a
    )


def _network(part: NetworkPart, target: int | None) -> Hipnn:
    config, columns = config_of(part.settings)
    model = Hipnn(config, backend="torch")
    n_permuted = load_network(model, part.state, columns)
    orders = {level: torch.tensor(columns) for level in range(n_permuted)}
    if len(part.heads) > 1 or part.heads[0].coefficient != 1.0:
        model.double()  # float32 readouts would be rounded once more
    reference = torch.zeros(len(config.species), dtype=torch.float64)
    for head in part.heads:
        reference += head.coefficient * _add_head(model, head, orders, target)
    if not reference.any():
        return model
    whole = Hipnn(replace(config, reference_energies=tuple(reference.tolist())))
    whole.to(model.encoder.dtype).load_state_dict(model.state_dict())
    return whole


@torch.no_grad()
def _add_head(model: Hipnn, head: Head, orders: Mapping[int, Tensor], target: int | None) -> Tensor:
    """Adds a head to the readouts of the blocks; returns its energy of each species (float64)."""
    weights, biases = _linears(model, head, target)
    weights = {k: w[orders[k]] if k in orders else w for k, w in weights.items()}
    atomization = head.kind == "AtomizationEnergyNode"
    own = Hipnn(model.config, backend="torch").double()
    own.load_state_dict(model.state_dict())
    species_energy = torch.zeros(len(model.species), dtype=torch.float64)
    for level, readout in enumerate(model.readouts):
        linear, alone = cast(nn.Linear, readout), cast(nn.Linear, own.readouts[level])
        alone.weight.zero_()
        weight, bias = weights.get(level), biases.get(level)
        if level == 0:
            if weight is not None:
                species_energy += weight.double()
            if bias is not None:
                species_energy += bias.double()
            continue
        alone.bias.zero_()
        if weight is not None:
            alone.weight.copy_(weight[None])
            linear.weight.add_((head.coefficient * weight.to(linear.weight))[None])
        if bias is not None:
            linear.bias.add_(head.coefficient * bias.to(linear.bias))
    if not atomization:
        return species_energy
    # Relative to isolated atoms: minus what the layers make of them.
    isolated = [Structure(np.array([z]), np.zeros((1, 3))) for z in model.species]
    batch = Batch.from_structures(isolated, model.rcut)
    alone_energy: Tensor = own(batch.species, batch.pairs, batch.r_ij)
    return species_energy - alone_energy


def _linears(
    model: Hipnn, head: Head, target: int | None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Weights (width,) and biases () of a head, by level."""
    shift = 1 if head.first_is_interacting or head.kind == "AtomizationEnergyNode" else 0
    weights: dict[int, Tensor] = {}
    biases: dict[int, Tensor] = {}
    for key, value in head.state.items():
        _, number, name = key.split(".")
        level, n_target = int(number) + shift, value.shape[0]
        if n_target > 1 and target is None:
            raise HippynnError(
                f"this head predicts {n_target} energies: say which, 0 to {n_target - 1} (--target)"
            )
        row = (target or 0) if n_target > 1 else 0
        if not 0 <= row < n_target:
            raise HippynnError(f"no energy number {row}: this head predicts {n_target}, from 0 on")
        (weights if name == "weight" else biases)[level] = value[row]
    expected = model.config.widths
    for level, weight in weights.items():
        if level >= len(expected) or weight.shape[0] != expected[level]:
            raise HippynnError(
                f"the energy head reads {weight.shape[0]} features of level {level}; the network "
                f"has {expected[level] if level < len(expected) else 'no such level'}"
            )
    return weights, biases


@torch.no_grad()
def _rescaled(model: Hipnn, energy: float, length: float) -> Hipnn:
    if energy == 1.0 and length == 1.0:
        return model
    old = model.config
    config = replace(
        old,
        rcut=old.rcut * length,
        r_min=old.r_min * length,
        r_max=min(old.r_max * length, old.rcut * length),
        pair_cutoff=None if old.pair_cutoff is None else old.pair_cutoff * length,
        reference_energies=tuple(e * energy for e in old.reference_energies),
    )
    scaled = Hipnn(config, backend="torch").double()
    scaled.load_state_dict(model.state_dict())
    for name, parameter in scaled.named_parameters():
        if name.endswith(("sensitivity.mu", "sensitivity.sigma")):
            parameter.mul_(length)
        elif name.startswith("readouts."):
            parameter.mul_(energy)
    return scaled
