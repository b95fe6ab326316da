"""Committee: several potentials as one. Means of energies, forces and virials, and their spread.

    E = mean_m E^m        F_i = mean_m F_i^m
    energy_std_i = sqrt(mean_m (E_i^m - E_i)^2)
    force_std_i  = sqrt(mean_m |F_i^m - F_i|^2)

The spread of forces is the usual sign that a structure lies outside of what the members were
trained on (query by committee; the "model deviation" of DeePMD-kit is defined in this way).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from md_plugin.evaluation import Evaluation, Totals, Wanted
from md_plugin.halo import Halo
from md_plugin.pairs import Geometry, Pairs
from md_plugin.potential import Potential


class Committee(Potential):
    """Potentials that know the same elements, evaluated together, wherever a `Potential` fits.

    Args:
        members: at least two potentials on the same device, of the same precision.

    Raises:
        ValueError: the members do not fit together.
    """

    def __init__(self, members: Sequence[Potential]):
        if len(members) < 2:
            raise ValueError(f"a committee needs at least two models, got {len(members)}")
        first = members[0]
        for k, member in enumerate(members[1:], start=2):
            for name in ("species", "device", "dtype"):
                a, b = getattr(first, name), getattr(member, name)
                if a != b:
                    raise ValueError(
                        f"the models of a committee must have the same {name}: {a} in the first, "
                        f"{b} in number {k}"
                    )
        self.members = tuple(members)
        self.device, self.dtype = first.device, first.dtype
        self.info = first.info
        self._moved = None

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that the members know."""
        return self.members[0].species

    @property
    def rcut(self) -> float:
        """Largest cutoff of the members, Å."""
        return max(member.rcut for member in self.members)

    @property
    def n_exchanges(self) -> int:
        """Most exchanges that a member needs."""
        return max(member.n_exchanges for member in self.members)

    @property
    def n_feat(self) -> int:
        """Widest exchange of the members."""
        return max(member.n_feat for member in self.members)

    def evaluate_pairs(
        self, species: Tensor, pairs: Pairs, r_ij: Tensor, **settings: Any
    ) -> Evaluation:
        """See `Potential.evaluate_pairs`; `members` of the result holds what each member says."""
        if settings.get("create_graph"):
            raise ValueError("a committee is not trained as a whole; train its members")
        found = tuple(m.evaluate_pairs(species, pairs, r_ij, **settings) for m in self.members)
        first = found[0]
        return Evaluation(
            _mean([f.energy for f in found]),
            _mean([f.atom_energy for f in found]),
            _mean([f.pair_gradient for f in found]),
            pairs,
            first.r_ij,
            first.structure,
            _mean([f.pair_moment for f in found]),
            members=found,
        )

    @property
    def graphs(self) -> str:
        """See `Potential.graphs`; set for all members."""
        return self.members[0].graphs

    @graphs.setter
    def graphs(self, graphs: str) -> None:
        for member in self.members:
            member.graphs = graphs

    def _evaluate_fused(
        self, species: Tensor, geometry: Geometry, halo: Halo | None, wanted: Wanted
    ) -> Evaluation | None:
        each = [m._evaluate_fused(species, geometry, halo, wanted) for m in self.members]
        found = tuple(f for f in each if f is not None)
        if len(found) < len(each):
            return None
        return Evaluation(
            _mean([f.energy for f in found]),
            _mean([f.atom_energy for f in found]),
            None,
            geometry.pairs,
            found[0].r_ij,
            found[0].structure,
            members=found,
            sums=Totals(
                _mean([f.forces for f in found]),
                _mean([f.virial for f in found]),
                _mean([f.atom_virial for f in found]),
            ),
        )

    def why_not_fused(self) -> str:
        """See `Potential.why_not_fused`; the first member that has a reason tells it."""
        return next(filter(None, (m.why_not_fused() for m in self.members)), "")

    def check_distances(self, r_ij: Tensor) -> None:
        """See `Potential.check_distances`; each member warns by itself."""
        for member in self.members:
            member.check_distances(r_ij)

    def __repr__(self) -> str:
        return f"Committee of {len(self.members)}, first: {self.members[0]!r}"


def force_std(forces: Tensor) -> Tensor:
    """(n_models, n, 3) forces of each member -> (n,) spread."""
    return (forces - forces.mean(dim=0)).square().sum(dim=2).mean(dim=0).sqrt()


def energy_std(energies: Tensor) -> Tensor:
    """(n_models, n) energies of each member -> (n,) spread."""
    return (energies - energies.mean(dim=0)).square().mean(dim=0).sqrt()


def _mean(values: Sequence[Tensor | None]) -> Any:
    if values[0] is None:
        return None
    return torch.stack([v for v in values if v is not None]).mean(dim=0)
