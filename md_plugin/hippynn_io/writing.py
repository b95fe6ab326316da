"""The same potential in hippynn, with the same weights.

    to_hippynn       a live energy node; needs hippynn
    export_hippynn   a folder with state dicts and settings, from which hippynn builds it; does not

hippynn's network has one energy for all precisions: reference energies move into the first layer
of its energy head and are rounded to the precision of the weights there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from md_plugin.checkpoint import load_model
from md_plugin.hippynn_io.files import EXPORTED
from md_plugin.hippynn_io.settings import HippynnError, settings_of
from md_plugin.hippynn_io.state import energy_state, hippynn_state
from md_plugin.model.config import make_activation
from md_plugin.model.hipnn import Hipnn, HipnnSum
from md_plugin.potential import Potential


def to_hippynn(model: Hipnn | HipnnSum | Potential, *, periodic: bool = True) -> Any:
    """A hippynn energy node (HEnergyNode) that computes the same energy as `model`, in eV and Å.

    Args:
        model: the network or potential to copy; it is not changed. The twin has its dtype.
        periodic: whether the graph takes a cell.

    Returns:
        The node; `hippynn.interfaces.ase_interface.HippynnCalculator(node, en_unit=1.0)` runs it.

    Raises:
        HippynnError: a sum of networks, or one whose pairs end before its cutoff.
        ImportError: hippynn is not installed.
    """
    try:
        from hippynn.graphs import inputs, networks, targets
    except ImportError as error:
        raise ImportError("hippynn is needed for this: pip install 'md-plugin[hippynn]'") from error
    network = _single(model)
    settings = settings_of(network.config)
    parents: tuple[Any, ...] = (inputs.SpeciesNode(db_name="Z"), inputs.PositionsNode(db_name="R"))
    if periodic:
        parents = (*parents, inputs.CellNode(db_name="C"))
    kwargs = live_kwargs(settings["module_kwargs"])
    twin = getattr(networks, settings["network"])(
        "network", parents, module_kwargs=kwargs, periodic=periodic
    )
    energy = targets.HEnergyNode("energy", twin)
    dtype = network.encoder.dtype
    twin.torch_module.to(dtype).load_state_dict(hippynn_state(network))
    energy.torch_module.to(dtype).load_state_dict(energy_state(network))
    return energy


def live_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """module_kwargs for hippynn: with its classes and modules in place of their names."""
    kwargs = dict(kwargs)
    kwargs["activation"] = make_activation(kwargs["activation"])
    kind = kwargs["sensitivity_type"]
    if isinstance(kind, dict):
        from functools import partial

        from hippynn.layers.hiplayers import SensitivityBottleneck

        kwargs["sensitivity_type"] = partial(SensitivityBottleneck, **kind)
    return kwargs


def export_hippynn(model: str | Path | Hipnn | HipnnSum | Potential, folder: str | Path) -> Path:
    """Write what hippynn needs to build the potential; see docs/hippynn.md for how it does.

    Args:
        model: a potential, network, `.hipnn` file or name of a bundled model.
        folder: gets network.pt and energy.pt, state dicts of hippynn's two modules, and
            settings.json, which also `import_hippynn` reads.

    Raises:
        HippynnError: see `to_hippynn`.
        FileExistsError: the folder holds such files already.
    """
    if isinstance(model, str | Path):
        model = load_model(model, device="cpu", dtype="float64")
    network, folder = _single(model), Path(folder)
    there = [name for name in EXPORTED if (folder / name).exists()]
    if there:
        raise FileExistsError(f"{folder} already holds {', '.join(there)}: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    states = {"network": hippynn_state(network), "energy": energy_state(network)}
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
    settings = settings_of(network.config) | {"energy_unit": "eV", "length_unit": "angstrom"}
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def _single(model: Hipnn | HipnnSum | Potential) -> Hipnn:
    network = model.model if isinstance(model, Potential) else model
    if len(network.parts) > 1:
        raise HippynnError(
            f"this model is the sum of {len(network.parts)} networks, which is not one network of "
            "hippynn"
        )
    single = network.parts[0]
    if single.config.pair_cutoff is not None:
        raise HippynnError(
            f"in this model pairs end at {single.config.pair_cutoff} Å, before the cutoff function "
            "vanishes: hippynn has that in a pair finder, not in a network"
        )
    return single
