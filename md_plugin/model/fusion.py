"""Energies and forces of a network from positions: fused layers, nothing kept per pair.

    m_i^k      = sum over pairs and sensitivities, times V_k     a block of atoms at once
    z_i^k      = atom layers of (norms of m_i^k + W_k z_i + b_k)
    E_i        = E_ref + sum_k readout_k(z_i^k)

and back, from the last layer to the first, a block of atoms at once: dE/dm_k comes through the
atom layers from the readout and from dE/dz^k; the sums turn it into pair forces, which are added
up where they arise, and into dE/dz^(k-1). What stays in memory is z and m of the layers before
the last: O(atoms x features). The closed sums of `md_plugin.kernels` compute the same to rounding
and can be differentiated again; this cannot, and refuses.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from md_plugin.halo import Halo, NoHalo, check_filled
from md_plugin.kernels import fused_cpu, fused_rows, fused_tensor_rows
from md_plugin.kernels.workers import one_thread, share, span
from md_plugin.model.atom_layers import AtomLayers
from md_plugin.model.fused_sums import EnvironmentSums, Sums, TensorSums
from md_plugin.model.hipnn import Hipnn
from md_plugin.pairs import Geometry

logger = logging.getLogger("md_plugin")

ATOMS_PER_THREAD = 128  # fewer are done before another thread has woken up
MAX_BLOCK = 1024  # atoms: their activations stay in the second-level cache


@dataclass(frozen=True, eq=False)
class Fused:
    """What one evaluation gives.

    Attributes:
        atom_energy: (n_recv,) float64, eV.
        forces: (n_send, 3) float64, eV/Å; rows of ghosts belong to their owners.
        virial: (3, 3) float64, eV.
        closest: distance of the closest pair, Å; infinite where there is none.
    """

    atom_energy: Tensor
    forces: Tensor
    virial: Tensor
    closest: float


def why_not(model: Hipnn) -> str:
    """Why there is no fused inference for this network; "" where there is."""
    if model.encoder.device.type != "cpu":
        return f"the network is on {model.encoder.device.type}"
    return ""


class FusedHipnn:
    """A `Hipnn` on the CPU, for energies and forces only.

    Args:
        model: the network; the radial parts of its weights are read once, when this is made.

    Raises:
        ValueError: see `why_not`.
    """

    def __init__(self, model: Hipnn):
        reason = why_not(model)
        if reason:
            raise ValueError(reason)
        _announce_compilation(bool(model.config.order))
        self.model = model
        self.index = torch.full((model.encoder.shape[0],), -1, dtype=torch.int32)
        self.index[list(model.species)] = torch.arange(len(model.species), dtype=torch.int32)
        self.layers = [_Layer(model, k) for k in range(model.config.n_interactions)]

    @torch.no_grad()
    def evaluate(self, species: Tensor, geometry: Geometry, halo: Halo | None = None) -> Fused:
        """Energies, forces and virial.

        Args:
            species: (n_send,) atomic numbers.
            geometry: positions and pairs on the CPU; pairs beyond the cutoff are skipped.
            halo: makes features of ghosts known; None where there are no ghosts.

        Raises:
            RuntimeError: the positions ask for a derivative.
            ValueError: ghosts, several layers, and no halo.
        """
        if geometry.x.requires_grad:
            raise RuntimeError(
                "fused inference gives forces that cannot be differentiated again; evaluate_pairs "
                "with create_graph=True can"
            )
        with one_thread() as available:
            n_thread = max(1, min(available, geometry.pairs.n_recv // ATOMS_PER_THREAD))
            return self._evaluate(species, geometry, halo or NoHalo(), n_thread)

    def _evaluate(self, species: Tensor, geometry: Geometry, halo: Halo, n_thread: int) -> Fused:
        pairs, where = geometry.pairs, self._where(species, geometry)
        energy = self.model.reference_energy(species[: pairs.n_recv])
        z: list[Tensor] = [self.model.encoder[species.long()]]
        energy += self.model.readouts[0](z[0][: pairs.n_recv])[:, 0].double()
        mixed: list[Tensor | None] = []
        for layer in self.layers[:-1]:
            kept, features = layer.forward(where, z[-1], energy, n_thread)
            mixed.append(kept)
            z.append(check_filled(halo.fill(features), pairs).contiguous())
        mixed.append(None)
        dtype = np.float32 if self.model.encoder.dtype == torch.float32 else np.float64
        found = fused_cpu.Gradients(pairs.n_send, 0, dtype, n_thread)
        gradient: Tensor | None = None
        for k in reversed(range(len(self.layers))):
            along, sent = self.layers[k].backward(where, z[k], mixed[k], gradient, energy, found)
            if k > 0:
                gradient = halo.adjoint(sent)[: pairs.n_recv] + along
        forces, _, virial = found.total()
        closest = float(found.closest)
        return Fused(energy, torch.from_numpy(forces), torch.from_numpy(virial), closest)

    def _where(self, species: Tensor, geometry: Geometry) -> Any:
        g = geometry
        return fused_cpu.geometry(
            g.x.numpy(),
            g.pairs.row_ptr.numpy(),
            g.pairs.sender.numpy(),
            None if g.translation is None else g.translation.numpy(),
            None if g.translations is None else g.translations.numpy(),
            self.index[species.long()].numpy(),
        )


def _announce_compilation(tensors: bool) -> None:
    """Says once per installation why the first evaluation takes longer."""
    first = fused_rows.forward_species_range
    if tensors:
        first = fused_tensor_rows.tensor_forward_range
    try:
        index = Path(first._cache._cache_file._index_path)
    except AttributeError:  # numba has changed inside: no message is lost that matters
        return
    if not index.exists():
        logger.warning(
            "compiling the fused layers for this CPU: some seconds, once per installation; kept in "
            "%s",
            index.parent,
        )


def _blocks(rows: slice, size: int) -> list[slice]:
    return [slice(k, min(k + size, rows.stop)) for k in range(rows.start, rows.stop, size)]


class _Layer:
    """One block of the network: its sums over neighbours and its atom layers."""

    def __init__(self, model: Hipnn, number: int):
        first = cast(Any, cast(nn.ModuleList, model.blocks[number])[0])
        self.atoms, self.width = AtomLayers(model, number), model.config.widths[number + 1]
        kind = TensorSums if model.config.order else EnvironmentSums
        self.sums: Sums = kind(first.layer, is_first=number == 0)
        self.block = max(64, min(MAX_BLOCK, self.sums.block))  # of the sums

    def forward(
        self, where: Any, z: Tensor, energy: Tensor, n_thread: int
    ) -> tuple[Tensor, Tensor]:
        """Adds the readout to `energy`; returns m (n_recv, C, n_hidden) and the new features."""
        n_recv, source = len(energy), self.sums.source(z, n_thread)
        mixed = z.new_empty(n_recv, *self.sums.shape)
        out = z.new_empty(n_recv, self.width)

        def work(t: int) -> None:
            for rows in _blocks(span(n_recv, t, n_thread), MAX_BLOCK):
                self._mix(where, source, rows, mixed[rows])
                out[rows], e = self.atoms.forward(mixed[rows], z[rows])
                energy[rows] += e.double()

        share(work, n_thread)
        return mixed, out

    def backward(
        self,
        where: Any,
        z: Tensor,
        mixed: Tensor | None,
        gradient: Tensor | None,
        energy: Tensor,
        found: Any,
    ) -> tuple[Tensor, Tensor]:
        """Adds forces and virial to `found`; returns dE/dz along the atom and along its pairs.

        Where `mixed` is None this is the last layer, whose forward pass is made here as well.
        """
        n_recv, n_thread = len(energy), len(found.forces)
        source = self.sums.source(z, n_thread)
        along = z.new_zeros(n_recv, z.shape[1])
        sink = self.sums.sink(found)

        def work(t: int) -> None:
            mine = sink.part(t)
            for rows in _blocks(span(n_recv, t, n_thread), MAX_BLOCK):
                if mixed is None:
                    m = z.new_empty(rows.stop - rows.start, *self.sums.shape)
                    self._mix(where, source, rows, m)
                else:
                    m = mixed[rows]
                wanted = None if gradient is None else gradient[rows]
                g, dz, e = self.atoms.backward(m, z[rows], wanted)
                if dz is not None:
                    along[rows] = dz
                if mixed is None:
                    energy[rows] += e.double()
                for part in _blocks(rows, self.block):
                    part_of_g = g[part.start - rows.start : part.stop - rows.start]
                    self.sums.gradient(where, source, part_of_g, mine, part.start)

        share(work, n_thread)
        return along, self.sums.sent(sink)

    def _mix(self, where: Any, source: Any, rows: slice, mixed: Tensor) -> None:
        """Writes m (n_rows, C, n_hidden) of some receivers."""
        for part in _blocks(rows, self.block):
            place = slice(part.start - rows.start, part.stop - rows.start)
            self.sums.mix(where, source, part.start, mixed[place])
