"""hippynn's state dicts, and what their tensors are called here. Needs no hippynn.

Names map layer for layer (block k, layer l; l = 0 is the interaction layer):

    here                                        hippynn
    blocks.k.l.layer, .out, .adjust             blocks.k.l.base_layer, .res_layer, .adjust_layer
    blocks.k.0.layer.weight (n_nu, in, out)     ....int_weights (n_nu, out, in)
    blocks.k.0.layer.self_interaction           ....selfint
    blocks.k.0.layer.sensitivity.mu, .sigma     ....sensitivity.mu, .sigma (1, n)
    blocks.k.0.layer.vector_scale               ....vecscales
    blocks.k.0.layer.quadrupole_scale           ....quadscales
    blocks.k.0.layer.mixing.mixing (m, in, out) ....mixing_weights (in, m, out)
    blocks.k.0.layer.mixing.norm_weight         ....group_norm.weight, flat
    components.projection_l (monomials, 2l+1)   tensor_extractor.pmaps.l (3, ..., 3, 2l+1)
    readouts.k and the reference energies       HEnergy.layers.k
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from md_plugin.hippynn_io.settings import HippynnError
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn
from md_plugin.model.invariants import monomials, traceless_basis


class Name(NamedTuple):
    """hippynn's name of a tensor, and the conversion in both directions."""

    name: str
    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def names(model: Hipnn) -> dict[str, Name]:
    """Our name -> hippynn's, for all of the network but the readouts."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return {
        key: _name(key, shape, model.config)
        for key, shape in shapes.items()
        if not key.startswith("readouts.")
    }


def _same(x: Tensor) -> Tensor:
    return x


def _name(key: str, shape: torch.Size, config: HipnnConfig) -> Name:
    if key.startswith("components."):
        return _projection_name(key)
    if key.startswith("activation."):
        return Name(key, _same, _same)
    blocks, k, l, part, *rest = key.split(".")
    wrapper = {"layer": "base_layer.", "out": "res_layer.", "adjust": "adjust_layer."}[part]
    front = f"{blocks}.{k}.{l}." + (wrapper if config.residual else "")
    tail = ".".join(rest)
    if part != "layer" or l != "0":
        return Name(front + tail, _same, _same)
    sensitivity = "sensitivity." + ("base_sense." if config.n_gaussians is not None else "")
    flat = lambda x: x.reshape(shape)  # noqa: E731
    table: dict[str, Name] = {
        "weight": Name("int_weights", lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)),
        "self_interaction.weight": Name("selfint.weight", _same, _same),
        "self_interaction.bias": Name("selfint.bias", _same, _same),
        "sensitivity.mu": Name(sensitivity + "mu", flat, lambda x: x[None]),
        "sensitivity.sigma": Name(sensitivity + "sigma", flat, lambda x: x[None]),
        "sensitivity.matching": Name("sensitivity.matching", _same, _same),
        "vector_scale": Name("vecscales", _same, _same),
        "quadrupole_scale": Name("quadscales", _same, _same),
        "mixing.mixing": Name(
            "mixing_weights", lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)
        ),
        "mixing.norm_weight": Name("group_norm.weight", flat, torch.flatten),
        "mixing.norm_bias": Name("group_norm.bias", flat, torch.flatten),
    }
    theirs = table[tail]
    return theirs._replace(name=front + theirs.name)


def _projection_name(key: str) -> Name:
    order = int(key[-1])
    index = {m: k for k, m in enumerate(monomials(order))}
    cells = list(product(range(3), repeat=order))
    row = torch.tensor([index[tuple(sorted(cell))] for cell in cells])
    count = torch.bincount(row)

    def to_ours(full: Tensor) -> Tensor:
        flat = full.double().reshape(3**order, -1)
        return flat.new_zeros(len(index), flat.shape[1]).index_add(0, row, flat)

    def to_theirs(matrix: Tensor) -> Tensor:
        return (matrix / count[:, None])[row].reshape(*[3] * order, -1)

    return Name(f"tensor_extractor.pmaps.{order}", to_ours, to_theirs)


def load_network(model: Hipnn, state: Mapping[str, Any], columns: list[int]) -> int:
    """Copy hippynn's weights into `model`, whose readouts are set to zero.

    Args:
        model: the network; takes the widest dtype of the state.
        state: state dict of hippynn's network module.
        columns: from `config_of`.

    Returns:
        How many levels of features, from the species on, have their entries in the order of
        `columns` with respect to hippynn's.

    Raises:
        HippynnError: names or shapes that do not belong to this architecture.
    """
    table = names(model)
    weights = [v for v in state.values() if isinstance(v, Tensor) and v.is_floating_point()]
    model.to(max((w.dtype for w in weights), key=lambda dtype: dtype.itemsize))
    missing = [theirs.name for theirs in table.values() if theirs.name not in state]
    extra = set(state) - {theirs.name for theirs in table.values()}
    extra = {key for key in extra if not _is_known(key, state[key], model.config)}
    if missing or extra:
        raise HippynnError(
            "the weights do not belong to these settings: "
            + "; ".join(
                f"{what} {', '.join(sorted(keys)[:4])}{' ...' if len(keys) > 4 else ''}"
                for what, keys in (("missing", missing), ("not expected", extra))
                if keys
            )
        )
    loaded = {key: _converted(theirs, state[theirs.name]) for key, theirs in table.items()}
    permuted = _permute_species(loaded, model.config, columns)
    readouts = {k: torch.zeros_like(v) for k, v in model.state_dict().items() if k not in loaded}
    try:
        model.load_state_dict({**loaded, **readouts})
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise HippynnError(f"the weights do not fit these settings: {' '.join(lines)}") from error
    return permuted


def _permute_species(loaded: dict[str, Tensor], config: HipnnConfig, columns: list[int]) -> int:
    """hippynn's order of species -> ours, in place; returns how many levels of features follow.

    Where a block is as wide as its input, the residual stream passes the order on.
    """
    chosen = torch.tensor(columns)

    def take(name: str, dim: int) -> None:
        loaded[name] = loaded[name].index_select(dim, chosen)

    for k in range(config.n_interactions):
        take(f"blocks.{k}.0.layer.weight", 1)
        take(f"blocks.{k}.0.layer.self_interaction.weight", 1)
        if f"blocks.{k}.0.adjust.weight" in loaded:
            take(f"blocks.{k}.0.adjust.weight", 1)
            return k + 1
        if not config.residual:
            return k + 1
        for l in range(config.n_atom_layers + 1):
            take(f"blocks.{k}.{l}.out.weight", 0)
            take(f"blocks.{k}.{l}.out.bias", 0)
            if l > 0:
                take(f"blocks.{k}.{l}.layer.weight", 1)
    return config.n_interactions + 1


def _converted(theirs: Name, tensor: Tensor) -> Tensor:
    try:
        return theirs.to_ours(tensor.detach().cpu())
    except RuntimeError as error:
        raise HippynnError(
            f"the weights do not fit these settings: {theirs.name} has the shape "
            f"{tuple(tensor.shape)}"
        ) from error


def _is_known(key: str, value: Any, config: HipnnConfig) -> bool:
    """Entries of a state dict that carry no weights of their own."""
    if key.endswith("_extra_state"):
        if value["cusp_reg"] != config.cusp:
            raise HippynnError(
                f"cusp_reg is {value['cusp_reg']} in the weights and {config.cusp} in the settings"
            )
        return True
    if ".cmaps." in key:  # the bases of traceless tensors, always all
        return torch.equal(value.detach().cpu().double(), _cmap(int(key[-1])))
    if key.startswith("tensor_extractor.pmaps."):  # the scalar's and the vector's: identities
        return int(key[-1]) < 2
    return ".activation." in key  # hippynn shares one module between all layers


def _cmap(order: int) -> Tensor:
    """hippynn's (3, ..., 3, 2 order + 1) basis of traceless tensors; that of scalars is (1, 1)."""
    if order == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    return traceless_basis(order).reshape([3] * order + [2 * order + 1])


def hippynn_state(model: Hipnn) -> dict[str, Any]:
    """State dict of hippynn's network module with the weights of `model`."""
    config, ours = model.config, model.state_dict()
    state: dict[str, Any] = {}
    dtype = model.encoder.dtype
    for key, theirs in names(model).items():
        state[theirs.name] = theirs.to_theirs(ours[key].detach()).contiguous().clone().to(dtype)
    base = "base_layer." if config.residual else ""
    for k in range(config.n_interactions):
        if config.order and not config.n_max:
            state[f"blocks.{k}.0.{base}_extra_state"] = {"cusp_reg": config.cusp}
        for order in range(4) if config.n_max else ():
            state[f"blocks.{k}.0.{base}invars.cmaps.{order}"] = _cmap(order).to(dtype)
        if "activation.weight" in ours and config.residual:
            for l in range(1 + config.n_atom_layers):
                state[f"blocks.{k}.{l}.activation.weight"] = ours["activation.weight"].clone()
    if config.n_max:
        state["tensor_extractor.pmaps.0"] = torch.ones(1, 1, dtype=dtype)
        if config.order:
            state["tensor_extractor.pmaps.1"] = torch.eye(3, dtype=dtype)
    return state


def energy_state(model: Hipnn) -> dict[str, Tensor]:
    """State dict of hippynn's HEnergy module with the readouts of `model`."""
    state: dict[str, Tensor] = {}
    for level, readout in enumerate(model.readouts):
        for key, value in readout.state_dict().items():
            state[f"layers.{level}.{key}"] = value.detach().clone()
    known = model.config.reference_energies or (0.0,) * len(model.species)
    first = state["layers.0.weight"]
    state["layers.0.weight"] = first + torch.tensor(known, dtype=torch.float64).to(first)[None]
    return state
