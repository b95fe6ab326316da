"""A hippynn network, read: its settings, from what its layers are.

hippynn's objects are recognised by the names of their classes, so that nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import torch

from md_plugin.hippynn_io.settings import NETWORKS, HippynnError
from md_plugin.model.config import ACTIVATIONS

_SENSITIVITIES = ("InverseSensitivityModule", "GaussianSensitivityModule")


def kind_of(thing: Any) -> str:
    """Name of the class of one of hippynn's objects; of others, with their module."""
    cls = type(thing)
    return (
        cls.__name__
        if cls.__module__.startswith("hippynn.")
        else f"{cls.__module__}.{cls.__name__}"
    )


def output_of(node: Any) -> tuple[Any, str]:
    """The node that computes, and the name of the output that `node` stands for."""
    if kind_of(node) == "IndexNode":
        parent = node.parents[0]
        return parent, str(parent._output_names[node.index])
    if hasattr(type(node), "_output_names") and node.main_output is not node:
        return output_of(node.main_output)
    return node, ""


def describe_network(node: Any) -> dict[str, Any]:
    """Settings of a network, from what its layers are.

    Raises:
        HippynnError: a class of network, layer, activation or input that is not known here.
    """
    module = node.torch_module
    kind = {"HipHopNNModule": "HipHopnn"}.get(kind_of(module), kind_of(module))
    if kind not in NETWORKS:
        raise HippynnError(f"network {node.name} is a {kind}, which has no counterpart here")
    firsts = [block[0] for block in module.blocks]
    residual = kind_of(firsts[0]) == "ResNetWrapper"
    interactions = [first.base_layer if residual else first for first in firsts]
    outs = [first.res_layer.out_features for first in firsts] if residual else None
    hidden = [layer.nf_out for layer in interactions]
    kwargs = {
        "possible_species": _species_of(node),
        "n_features": outs or hidden,
        "n_sensitivities": interactions[0].n_dist,
        "dist_hard_max": _only("cutoff", [float(_cutoff(i.sensitivity)) for i in interactions]),
        "n_interaction_layers": len(firsts),
        "n_atom_layers": _only("number of atom layers", [len(b) - 1 for b in module.blocks]),
        "resnet": hidden if residual and hidden != outs else residual,
        "activation": activation_text(module.activation),
        "sensitivity_type": _sensitivity_type(interactions),
    }
    for key in ("dist_soft_min", "dist_soft_max"):
        if hasattr(module, key):
            kwargs[key] = float(getattr(module, key))
    if kind in ("HipnnVec", "HipnnQuad"):
        kwargs["cusp_reg"] = _only("cusp_reg", [float(i.cusp_reg) for i in interactions])
    if kind == "HipHopnn":
        norms = [i.group_norm for i in interactions]
        kwargs |= {"l_max": module.l_max, "n_max": module.n_max}
        kwargs |= {"group_norm": _only("group_norm", [n is not None for n in norms])}
        if norms[0] is not None:
            kwargs["group_norm_eps"] = _only("group_norm_eps", [n.eps for n in norms])
    settings: dict[str, Any] = {"network": kind, "module_kwargs": kwargs}
    reach = _reach(node)
    if reach is not None and reach < kwargs["dist_hard_max"]:
        settings["pair_cutoff"] = reach
    return settings


def _only(what: str, values: list[Any]) -> Any:
    if any(value != values[0] for value in values):
        raise HippynnError(f"layers with a {what} of their own have no counterpart here: {values}")
    return values[0]


def _species_of(node: Any) -> list[int]:
    indexer = output_of(node.parents[0])[0]
    encoder = output_of(indexer.parents[0])[0] if indexer.parents else indexer
    kinds = (kind_of(indexer), kind_of(encoder))
    if kinds != ("PaddingIndexer", "OneHotEncoder"):
        raise HippynnError(
            f"network {node.name} does not start from one-hot species but from {kinds[0]}"
        )
    return [int(z) for z in encoder.torch_module.species_set]


def _reach(node: Any) -> float | None:
    """Distance at which the pair finder of a network ends; None where it does not."""
    finder = output_of(node.parents[1])[0]
    for key in ("dist_hard_max", "hard_dist_cutoff"):
        if getattr(finder, key, None) is not None:
            return float(getattr(finder, key))
    return None


def _sensitivity_type(interactions: list[Any]) -> Any:
    """Also looks whether sensitivities and cutoffs are those that are known here."""
    kinds = []
    for interaction in interactions:
        sensitivity = interaction.sensitivity
        base = getattr(sensitivity, "base_sense", sensitivity)
        bottleneck = kind_of(sensitivity) == "SensitivityBottleneck"
        if kind_of(base) not in _SENSITIVITIES or not (bottleneck or base is sensitivity):
            raise HippynnError(f"sensitivity {kind_of(sensitivity)} has no counterpart here")
        kinds.append({"n_dist_bare": base.mu.shape[1]} if bottleneck else "inverse")
    return _only("kind of sensitivity", kinds)


def _cutoff(sensitivity: Any) -> float:
    if kind_of(sensitivity.cutoff) != "CosCutoff":
        raise HippynnError(f"cutoff {kind_of(sensitivity.cutoff)} has no counterpart here")
    return float(sensitivity.cutoff.hard_max_dist)


def activation_text(module: Any) -> str:
    """The text that `md_plugin.model.config.make_activation` reads."""
    cls = type(module)
    if not cls.__module__.startswith("torch.nn.") or cls.__name__ not in ACTIVATIONS:
        raise HippynnError(
            f"activation {kind_of(module)} has no counterpart here; known are "
            + ", ".join(ACTIVATIONS)
        )
    options = []
    for name, parameter in signature(cls.__init__).parameters.items():
        value = getattr(module, name, Parameter.empty)
        if name in ("self", "inplace", "device", "dtype") or value is Parameter.empty:
            continue
        if name == "init" and cls.__name__ == "PReLU":
            continue  # where training started
        if value != parameter.default:
            options.append(f"{name}={value!r}")
    return f"{cls.__name__}({', '.join(options)})" if options else cls.__name__


def state_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """State dict of a module, on the CPU."""
    return {
        key: value.detach().cpu() if isinstance(value, torch.Tensor) else value
        for key, value in module.state_dict().items()
    }
