"""Models trained with hippynn, as potentials of md_plugin.

    from_hippynn     hippynn's objects in memory: an energy node, a graph, an ML-IAP interface
    import_hippynn   what hippynn has saved: an experiment folder, a graph module, an ML-IAP pickle,
                     or a state dict with settings in JSON (see `md_plugin.hippynn_io.settings`)

Reading hippynn's own files unpickles them, which executes whatever code is in them: it has to be
asked for (`trust`) and needs hippynn. A state dict is read without executing anything.

What is imported is compared with hippynn on random atoms before it is handed out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from md_plugin.committee import Committee
from md_plugin.hippynn_io.build import build, part_from_state
from md_plugin.hippynn_io.compare import compare
from md_plugin.hippynn_io.files import EXPORTED, read_settings, read_state, unpickled
from md_plugin.hippynn_io.graph import NetworkPart, choose_energy, members_of, read_energy
from md_plugin.hippynn_io.network import kind_of
from md_plugin.hippynn_io.settings import HippynnError
from md_plugin.potential import Potential
from md_plugin.units import ENERGY_UNITS, LENGTH_UNITS, unit_factor

logger = logging.getLogger("md_plugin")

_TRUST = (
    "{path} is a Python pickle, and reading it executes the code in it. If you trust who made it, "
    "say so (--trust). If not, ask for the state dict (best_model.pt) and the settings of the "
    "network as JSON, which are read without executing anything (--settings, see docs/hippynn.md)"
)


def from_hippynn(
    source: Any,
    *,
    energy: str | None = None,
    energy_only: bool = False,
    target: int | None = None,
    energy_unit: str | float = "eV",
    length_unit: str | float = "Å",
    device: str | torch.device = "auto",
    dtype: str = "mixed",
    backend: str | None = None,
    info: dict[str, Any] | None = None,
) -> Potential:
    """The potential that one of hippynn's objects computes.

    Args:
        source: an energy node, a `GraphModule`, an `MLIAPInterface`, or what holds a graph as
            `.graph` or `.module`. An ensemble becomes a `Committee`.
        energy: name of the energy node, or of its database column; needed where a graph has
            several energies.
        energy_only: import the energy although the graph also has charges, dipoles and the like.
        target: which energy, where a head predicts several.
        energy_unit: of the model: eV, meV, kcal/mol, kJ/mol, Hartree, Rydberg, or a number in eV.
        length_unit: of the model: Å, nm, bohr, or a number in Å.
        device: see `load_model`.
        dtype: see `load_model`.
        backend: see `load_model`.
        info: entries for the model file.

    Raises:
        HippynnError: a part has no counterpart here, is not an energy, or does not give the same
            numbers as hippynn.
        ValueError: unknown unit, device or dtype.
    """
    is_mliap = kind_of(source) == "MLIAPInterface"
    if is_mliap:
        energy_unit = _mliap_unit(source, energy_unit)
    scale = _scale(energy_unit, length_unit)
    potentials = []
    for member in members_of(_energy_node(source, energy, energy_only)):
        parts = read_energy(member)
        if is_mliap:
            parts = _cut_by_lammps(parts, 2.0 * float(source.rcutfac))
        _warn_of_jumps(parts)
        origin = _origin(f"hippynn {_version()}", parts, scale, energy=member.name)
        origin["difference"] = compare(parts, build(parts, target=target), target)
        model = build(parts, target=target, backend=backend, **scale)
        about = {**(info or {}), "origin": origin}
        potentials.append(Potential(model, device=device, dtype=dtype, info=about))
    return potentials[0] if len(potentials) == 1 else Committee(potentials)


def import_hippynn(
    source: str | Path | Sequence[str | Path],
    *,
    trust: bool = False,
    settings: str | Path | None = None,
    **options: Any,
) -> Potential:
    """The potential in a file or folder that hippynn has written.

    Args:
        source: experiment folder (experiment_structure.pt with best_model.pt or
            best_checkpoint.pt), file of a graph module or of an ML-IAP interface, or, with
            `settings`, of a state dict. Several become a `Committee`.
        trust: whether code in the files may be executed; not needed with `settings`.
        settings: JSON file that describes the network of a state dict; None looks for
            settings.json in the folder.
        options: see `from_hippynn`.

    Raises:
        HippynnError: not trusted, not readable, or see `from_hippynn`.
        ImportError: hippynn is needed and not installed.
    """
    if isinstance(source, list | tuple):
        each = [import_hippynn(one, trust=trust, settings=settings, **options) for one in source]
        members = [m for found in each for m in getattr(found, "members", (found,))]
        return members[0] if len(members) == 1 else Committee(members)
    assert isinstance(source, str | Path)
    path = Path(source)
    if not path.exists():
        raise HippynnError(f"no file or folder {path}")
    if settings is None and (path / EXPORTED[-1]).exists():
        settings = path / EXPORTED[-1]
    if settings is not None:
        return _from_state(path, Path(settings), **options)
    if not trust:
        raise HippynnError(_TRUST.format(path=path))
    thing, training = unpickled(path)
    info = {"training": training} if training else {}
    return from_hippynn(thing, info={**info, **(options.pop("info", None) or {})}, **options)


def _energy_node(source: Any, name: str | None, energy_only: bool) -> Any:
    if isinstance(source, str | Path):
        raise HippynnError(f"{source} is a path: import_hippynn reads files and folders")
    if hasattr(source, "parents"):
        return choose_energy([source], name, energy_only=energy_only) if name else source
    for holder in (source, getattr(source, "graph", None), getattr(source, "module", None)):
        nodes = getattr(holder, "nodes_to_compute", None)
        if nodes is not None:
            return choose_energy(list(nodes), name, energy_only=energy_only)
    raise HippynnError(
        f"a {kind_of(source)} is neither a node nor a graph of hippynn: give the energy node"
    )


def _scale(energy_unit: str | float, length_unit: str | float) -> dict[str, float]:
    return {
        "energy": unit_factor(energy_unit, ENERGY_UNITS),
        "length": unit_factor(length_unit, LENGTH_UNITS),
    }


def _mliap_unit(interface: Any, energy_unit: str | float) -> str | float:
    if getattr(interface, "distance_unit", None) not in (None, 1, 1.0):
        raise HippynnError(
            f"this ML-IAP interface has distance_unit={interface.distance_unit}, with which "
            "hippynn's forces are not the slope of its energy: import its energy node or its "
            "experiment folder, with the length unit of the model"
        )
    own = getattr(interface, "energy_unit", None)
    return energy_unit if own is None or energy_unit != "eV" else float(own)


def _cut_by_lammps(parts: list[NetworkPart], reach: float) -> list[NetworkPart]:
    """LAMMPS's list ends at the largest cutoff of hippynn's pair finders."""
    for part in parts:
        known = part.settings.get("pair_cutoff", part.settings["module_kwargs"]["dist_hard_max"])
        if reach < known * (1 - 1e-12):
            part.settings = {**part.settings, "pair_cutoff": reach}
    return parts


def _warn_of_jumps(parts: list[NetworkPart]) -> None:
    for part in parts:
        if "pair_cutoff" in part.settings:
            logger.warning(
                "a pair finder of this model ends at %s, before the cutoff function of its network "
                "vanishes: energies jump there, as they do in hippynn",
                part.settings["pair_cutoff"],
            )


def _version() -> str:
    import hippynn

    return str(hippynn.__version__)


def _origin(
    package: str, parts: list[NetworkPart], scale: dict[str, float], **more: str
) -> dict[str, Any]:
    return {
        "package": package,
        "network": " + ".join(part.settings["network"] for part in parts),
        **more,
        "eV per energy unit": scale["energy"],
        "angstrom per length unit": scale["length"],
    }


def _from_state(
    path: Path,
    settings_path: Path,
    *,
    target: int | None = None,
    energy_unit: str | float | None = None,
    length_unit: str | float | None = None,
    backend: str | None = None,
    energy: str | None = None,
    energy_only: bool = False,
    info: dict[str, Any] | None = None,
    **where: Any,
) -> Potential:
    if energy is not None or energy_only:
        raise HippynnError(
            "a state dict has no graph to choose an energy from: in the settings, "
            '"energy": {"prefix": ...} says which module it is'
        )
    settings, state = read_settings(settings_path), read_state(path)
    scale = _scale(
        energy_unit or settings.get("energy_unit", "eV"),
        length_unit or settings.get("length_unit", "Å"),
    )
    parts = [part_from_state(settings, state)]
    model = build(parts, target=target, backend=backend, **scale)
    origin = _origin("hippynn, from a state dict", parts, scale)
    return Potential(model, info={**(info or {}), "origin": origin}, **{"device": "auto", **where})
