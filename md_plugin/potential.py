"""Potential: energies, forces and virial of a network, from one autograd call.

The only place that asks autograd for forces. The network sees pair vectors r_ij alone, so one
backward pass gives dE/dr_ij, and forces and virials are the sums over pairs of
`md_plugin.evaluation`, for molecules, crystals and ghosts alike. With ghosts, forces have rows
for them too: they belong to the owners and are sent there by the engine.

dtype "float64": everything in float64. "float32": geometry and network in float32. "mixed":
geometry, sums of energies and sums of forces in float64, network in float32. "fast": as "mixed",
float16 operands in the sums of fused layers on a GPU. Energies are summed in float64 in every mode.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, are_deterministic_algorithms_enabled

from md_plugin.devices import choose_device
from md_plugin.elements import symbols
from md_plugin.evaluation import Evaluation, Wanted, pair_moment, segment_sum
from md_plugin.halo import Halo, MomentHalo, NoHalo
from md_plugin.kernels.registry import get_backend
from md_plugin.model.hipnn import Hipnn, HipnnSum
from md_plugin.neighbours import Batch, Structure
from md_plugin.pairs import Geometry, Pairs

if TYPE_CHECKING:
    from md_plugin.model.device_step import FusedStep

logger = logging.getLogger("md_plugin")

# dtype name -> (geometry, network)
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "mixed": (torch.float64, torch.float32),
    "fast": (torch.float64, torch.float32),
}


class Potential:
    """A network with a device, a precision and what is known about its training.

    Args:
        model: the network; moved and cast in place.
        device: where it computes; "auto" takes CUDA if there is one.
        dtype: "mixed", "float64", "float32" or "fast".
        info: training summary and the like, as stored in the checkpoint.

    Attributes:
        graphs: whether fused steps on a GPU are recorded in CUDA graphs: "auto" does so where it
            pays, "always", "never"; see `md_plugin.model.device_step`. MD_PLUGIN_GRAPHS sets it.
    """

    def __init__(
        self,
        model: Hipnn | HipnnSum,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "mixed",
        info: Mapping[str, Any] | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.device = choose_device(device)
        self.dtype = dtype
        self.geometry_dtype, network_dtype = DTYPES[dtype]
        self.model = model.to(self.device, network_dtype)
        self.info, self.graphs = dict(info or {}), os.environ.get("MD_PLUGIN_GRAPHS") or "auto"
        # Walking through the modules to their parameters would take longer than 50 atoms.
        self._layers = [m._parameters for m in self.model.modules() if m._parameters]
        self._warned_close = False
        self._moved: tuple[Pairs, Geometry] | None = None  # the last list; on the device
        self._fused: tuple[Any, FusedStep] | None = None
        _ = self._step() if dtype == "fast" else None  # raises where there is no such thing

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that the model knows."""
        return self.model.species

    @property
    def rcut(self) -> float:
        """Cutoff, Å."""
        return self.model.rcut

    @property
    def n_exchanges(self) -> int:
        """Feature exchanges per energy where there are ghosts: interaction layers - 1."""
        return self.model.n_exchanges

    @property
    def n_feat(self) -> int:
        """Features per atom in an exchange, at most."""
        return self.model.n_feat

    def evaluate(
        self, structures: Structure | Sequence[Structure] | Batch, *, forces: bool = True
    ) -> Evaluation:
        """Evaluate one structure or a batch of many; neighbours are built here.

        Args:
            structures: structures, or a `Batch` whose neighbours are already there.
            forces: whether to compute forces and virial.

        Raises:
            ValueError: unknown element, positions that are not finite, or an unusable cell.
        """
        batch = [structures] if isinstance(structures, Structure) else structures
        if not isinstance(batch, Batch):
            batch = Batch.from_structures(batch, self.rcut)
        self.check_species(batch.species)
        batch = batch.to(self.device)
        return self.evaluate_pairs(
            batch.species,
            batch.pairs,
            batch.r_ij,
            structure=batch.structure,
            n_structures=batch.n_structures,
            forces=forces,
        )

    def evaluate_geometry(
        self,
        species: Tensor,
        geometry: Geometry,
        *,
        halo: Halo | None = None,
        structure: Tensor | None = None,
        n_structures: int = 1,
        forces: bool = True,
        per_atom: bool = False,
        results_on: torch.device | None = None,
    ) -> Evaluation:
        """Evaluate structures from positions and a list that may reach beyond the cutoff.

        Takes the fused path where there is one (see `why_not_fused`), which keeps nothing per pair.
        Nothing is checked here: see `check_species`.

        Args:
            species: (n_send,) atomic numbers, local atoms then ghosts.
            geometry: positions and pairs, on any device.
            halo: makes features of ghosts known; None where there are no ghosts.
            structure, n_structures, forces: see `evaluate_pairs`.
            per_atom: whether virials of atoms are needed.
            results_on: where the fused path puts results; None: where the positions are.
        """
        if forces and not self.why_not_fused():
            wanted = Wanted(results_on or geometry.x.device, structure, n_structures, per_atom)
            found = self._evaluate_fused(species, geometry, halo, wanted)
            if found is not None:
                return found
        place = self._on_device(geometry)
        r_ij = place.r_ij()
        self.check_distances(r_ij)
        which: dict[str, Any] = {"structure": structure, "n_structures": n_structures}
        return self.evaluate_pairs(species, place.pairs, r_ij, halo=halo, forces=forces, **which)

    def _on_device(self, geometry: Geometry) -> Geometry:
        """The geometry where the network is; a list that stays the same is copied once."""
        if self._moved is None or self._moved[0] is not geometry.pairs:
            self._moved = geometry.pairs, geometry.to(self.device)
        kept = self._moved[1]
        return replace(geometry, pairs=kept.pairs, translation=kept.translation).to(self.device)

    def why_not_fused(self) -> str:
        """Why fused inference is not available; "" where it is."""
        from md_plugin.model import fusion  # here: it imports numba

        reasons = dict.fromkeys(fusion.why_not(part, self._backend) for part in self.model.parts)
        return "; ".join(filter(None, reasons))

    @property
    def _backend(self) -> str:
        return get_backend(self.model.backend, self.device).name

    def _evaluate_fused(
        self, species: Tensor, geometry: Geometry, halo: Halo | None, wanted: Wanted
    ) -> Evaluation | None:
        """None where it is not finite, and no other rank waits: the other path finds out why."""
        place, species = self._on_device(geometry), species.to(self.device)
        if are_deterministic_algorithms_enabled() and self._backend == "triton":
            place.pairs.check_mutual()
        found = self._step().evaluate(species, place, halo, wanted.split).to(wanted.home)
        finite, closest = found.summary()
        if halo is None and not finite:
            return None
        self._check_closest(closest)
        return wanted.evaluation(found, geometry.pairs)

    def _step(self) -> FusedStep:
        """That of these weights, made anew where one of them has changed."""
        from md_plugin.model import device_step, fusion

        known: list[Any] = [self._backend, self.graphs, are_deterministic_algorithms_enabled()]
        for layer in self._layers:
            known += [(p.data_ptr(), p._version) for p in layer.values() if p is not None]
        if self._fused is None or self._fused[0] != known:
            fast = self.dtype == "fast"
            parts = [fusion.FusedHipnn(m, self._backend, fast) for m in self.model.parts]
            self._fused = known, device_step.fused_step(parts, self.device, self.graphs)
        return self._fused[1]

    def evaluate_pairs(
        self,
        species: Tensor,
        pairs: Pairs,
        r_ij: Tensor,
        *,
        halo: Halo | None = None,
        structure: Tensor | None = None,
        n_structures: int = 1,
        forces: bool = True,
        create_graph: bool = False,
        n_local: int | None = None,
        positions: Tensor | None = None,
        backend: str | None = None,
    ) -> Evaluation:
        """Evaluate given pairs. Nothing is checked here: see `check_species`, `check_distances`.

        Args:
            species: (n_send,) atomic numbers, local atoms then ghosts.
            pairs: who sees whom; may hold pairs beyond the cutoff.
            r_ij: (n_pair, 3), Å, any float dtype.
            halo: makes features of ghosts known; None where there are no ghosts.
            structure: (n_recv,) which structure each atom belongs to; None for one structure.
            n_structures: how many structures there are.
            forces: whether to compute forces and virial.
            create_graph: keep the graph, to differentiate the forces again (training).
            n_local: how many of the first receivers count in the energy; None for all. Others are
                ghosts whose features are computed here because no halo knows them.
            positions: (n_send, 3), Å, of which r_ij are the differences: asks for `pair_moment`.
            backend: overrides the model's backend for this call.
        """
        r_ij = r_ij.detach().to(self.geometry_dtype).requires_grad_(forces)
        moments = None if positions is None else self._moments(halo, positions)
        gradient = moment = None
        # Also inside a caller's torch.no_grad(): forces are made of gradients.
        with torch.set_grad_enabled(forces or create_graph):
            atom_energy = self.model(species, pairs, r_ij, moments or halo, backend)[:n_local]
            energy = segment_sum(atom_energy, structure, n_structures)
            if forces:
                # Summing over structures is harmless: each r_ij belongs to one of them.
                total, keep = atom_energy.sum(), create_graph or moments is not None
                (gradient,) = torch.autograd.grad(
                    total, r_ij, create_graph=create_graph, retain_graph=keep
                )
                if moments is not None:
                    moment = pair_moment(atom_energy, r_ij, gradient, moments, pairs)
        if not create_graph:
            energy, atom_energy, r_ij = energy.detach(), atom_energy.detach(), r_ij.detach()
        return Evaluation(energy, atom_energy, gradient, pairs, r_ij, structure, moment)

    def _moments(self, halo: Halo | None, positions: Tensor) -> MomentHalo:
        centred = positions - positions.mean(dim=0) if len(positions) else positions
        return MomentHalo(halo or NoHalo(), centred.to(self.device, self.geometry_dtype))

    def check_species(self, species: Tensor | np.ndarray) -> None:
        """Raise ValueError naming every element that the model was not made for."""
        missing = sorted(set(torch.as_tensor(species).tolist()) - set(self.species))
        if missing:
            raise ValueError(
                f"the model knows {symbols(self.species)}, but the structure also has "
                f"{symbols(missing)}; use a model that was trained with "
                f"{'this element' if len(missing) == 1 else 'these elements'}"
            )

    def check_distances(self, r_ij: Tensor) -> None:
        """Warn once where atoms come closer than anything the model was trained on."""
        if "r_closest" in self.info and not self._warned_close and r_ij.numel():
            self._check_closest(float(r_ij.square().sum(dim=1).min().sqrt()))

    def _check_closest(self, r: float) -> None:
        closest = self.info.get("r_closest")
        if closest is not None and not self._warned_close and r < closest:
            self._warned_close = True
            logger.warning(
                "atoms are %.3f Å apart; the closest pair in the training data of this model is "
                "%.3f Å: energies and forces are extrapolated (this warning comes once)",
                r,
                closest,
            )

    def __repr__(self) -> str:
        parts = self.model.parts
        kinds = " + ".join(part.config.kind for part in parts)
        layers = " + ".join(str(part.config.n_interactions) for part in parts)
        way = "closed sums" if self.why_not_fused() else "fused layers"
        return (
            f"Potential({kinds}, {symbols(self.species)}, {layers} interaction layers, "
            f"rcut={self.rcut} Å, dtype={self.dtype!r}, device={str(self.device)!r}, "
            f"backend={self._backend!r}, {way})"
        )
