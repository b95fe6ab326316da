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

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from md_plugin.devices import moved
from md_plugin.halo import Halo, NoHalo, check_filled
from md_plugin.kernels.workers import one_thread, share, span
from md_plugin.model.fused_sums import CpuEngine, Engine
from md_plugin.model.hipnn import Hipnn
from md_plugin.pairs import Geometry, Pairs

BACKENDS = ("numba", "triton")
LEAST_BLOCK = 64  # atoms in the sums at once
ATOMS_PER_THREAD = 256  # fewer are done before another thread has woken up


@dataclass(frozen=True, eq=False)
class Fused:
    """What one evaluation gives.

    Attributes:
        atom_energy: (n_recv,) float64, eV.
        forces: (n_send, 3) float64, eV/Å; rows of ghosts belong to their owners.
        virial: (3, 3) float64, eV.
        closest: () distance of the closest pair, Å; infinite where there is none.
        parts: virials of atoms, (n_recv or n_send, 3, 3) float64, eV, or None; see `split`.
    """

    atom_energy: Tensor
    forces: Tensor
    virial: Tensor
    closest: Tensor
    parts: Tensor | None = None

    def to(self, device: torch.device) -> Fused:
        """The same on another device, in one copy."""
        given = (self.atom_energy, self.forces, self.virial, self.closest, self.parts)
        return Fused(*moved([tensor for tensor in given if tensor is not None], device))

    def summary(self) -> tuple[bool, float]:
        """Whether all forces are finite, and `closest`: the host asks a device once."""
        finite = self.forces.isfinite().all().to(self.closest.dtype)
        all_finite, closest = torch.stack([finite, self.closest]).tolist()
        return bool(all_finite), closest


class Exchange(NamedTuple):
    """What has to travel between domains before a step goes on.

    Attributes:
        rows: (n_recv, n_feat) features that ghosts want to know; or, on the way back,
            (n_send, n_feat) gradients of which those of ghosts belong to their owners.
        back: whether this is the way back.
    """

    rows: Tensor
    back: bool

    def travel(self, halo: Halo, pairs: Pairs) -> Tensor:
        """What the step goes on with: rows of all senders; on the way back, of all receivers."""
        if self.back:
            return halo.adjoint(self.rows)[: pairs.n_recv]
        return check_filled(halo.fill(self.rows), pairs).contiguous()


# A step in segments: between them, what was exchanged is sent in.
Segments = Generator[Exchange, Tensor, Fused]


def resume(segments: Segments, exchanged: Tensor | None) -> Exchange | Fused:
    """Run the next segment; None starts the first."""
    try:
        return segments.send(cast(Tensor, exchanged))
    except StopIteration as stop:
        return cast(Fused, stop.value)


def run(segments: Segments, halo: Halo, pairs: Pairs) -> Fused:
    """All segments and the exchanges between them."""
    found = resume(segments, None)
    while isinstance(found, Exchange):
        found = resume(segments, found.travel(halo, pairs))
    return found


def total(parts: Sequence[Fused]) -> Fused:
    """Of a sum of networks."""
    first, *others = parts
    for other in others:
        a, b = first.parts, other.parts
        first = Fused(
            first.atom_energy + other.atom_energy,
            first.forces + other.forces,
            first.virial + other.virial,
            torch.minimum(first.closest, other.closest),
            None if a is None or b is None else a + b,
        )
    return first


def why_not(model: Hipnn, backend: str = "numba", fast: bool = False) -> str:
    """Why a backend has no fused inference for this network, or no fast one; "" where it has."""
    if fast and (backend != "triton" or model.encoder.dtype != torch.float32):
        here = f"the backend is {backend!r}, the network in {model.encoder.dtype}"
        return f"dtype='fast' needs fused layers of backend 'triton'; {here}: choose dtype='mixed'"
    if backend not in BACKENDS:
        return f"the backend is {backend!r}, and only 'numba' and 'triton' have fused layers"
    if backend == "numba" and model.encoder.device.type != "cpu":
        return f"the network is on {model.encoder.device.type}"
    return ""


class FusedHipnn:
    """A `Hipnn` for energies and forces only. On a GPU nothing here makes the host wait for it.

    Args:
        model: the network; the radial parts of its weights are read once, when this is made.
        backend: whose kernels, "numba" or "triton".
        fast: sums over neighbours in float16, for a network in float32 and "triton" only.

    Raises:
        ValueError: see `why_not`.
    """

    def __init__(self, model: Hipnn, backend: str = "numba", fast: bool = False):
        if reason := why_not(model, backend, fast):
            raise ValueError(reason)
        self.model, self.engine = model, _engine(model, backend, fast)
        index = torch.full((model.encoder.shape[0],), -1, dtype=torch.int32)
        index[list(model.species)] = torch.arange(len(model.species), dtype=torch.int32)
        self.index = index.to(model.encoder.device)
        of_species = model.readouts[0](model.encoder)[:, 0].detach().double()
        self.of_species = of_species + model.reference_energy(torch.arange(len(of_species)))
        self.layers = [_Layer(model, k, self.engine) for k in range(model.config.n_interactions)]
        # Floating-point operations of matrix products per atom, sums over pairs left out: V to
        # and fro for each component, other matrices to, again for the way back, and fro.
        sums = sum(2 * layer.sums.shape[0] * layer.sums.weight.numel() for layer in self.layers)
        matrices = sum(2 * p.numel() for p in model.parameters() if p.ndim == 2)
        self.work = 2 * sums + 3 * matrices

    @torch.no_grad()
    def evaluate(
        self, species: Tensor, geometry: Geometry, halo: Halo | None = None, split: str = ""
    ) -> Fused:
        """Energies, forces and virial.

        Args:
            species: (n_send,) atomic numbers.
            geometry: positions and pairs on the network's device; pairs beyond the cutoff are
                skipped.
            halo: makes features of ghosts known; None where there are no ghosts.
            split: "": the virial as one; "structures": virials of atoms that add up to that of
                each structure; "atoms": half of each pair's to each of its atoms, (n_send, 3, 3).

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
            n_thread = n_thread if self.engine.threads else 1
            segments = self.segments(species, geometry, n_thread, split)
            return run(segments, halo or NoHalo(), geometry.pairs)

    def segments(
        self, species: Tensor, geometry: Geometry, n_thread: int = 1, split: str = ""
    ) -> Segments:
        """The same in segments, between which ghosts hear of features and tell of gradients.

        Whoever runs them does so without autograd.
        """
        n_recv = geometry.pairs.n_recv
        kinds = self.index[species.long()]
        where = self.engine.where(kinds, geometry)
        z = [kinds if self.layers[0].atoms.by_species else self.model.encoder[species.long()]]
        energy = self.of_species[species[:n_recv].long()]
        found = self.engine.gradients(where, self.model.encoder.dtype, n_thread, split)
        step = _Step(where, energy, found, n_thread)
        mixed: list[Tensor | None] = []
        for layer in self.layers[:-1]:
            kept, features = layer.forward(step, z[-1])
            mixed.append(kept)
            z.append((yield Exchange(features, back=False)))
        mixed.append(None)
        gradient: Tensor | None = None
        for k in reversed(range(len(self.layers))):
            along, sent = self.layers[k].backward(step, z[k], mixed[k], gradient)
            if along is not None:
                gradient = (yield Exchange(sent, back=True)) + along
        return Fused(energy, *self.engine.results(found, split))


def _engine(model: Hipnn, backend: str, fast: bool) -> Engine:
    if backend == "numba":
        return CpuEngine(model)
    from md_plugin.model.fused_device import DeviceEngine  # here: triton need not be installed

    return DeviceEngine(model, fast)


@dataclass(frozen=True, eq=False)
class _Step:
    """Geometry, and what all layers add to: energies of atoms; forces and virial."""

    where: Any
    energy: Tensor
    found: Any
    n_thread: int


def _blocks(rows: slice, size: int) -> list[slice]:
    return [slice(k, min(k + size, rows.stop)) for k in range(rows.start, rows.stop, size)]


class _Layer:
    """One block of the network: its sums over neighbours and its atom layers."""

    def __init__(self, model: Hipnn, number: int, engine: Engine):
        first = cast(Any, cast(nn.ModuleList, model.blocks[number])[0])
        self.is_first, self.width = number == 0, model.config.widths[number + 1]
        self.atoms, self.sums = engine.atoms(model, number), engine.sums(first.layer, number == 0)
        self.empty = self.sums.weight.new_empty
        fitting = self.atoms.workspace // self.atoms.bytes_per_atom // LEAST_BLOCK * LEAST_BLOCK
        self.max_block = min(engine.max_block, max(LEAST_BLOCK, fitting))
        self.block = max(LEAST_BLOCK, min(self.max_block, self.sums.block))  # of the sums
        if not engine.threads:  # blocks fill a GPU: no rest of one in between
            self.max_block -= self.max_block % self.block

    def forward(self, step: _Step, z: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the readout to the energy; returns m (n_recv, C, n_hidden) and new features."""
        n_recv, source = len(step.energy), self.sums.source(z, step.n_thread)
        mixed = self.empty(n_recv, *self.sums.shape)
        out = self.empty(n_recv, self.width)

        def work(t: int) -> None:
            for rows in _blocks(span(n_recv, t, step.n_thread), self.max_block):
                self._mix(step.where, source, rows, mixed[rows])
                self.atoms.forward(mixed[rows], z[rows], out[rows], step.energy[rows])

        share(work, step.n_thread)
        return mixed, out

    def backward(
        self, step: _Step, z: Tensor, mixed: Tensor | None, gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Adds forces and virial; returns dE/dz along the atom, if any, and along its pairs.

        Where `mixed` is None this is the last layer, whose forward pass is made here as well.
        """
        n_recv, source = len(step.energy), self.sums.source(z, step.n_thread)
        along = None if self.is_first else self.empty(n_recv, z.shape[1])
        sink = self.sums.sink(step.found)

        def work(t: int) -> None:
            mine = sink.part(t)
            for rows in _blocks(span(n_recv, t, step.n_thread), self.max_block):
                if mixed is None:
                    m = self.empty(rows.stop - rows.start, *self.sums.shape)
                    self._mix(step.where, source, rows, m)
                else:
                    m = mixed[rows]
                wanted = None if gradient is None else gradient[rows]
                dz = None if along is None else along[rows]
                energy = step.energy[rows] if mixed is None else None
                g = self.atoms.backward(m, z[rows], wanted, dz, energy)
                for part in _blocks(rows, self.block):
                    part_of_g = g[part.start - rows.start : part.stop - rows.start]
                    self.sums.gradient(step.where, source, part_of_g, mine, part.start)

        share(work, step.n_thread)
        return along, self.sums.sent(sink)

    def _mix(self, where: Any, source: Any, rows: slice, mixed: Tensor) -> None:
        """Writes m (n_rows, C, n_hidden) of some receivers."""
        for part in _blocks(rows, self.block):
            place = slice(part.start - rows.start, part.stop - rows.start)
            self.sums.mix(where, source, part.start, mixed[place])
