"""Potential: energies, forces and virial of a network, from one autograd call.

The only place that asks autograd for forces. The network sees pair vectors r_ij alone, so

    g_p      = dE / d r_ij(p)                                      one backward pass
    F_i      = sum_{p: receiver i} g_p - sum_{p: sender i} g_p
    W        = - sum_p r_p (x) g_p           virial;  stress = -W / volume in ASE's sign

hold for molecules, crystals and ghosts alike. With ghosts, F has rows for them too: they belong
to the owners and are sent there by the engine.

dtype "float64": everything in float64. "float32": geometry and network in float32. "mixed":
geometry, sums of energies and sums of forces in float64, network in float32. Energies are summed
in float64 in every mode.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md_plugin.elements import symbols
from md_plugin.halo import Halo
from md_plugin.kernels.registry import get_backend
from md_plugin.model.hipnn import Hipnn
from md_plugin.neighbours import Batch, Structure
from md_plugin.pairs import Pairs

logger = logging.getLogger("md_plugin")

# dtype name -> (geometry, network)
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "mixed": (torch.float64, torch.float32),
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a potential says about one or many structures.

    Sums over pairs are taken when they are first asked for: an engine that adds up forces itself
    pays for `pair_gradient` alone.

    Attributes:
        energy: (n_structures,) float64, eV.
        atom_energy: (n_recv,) float64, eV.
        pair_gradient: (n_pair, 3) dE/dr_ij, eV/Å; None where forces were not asked for.
        pairs: the pairs that were evaluated.
        r_ij: (n_pair, 3) Å, in the geometry's dtype.
        structure: (n_recv,) structure of each atom; None for one structure.
    """

    energy: Tensor
    atom_energy: Tensor
    pair_gradient: Tensor | None
    pairs: Pairs
    r_ij: Tensor
    structure: Tensor | None = None

    @cached_property
    def forces(self) -> Tensor | None:
        """(n_send, 3) eV/Å; rows of ghosts are to be added to their owners. Or None."""
        if self.pair_gradient is None:
            return None
        return pair_forces_to_atoms(self.pair_gradient, self.pairs)

    @cached_property
    def virial(self) -> Tensor | None:
        """(n_structures, 3, 3) eV, -sum_p r_p (x) g_p. Or None."""
        if self.pair_gradient is None:
            return None
        if self.structure is None:
            return -(self.r_ij.T @ self.pair_gradient)[None]
        terms = -(self.r_ij[:, :, None] * self.pair_gradient[:, None, :])
        structure = self.structure[self.pairs.receiver]
        return segment_sum(terms, structure, self.energy.numel())

    @cached_property
    def atom_virial(self) -> Tensor | None:
        """(n_send, 3, 3) eV: half of each pair's -r (x) g to each of its atoms. Or None."""
        if self.pair_gradient is None:
            return None
        half = (-0.5 * self.r_ij[:, :, None] * self.pair_gradient[:, None, :]).flatten(1)
        atoms = half.new_zeros(self.pairs.n_send, 9).index_add(0, self.pairs.receiver, half)
        return atoms.index_add(0, self.pairs.sender_long, half).reshape(-1, 3, 3)


class Potential:
    """A network with a device, a precision and what is known about its training.

    Args:
        model: the network; moved and cast in place.
        device: where it computes; "auto" takes CUDA if there is one.
        dtype: "mixed", "float64" or "float32".
        info: training summary and the like, as stored in the checkpoint.
    """

    def __init__(
        self,
        model: Hipnn,
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
        self.info = dict(info or {})
        self._warned_close = False

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that the model knows."""
        return self.model.config.species

    @property
    def rcut(self) -> float:
        """Cutoff, Å."""
        return self.model.config.rcut

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
        if isinstance(structures, Structure):
            structures = [structures]
        batch = structures
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
            backend: overrides the model's backend for this call.
        """
        r_ij = r_ij.detach().to(self.geometry_dtype).requires_grad_(forces)
        gradient = None
        # Also inside a caller's torch.no_grad(): forces are made of gradients.
        with torch.set_grad_enabled(forces or create_graph):
            atom_energy = self.model(species, pairs, r_ij, halo, backend)
            energy = segment_sum(atom_energy, structure, n_structures)
            if forces:
                # Summing over structures is harmless: each r_ij belongs to one of them.
                total = atom_energy.sum()
                (gradient,) = torch.autograd.grad(total, r_ij, create_graph=create_graph)
        if not create_graph:
            energy, atom_energy, r_ij = energy.detach(), atom_energy.detach(), r_ij.detach()
        return Evaluation(energy, atom_energy, gradient, pairs, r_ij, structure)

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
        closest = self.info.get("r_closest")
        if closest is None or self._warned_close or r_ij.numel() == 0:
            return
        r = float(r_ij.square().sum(dim=1).min().sqrt())
        if r < closest:
            self._warned_close = True
            logger.warning(
                "atoms are %.3f Å apart; the closest pair in the training data of this model is "
                "%.3f Å: energies and forces are extrapolated (this warning comes once)",
                r,
                closest,
            )

    def __repr__(self) -> str:
        c = self.model.config
        kind = ("HIP-NN", "HIP-NN-TS vector", "HIP-NN-TS quadrupole")[c.order]
        chosen = get_backend(self.model.backend, self.device).name
        return (
            f"Potential({kind}, {symbols(c.species)}, {c.n_interactions} interaction layers, "
            f"rcut={c.rcut} Å, dtype={self.dtype!r}, device={str(self.device)!r}, "
            f"backend={chosen!r})"
        )


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" takes CUDA if there is one.

    Raises:
        ValueError: no such device, or CUDA was asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device {str(device)!r} is not known to torch; choose auto, cpu, cuda or cuda:1 ..."
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees no CUDA device")
    return chosen


def segment_sum(values: Tensor, segment: Tensor | None, n_segments: int) -> Tensor:
    """Sum rows (n, ...) by segment -> (n_segments, ...)."""
    if segment is None:
        return values.sum(dim=0, keepdim=True)
    return values.new_zeros(n_segments, *values.shape[1:]).index_add(0, segment, values)


def pair_forces_to_atoms(gradient: Tensor, pairs: Pairs) -> Tensor:
    """dE/dr_ij (n_pair, 3) -> forces (n_send, 3): + on the receiver, - on the sender."""
    forces = gradient.new_zeros(pairs.n_send, 3)
    return forces.index_add(0, pairs.receiver, gradient).index_add(
        0, pairs.sender_long, gradient, alpha=-1
    )
