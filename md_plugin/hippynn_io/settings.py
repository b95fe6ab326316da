"""hippynn's settings of a network, and the `HipnnConfig` that they mean. Needs no hippynn.

Settings are plain data, as in a JSON file beside a state dict:

    {"network": "HipnnQuad",                  Hipnn, HipnnVec, HipnnQuad or HipHopnn
     "module_kwargs": {...},                  as given to that network in hippynn
     "energy": {"node": "HEnergyNode", "first_is_interacting": false},
     "energy_unit": "eV", "length_unit": "Å"}

In module_kwargs, `activation` is the name of a class of torch.nn, with options where it has them
("LeakyReLU(negative_slope=0.1)"), and `sensitivity_type` is "inverse", "linear", or
{"n_dist_bare": 40} for a SensitivityBottleneck. Lengths are in the model's own unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from md_plugin.model.config import HipnnConfig

NETWORKS = {"Hipnn": 0, "HipnnVec": 1, "HipnnQuad": 2, "HipHopnn": 3}  # -> order, at most
ENERGIES = ("HEnergyNode", "AtomizationEnergyNode")

_KWARGS = {
    *("possible_species", "n_features", "n_sensitivities", "dist_soft_min", "dist_soft_max"),
    *("dist_hard_max", "n_interaction_layers", "n_atom_layers", "resnet", "activation"),
    *("sensitivity_type", "n_input_features"),
}
_NEEDED = (
    *("possible_species", "n_features", "n_sensitivities", "dist_hard_max", "n_atom_layers"),
    "n_interaction_layers",
)
_EXTRA_KWARGS = {
    "Hipnn": set(),
    "HipnnVec": {"cusp_reg"},
    "HipnnQuad": {"cusp_reg"},
    "HipHopnn": {"l_max", "n_max", "group_norm", "group_norm_eps"},
}


class HippynnError(ValueError):
    """A hippynn model cannot be read, or has a part that has no counterpart here."""


def config_of(settings: Mapping[str, Any]) -> tuple[HipnnConfig, list[int]]:
    """The architecture that settings describe.

    Returns:
        The configuration, and for each of its species the column that hippynn has it in.

    Raises:
        HippynnError: unknown or missing settings.
    """
    kind = settings.get("network")
    if kind not in NETWORKS:
        raise HippynnError(f"network {kind!r} is not one of {', '.join(NETWORKS)}")
    given = dict(settings.get("module_kwargs", {}))
    known = _KWARGS | _EXTRA_KWARGS[kind]
    if isinstance(given.get("n_features"), list | tuple):
        given.setdefault("n_interaction_layers", len(given["n_features"]))
    for what, keys in (
        ("unknown", sorted(set(given) - known)),
        ("missing", [k for k in _NEEDED if k not in given]),
    ):
        if keys:
            raise HippynnError(f"module_kwargs of {kind}: {what} {', '.join(keys)}")
    species, columns = _species(given["possible_species"])
    rcut = float(given["dist_hard_max"])
    # Where sensitivities start before training: of no consequence for trained ones.
    r_max = min(float(given.get("dist_soft_max", rcut)), rcut)
    r_min = float(given.get("dist_soft_min", 0.5 * r_max))
    resnet = given.get("resnet", True)
    is_width = not isinstance(resnet, bool)
    try:
        config = HipnnConfig(
            species=species,
            n_feat=given["n_features"],
            n_nu=given["n_sensitivities"],
            n_interactions=given["n_interaction_layers"],
            n_atom_layers=given["n_atom_layers"],
            rcut=rcut,
            r_min=r_min if 0 < r_min < r_max else 0.5 * r_max,
            r_max=r_max,
            n_hidden=resnet if is_width else None,
            residual=True if is_width else resnet,
            activation=str(given.get("activation", "Softplus")).removeprefix("torch.nn."),
            n_gaussians=_bottleneck(given.get("sensitivity_type", "inverse")),
            pair_cutoff=settings.get("pair_cutoff"),
            **_tensor_settings(kind, given),
        )
    except (TypeError, ValueError) as error:
        raise HippynnError(f"module_kwargs of {kind}: {error}") from error
    return config, columns


def _tensor_settings(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if kind != "HipHopnn":
        return {"order": NETWORKS[kind], "cusp": float(given.get("cusp_reg", 1e-6))}
    eps = float(given.get("group_norm_eps", 1e-5)) if given.get("group_norm", True) else None
    return {"order": given.get("l_max", 3), "n_max": given.get("n_max", 4), "norm_eps": eps}


def _species(possible: list[int]) -> tuple[tuple[int, ...], list[int]]:
    """hippynn's first entry is the padding, which is 0; the others may be in any order."""
    listed = [int(z) for z in possible]
    if not listed or listed[0] != 0 or 0 in listed[1:] or len(set(listed)) != len(listed):
        raise HippynnError(
            f"possible_species must be 0, for no atom, and then each species once, got {listed}"
        )
    ordered = sorted(listed[1:])
    return tuple(ordered), [listed.index(z) - 1 for z in ordered]


def _bottleneck(kind: Any) -> int | None:
    """Gaussians behind a bottleneck. hippynn 0.1.3 computes "linear" and "inverse" alike."""
    if kind in ("inverse", "linear"):
        return None
    if isinstance(kind, Mapping) and set(kind) == {"n_dist_bare"}:
        return int(kind["n_dist_bare"])
    raise HippynnError(
        f"sensitivity_type {kind!r} has no counterpart; known: 'inverse', 'linear', and "
        "{'n_dist_bare': 40} for a SensitivityBottleneck"
    )


def settings_of(config: HipnnConfig) -> dict[str, Any]:
    """The settings by which hippynn builds the network of `config`."""
    kwargs: dict[str, Any] = {
        "possible_species": [0, *config.species],
        "n_features": list(config.widths[1:]),
        "n_sensitivities": config.n_nu,
        "dist_soft_min": config.r_min,
        "dist_soft_max": config.r_max,
        "dist_hard_max": config.rcut,
        "n_interaction_layers": config.n_interactions,
        "n_atom_layers": config.n_atom_layers,
        "resnet": config.residual if config.n_hidden is None else list(config.hidden_widths),
        "activation": config.activation,
        "sensitivity_type": "inverse",
    }
    if config.n_gaussians is not None:
        kwargs["sensitivity_type"] = {"n_dist_bare": config.n_gaussians}
    kind = "HipHopnn" if config.n_max else ("Hipnn", "HipnnVec", "HipnnQuad")[config.order]
    if config.n_max:
        kwargs |= {"l_max": config.order, "n_max": config.n_max}
        kwargs["group_norm"] = config.norm_eps is not None
        if config.norm_eps is not None:
            kwargs["group_norm_eps"] = config.norm_eps
    elif config.order:
        kwargs["cusp_reg"] = config.cusp
    energy = {"node": "HEnergyNode", "first_is_interacting": False}
    return {"network": kind, "module_kwargs": kwargs, "energy": energy}
