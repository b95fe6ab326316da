"""A hippynn graph, read: which networks and which energy heads add up to an energy.

    E = sum_h c_h E_h        E_h = sum_k w_hk . z^k + b_hk      a head on features of a network

Sums, differences and multiples of energies are linear in the heads; heads on one network become
one. Everything else (charges, Coulomb terms, bonds ...) is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from md_plugin.hippynn_io.network import describe_network, kind_of, output_of, state_of
from md_plugin.hippynn_io.settings import HippynnError

# node -> its outputs that are energies
_HEADS = {
    "HEnergyNode": ("mol_energy", "atom_energies"),
    "AtomizationEnergyNode": ("mol_energy",),
    "CombineEnergyNode": ("mol_energy", "atom_energies"),
    "LocalAtomEnergyNode": ("local_atom_energies", "total_local_energy"),
    "EnsembleTarget": ("mean", "all"),
}
# Rearrange atoms and molecules, or add the atoms of a molecule: the energy stays what it is.
_TRANSPARENT = ("AtomDeIndexer", "AtomReIndexer", "AtomToMolSummer")
_GRADIENTS = ("GradientNode", "MultiGradientNode", "StressForceNode")
_ALGEBRA = ("AddNode", "SubNode", "NegNode", "MulNode", "DivNode")


@dataclass
class Head:
    """One term of the energy.

    Attributes:
        coefficient: by which it counts.
        kind: "HEnergyNode" or "AtomizationEnergyNode".
        state: state dict of hippynn's module.
        first_is_interacting: whether its first layer reads the first block, not the species.
        module: hippynn's module, to compare with; None if it is not at hand.
    """

    coefficient: float
    kind: str
    state: Mapping[str, Any]
    first_is_interacting: bool
    module: Any = None


@dataclass
class NetworkPart:
    """A network and the heads that read it.

    Attributes:
        settings: see `md_plugin.hippynn_io.settings`.
        state: state dict of hippynn's module.
        heads: the terms of the energy.
        module: hippynn's module, to compare with; None if it is not at hand.
    """

    settings: Mapping[str, Any]
    state: Mapping[str, Any]
    heads: list[Head] = field(default_factory=list)
    module: Any = None


def ancestors(node: Any) -> Iterator[Any]:
    """The node and all that it is computed from, each once."""
    seen, waiting = set(), [node]
    while waiting:
        found = waiting.pop()
        if id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting.extend(found.parents)


def members_of(node: Any) -> list[Any]:
    """The energies of an ensemble, or the energy itself."""
    source, output = output_of(node)
    if kind_of(source) != "EnsembleTarget":
        return [node]
    if output == "std":
        raise HippynnError(f"{node.name} is the spread of an ensemble: give its mean")
    return list(source.parents)


def choose_energy(nodes: list[Any], name: str | None = None, *, energy_only: bool = False) -> Any:
    """The node of the energy among the outputs of a graph.

    Args:
        nodes: outputs, e.g. `GraphModule.nodes_to_compute`.
        name: of a node or database column, anywhere in the graph; None: the only energy there is,
            or the one whose gradient is there too.
        energy_only: whether to leave charges, dipoles and the like out without complaint.

    Raises:
        HippynnError: none, or several energies, or outputs that have no counterpart.
    """
    every = {id(n): n for output in nodes for n in ancestors(output)}.values()
    if name is not None:
        found = [n for n in every if name in (n.name, n.db_name)]
        if not found:
            raise HippynnError(f"no node {name!r} in the graph; energies: {_energies(every)}")
        return found[0]
    sources = {id(n): output_of(n) for n in nodes}
    energies = [n for n in nodes if _is_energy(*sources[id(n)])]
    differentiated = [s.parents[0] for s, _ in sources.values() if kind_of(s) in _GRADIENTS]
    foreign = [n for n in nodes if n not in energies and not _goes_along(sources[id(n)][0])]
    if foreign and not energy_only:
        raise HippynnError(
            "no counterpart for "
            + ", ".join(sorted({f"{n.name} ({kind_of(sources[id(n)][0])})" for n in foreign}))
            + "; to import the energy without it, ask for the energy only (--energy-only)"
        )
    candidates = {id(output_of(n)[0]): n for n in differentiated or energies}
    if len(candidates) != 1:
        raise HippynnError(
            f"{'several energies' if candidates else 'no energy'} in the graph; say which "
            f"(--energy NAME): {_energies(every)}"
        )
    return next(iter(candidates.values()))


def _is_energy(source: Any, output: str) -> bool:
    kind = kind_of(source)
    return kind in _ALGEBRA or output in _HEADS.get(kind, ())


def _goes_along(source: Any) -> bool:
    """Outputs that follow from the energy, and so are no loss."""
    kind = kind_of(source)
    if kind in _TRANSPARENT or kind == "PerAtom":
        parent = output_of(source.parents[0])
        return _is_energy(*parent) or _goes_along(parent[0])
    return kind in _GRADIENTS or kind in ("HEnergyNode", "AtomizationEnergyNode", "EnsembleTarget")


def _energies(nodes: Any) -> str:
    found = {n.name for n in nodes if kind_of(n) in _HEADS or "Energy" in kind_of(n)}
    return ", ".join(sorted(map(repr, found))) or "none"


def read_energy(node: Any) -> list[NetworkPart]:
    """The networks that make the energy of `node`, each with its heads.

    Raises:
        HippynnError: a part that has no counterpart here, named.
    """
    parts: dict[int, NetworkPart] = {}
    for coefficient, head in _terms(node, 1.0):
        network = output_of(head.parents[0])[0]
        if id(network) not in parts:
            module = network.torch_module
            parts[id(network)] = NetworkPart(
                describe_network(network), state_of(module), module=module
            )
        module = head.torch_module
        first = bool(module.first_is_interacting)
        parts[id(network)].heads.append(
            Head(coefficient, kind_of(head), state_of(module), first, module)
        )
    return list(parts.values())


def _terms(node: Any, coefficient: float) -> Iterator[tuple[float, Any]]:
    source, output = output_of(node)
    kind, parents = kind_of(source), source.parents
    if kind in ("HEnergyNode", "AtomizationEnergyNode") and output in _HEADS[kind]:
        yield coefficient, source
    elif kind == "CombineEnergyNode":
        yield from _terms(parents[0], coefficient)
        yield from _terms(parents[1], coefficient)
    elif kind in _TRANSPARENT or kind == "LocalAtomEnergyNode":
        yield from _terms(parents[0], coefficient)
    elif kind in ("AddNode", "SubNode"):
        yield from _terms(parents[0], coefficient)
        yield from _terms(parents[1], -coefficient if kind == "SubNode" else coefficient)
    elif kind == "NegNode":
        yield from _terms(parents[0], -coefficient)
    elif kind == "MulNode" and kind_of(parents[0]) == "ValueNode":
        yield from _terms(parents[1], coefficient * _number(parents[0]))
    elif kind == "MulNode" and kind_of(parents[1]) == "ValueNode":
        yield from _terms(parents[0], coefficient * _number(parents[1]))
    elif kind == "DivNode" and kind_of(parents[1]) == "ValueNode":
        yield from _terms(parents[0], coefficient / _number(parents[1]))
    else:
        what = f"{source.name} ({kind}{', ' + output if output else ''})"
        raise HippynnError(
            f"the energy contains {what}, which has no counterpart here; to import a part of it, "
            "name its energy node (--energy NAME)"
        )


def _number(node: Any) -> float:
    try:
        return float(node.torch_module.value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HippynnError(f"the energy is multiplied by {node.name}: not one number") from error
