"""The sums over neighbours of one interaction layer, fused, and their gradients, on the CPU.

    m[i, c, b] = sum_p t_c(p) sum_{nu, a} s_nu(r_p) z[sender(p), a] V[nu, a, b]

Two orders of the same product. Scalar layers sum first: env[i, nu, a] = sum_p s z, then V. Tensor
layers multiply first: q[j, nu, b] = sum_a z[j, a] V[nu, a, b] once per atom, then sum t_c s q, so
that the matrix product is not made for each of the 4 or 9 components. In the first layer z is
one-hot: env counts species, and q has one row per species. Where s_nu are mixed from Gaussians G_k,
s_nu = sum_k G_k M[k, nu], the sums are over G_k, with M V in the place of V.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from md_plugin.kernels import fused_cpu, fused_rows, fused_tensor_rows
from md_plugin.kernels.workers import share, span
from md_plugin.model.atom_layers import AtomLayers
from md_plugin.model.hipnn import Hipnn
from md_plugin.model.radial import N_COMPONENTS
from md_plugin.pairs import Geometry

logger = logging.getLogger("md_plugin")

# dE/denv of one block of atoms should stay in a core's second-level cache.
BLOCK_BYTES = 1_500_000
WORTH_SHARING = 2_000_000  # numbers to add; fewer are done before another thread has woken up


class Sums(Protocol):
    """Both orders, as `md_plugin.model.fusion` uses them.

    Attributes:
        shape: (C, n_hidden) of m.
        weight: V, in whatever shape.
    """

    shape: tuple[int, int]
    weight: Tensor

    @property
    def block(self) -> int:
        """Atoms to do at once, at most."""
        ...

    def source(self, z: Tensor, n_thread: int) -> Any:
        """What the sums read of each sender, from its features (n_send, n_in)."""
        ...

    def mix(self, where: Any, source: Any, start: int, m: Tensor) -> None:
        """Writes m (n_rows, C, n_hidden), contiguous, of receivers from `start` on."""
        ...

    def sink(self, found: Any) -> Any:
        """What gradients are added to; forces and virial are those of `found`."""
        ...

    def gradient(self, where: Any, source: Any, g: Tensor, sink: Any, start: int) -> None:
        """Adds what g = dE/dm (n_rows, C, n_hidden) of receivers from `start` on gives."""
        ...

    def sent(self, sink: Any) -> Tensor:
        """dE/dz (n_send, n_in) of all that was added; empty in the first layer."""
        ...


def _table(interaction: Any) -> fused_cpu.RadialTable:
    sensitivity = interaction.sensitivity
    dtype = _numpy(sensitivity.mu.dtype)
    mu, sigma = (p.detach().double().numpy() for p in (sensitivity.mu, sensitivity.sigma))
    return fused_cpu.RadialTable.build(mu, sigma, sensitivity.rcut, dtype, end=sensitivity.end)


def gaussian_weight(interaction: Any) -> Tensor:
    """V (n, n_in, n_hidden), of Gaussians also where sensitivities are mixed from them."""
    weight: Tensor = interaction.weight.detach()
    matching = interaction.sensitivity.matching
    if matching is None:
        return weight
    return torch.einsum("kn,nab->kab", matching.detach().double(), weight.double()).to(weight)


def _sink(found: Any, width: int) -> Any:
    """Gradients with messages of their own, and the forces and virial of `found`."""
    n_thread, n_send, _ = found.forces.shape
    sink = fused_cpu.Gradients(0, 0, found.messages.dtype.type, n_thread)
    sink.forces, sink.virials, sink.of_atoms = found.forces, found.virials, found.of_atoms
    sink.messages = fused_cpu.aligned_zeros((n_thread, n_send, width), found.messages.dtype.type)
    return sink


def _total(sink: Any, weight: Tensor | None = None) -> Tensor:
    """Sum of the messages (n_thread, n_send, n) of all threads, times `weight` where given."""
    messages = torch.from_numpy(sink.messages)
    n_thread, n_send, width = messages.shape
    if weight is None and (n_thread == 1 or messages.numel() < WORTH_SHARING):
        return messages[0] if n_thread == 1 else messages.sum(dim=0)
    total = messages.new_empty(n_send, width if weight is None else weight.shape[1])

    def work(t: int) -> None:
        rows = span(n_send, t, n_thread)
        if weight is None:
            torch.sum(messages[:, rows], 0, out=total[rows])
        else:
            mine = messages[0, rows] if n_thread == 1 else messages[:, rows].sum(dim=0)
            torch.mm(mine, weight, out=total[rows])

    share(work, n_thread)
    return total


class Engine(Protocol):
    """Where the sums of a network are made, as `md_plugin.model.fusion` uses it.

    Attributes:
        threads: whether threads of Python share the atoms.
        max_block: atoms that go through the atom layers at once, at most.
    """

    threads: bool
    max_block: int

    def where(self, species: Tensor, geometry: Geometry) -> Any:
        """What the kernels read of atoms and pairs; species (n_send,) int32, as indices."""
        ...

    def gradients(self, where: Any, dtype: torch.dtype, n_thread: int, split: str) -> Any:
        """What forces and virials of all layers are added to."""
        ...

    def results(self, found: Any, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Forces, virial, distance of the closest pair, parts of the virial; as in `Fused`."""
        ...

    def sums(self, interaction: Any, is_first: bool) -> Sums:
        """Those of one layer."""
        ...

    def atoms(self, model: Hipnn, number: int) -> Any:
        """The layers of a block that treat each atom by itself, as `AtomLayers`."""
        ...


class CpuEngine:
    """Kernels compiled by numba, threads that share the atoms, activations that stay in cache."""

    threads, max_block = True, 1024

    def __init__(self, model: Hipnn):
        _announce_compilation(bool(model.config.order))

    def where(self, species: Tensor, geometry: Geometry) -> Any:
        """See `Engine`."""
        g = geometry
        return fused_cpu.geometry(
            g.x.numpy(),
            g.pairs.row_ptr.numpy(),
            g.pairs.sender.numpy(),
            None if g.translation is None else g.translation.numpy(),
            None if g.translations is None else g.translations.numpy(),
            species.numpy(),
        )

    def gradients(self, where: Any, dtype: torch.dtype, n_thread: int, split: str) -> Any:
        """See `Engine`."""
        return fused_cpu.Gradients(len(where.x), 0, _numpy(dtype), n_thread, bool(split))

    def results(self, found: Any, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Engine`."""
        forces, _, virial = found.total()
        closest = torch.tensor(found.closest, dtype=torch.float64)
        parts = torch.from_numpy(found.atom_virials) if split else None
        return torch.from_numpy(forces), torch.from_numpy(virial), closest, parts

    def sums(self, interaction: Any, is_first: bool) -> Sums:
        """See `Engine`."""
        kind = TensorSums if interaction.order else EnvironmentSums
        sums: Sums = kind(interaction, is_first)
        return sums

    def atoms(self, model: Hipnn, number: int) -> Any:
        """See `Engine`."""
        return AtomLayers(model, number)


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


def _numpy(dtype: torch.dtype) -> type:
    return np.float32 if dtype == torch.float32 else np.float64


class EnvironmentSums:
    """Scalar layers: env first."""

    def __init__(self, interaction: Any, is_first: bool):
        self.is_first, self.table = is_first, _table(interaction)
        weight = gaussian_weight(interaction)
        self.n_nu, self.n_in, n_hidden = weight.shape
        self.weight = weight.reshape(-1, n_hidden).contiguous()
        self.transposed = self.weight.T.contiguous()
        self.shape = (1, n_hidden)
        self.block = BLOCK_BYTES // (self.n_nu * self.n_in * self.weight.element_size())

    def source(self, z: Tensor, n_thread: int) -> Any:
        """See `Sums`."""
        return None if self.is_first else z.numpy()

    def mix(self, where: Any, source: Any, start: int, m: Tensor) -> None:
        """See `Sums`."""
        dtype = self.table.gaussian.dtype.type
        env = fused_cpu.aligned_zeros((len(m), self.n_nu, self.n_in), dtype)
        fused_cpu.forward(where, self.table, source, env, start)
        torch.mm(torch.from_numpy(env).reshape(len(m), -1), self.weight, out=m[:, 0])

    def sink(self, found: Any) -> Any:
        """See `Sums`."""
        return _sink(found, 0 if self.is_first else self.n_in)

    def gradient(self, where: Any, source: Any, g: Tensor, sink: Any, start: int) -> None:
        """See `Sums`."""
        ge = (g[:, 0] @ self.transposed).reshape(-1, self.n_nu, self.n_in)
        fused_cpu.backward(where, self.table, source, ge.numpy(), sink, start)

    def sent(self, sink: Any) -> Tensor:
        """See `Sums`."""
        return _total(sink)


class TensorSums:
    """Vector and quadrupole layers: V first."""

    def __init__(self, interaction: Any, is_first: bool):
        self.is_first, self.table = is_first, _table(interaction)
        weight = gaussian_weight(interaction)
        self.n_nu, n_in, n_hidden = weight.shape
        # (n_in, n_nu n_hidden): q of all sensitivities in one product
        self.weight = weight.transpose(0, 1).reshape(n_in, -1).contiguous()
        self.shape = (N_COMPONENTS[interaction.order], n_hidden)
        self.block = BLOCK_BYTES // (self.shape[0] * n_hidden * self.weight.element_size())

    def source(self, z: Tensor, n_thread: int) -> Any:
        """See `Sums`."""
        q = self.weight
        if not self.is_first:
            q = z.new_empty(len(z), self.weight.shape[1])

            def work(t: int) -> None:
                rows = span(len(z), t, n_thread)
                torch.mm(z[rows], self.weight, out=q[rows])

            share(work, n_thread)
        return q.reshape(-1, self.n_nu, self.shape[1]).numpy()

    def mix(self, where: Any, source: Any, start: int, m: Tensor) -> None:
        """See `Sums`."""
        fused_cpu.tensor_forward(
            where, self.table, source, m.numpy(), start, by_species=self.is_first
        )

    def sink(self, found: Any) -> Any:
        """See `Sums`."""
        return _sink(found, 0 if self.is_first else self.n_nu * self.shape[1])

    def gradient(self, where: Any, source: Any, g: Tensor, sink: Any, start: int) -> None:
        """See `Sums`."""
        fused_cpu.tensor_backward(
            where, self.table, source, g.numpy(), sink, start, by_species=self.is_first
        )

    def sent(self, sink: Any) -> Tensor:
        """See `Sums`."""
        return _total(sink, None if self.is_first else self.weight.T)
