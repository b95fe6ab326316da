"""The vector layer (HIP-NN-TS) of the bench: a whole layer, from z and positions to features, and
from their gradient back to forces and dE/dz.

The three do the same in orders of their own: V first (ours, fused), env first (ours, closed, and
hippynn). So what is compared is what all of them give: features, forces, dE/dz.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md_plugin.bench.core import (
    HIPPYNN,
    OURS,
    Contest,
    Options,
    Provider,
    peer_absence,
    present,
    relative,
    worst,
)
from md_plugin.bench.systems import (
    CHECKED_ATOMS,
    RCUT_46,
    Problem,
    Twin,
    aluminium,
    kernel_geometry,
    network,
)
from md_plugin.kernels import get_backend
from md_plugin.potential import Potential

N_FEAT = 128
Results = tuple[Tensor, Tensor, Tensor]


def vector_layer(options: Options) -> Contest:
    """A vector layer of 128 features and 46 neighbours."""
    timed = VectorLayer(options.atoms, options.seed)
    small = VectorLayer(min(CHECKED_ATOMS, options.atoms), options.seed + 1)
    reason = Potential(timed.net, dtype="float32").why_not_fused()
    kinds: tuple[tuple[str, str, Callable[..., Results]], ...] = (
        ("ours, fused", OURS, VectorLayer.fused),
        ("ours, closed", OURS, VectorLayer.closed),
        ("hippynn, numba", HIPPYNN, VectorLayer.peer),
    )
    providers = [
        Provider(
            name,
            side,
            call=lambda function=function: function(timed),  # type: ignore[misc]
            error=lambda function=function: small.error(function),  # type: ignore[misc]
            absent=f"not yet: {reason}" if name == "ours, fused" and reason else "",
        )
        for name, side, function in kinds
    ]
    notes = timed.problem.notes() | {"n_nu": 20, "n_feat": N_FEAT}
    n = len(timed.problem.atoms)
    what = f"vector layer, {N_FEAT} features"
    return Contest(what, present(providers), "hippynn, numba", n, notes=notes)


class VectorLayer:
    """One layer with random weights, features z and gradients g = dE/d(features that leave).

    Args:
        n_atoms: wanted atoms.
        seed: of z and g.
    """

    def __init__(self, n_atoms: int, seed: int):
        self.problem = Problem(aluminium(n_atoms, seed), RCUT_46)
        shape = {"order": 1, "n_feat": N_FEAT, "n_atom_layers": 0, "rcut": RCUT_46, "r_max": 5.2}
        self.net = network(2, **shape)
        self.interaction: Any = self.net.blocks[1][0].layer  # type: ignore[index,union-attr]
        generator = torch.Generator().manual_seed(seed)
        n = len(self.problem.atoms)
        self.z, self.g = torch.randn(2, n, N_FEAT, generator=generator)
        self._sums: Any = None
        self._twin: Any = None

    def fused(self) -> Results:
        """Features (n, n_feat), forces (n, 3), dE/dz (n, n_feat)."""
        from md_plugin.kernels import fused_cpu
        from md_plugin.kernels.workers import one_thread, share, span
        from md_plugin.model.fused_sums import TensorSums

        if self._sums is None:
            self._sums = TensorSums(self.interaction, is_first=False)
        sums, n = self._sums, len(self.z)
        where = kernel_geometry(self.problem.geometry)
        out, gz = torch.empty_like(self.z), torch.empty_like(self.z)
        with one_thread() as n_thread:
            found = fused_cpu.Gradients(n, 0, np.float32, n_thread)
            source, sink = sums.source(self.z, n_thread), sums.sink(found)

            def work(t: int) -> None:
                mine, part = sink.part(t), span(n, t, n_thread)
                for start in range(part.start, part.stop, sums.block):
                    rows = slice(start, min(start + sums.block, part.stop))
                    m = self.z.new_empty(rows.stop - start, *sums.shape)
                    sums.mix(where, source, start, m)
                    m, z = m.requires_grad_(), self.z[rows].detach().requires_grad_()
                    features = self.interaction.norms(m) + self.interaction.self_interaction(z)
                    gm, gz[rows] = torch.autograd.grad(features, (m, z), self.g[rows])
                    out[rows] = features.detach()
                    sums.gradient(where, source, gm, mine, start)

            share(work, n_thread)
            return out, torch.from_numpy(found.total()[0]), gz + sums.sent(sink)

    def closed(self, interaction: Any = None, backend: str = "numba") -> Results:
        """The same by autograd, from pair vectors; forces are those on pairs."""
        layer = interaction or self.interaction
        pairs, r_ij = self.problem.inside
        dtype = layer.weight.dtype
        # detach: `to` may give the very tensor
        r_ij, z = (x.to(dtype).detach().requires_grad_() for x in (r_ij, self.z))
        r = r_ij.norm(dim=1)
        components = torch.cat([torch.ones_like(r)[:, None], r_ij / r[:, None]], dim=1)
        out = layer(z, pairs, r, components, get_backend(backend))
        gr, gz = torch.autograd.grad(out, (r_ij, z), self.g.to(dtype))
        return out.detach(), gr, gz

    def peer(self) -> Results:
        """The same by hippynn's layer of the same weights; forces are those on pairs."""
        if self._twin is None:
            modules = Twin(self.net).graph.modules()
            self._twin = [m for m in modules if type(m).__name__ == "InteractLayerVec"][1]
        pairs, r_ij = self.problem.inside
        r_ij, z = (x.float().detach().requires_grad_() for x in (r_ij, self.z))
        out = self._twin(z, pairs.receiver, pairs.sender_long, r_ij.norm(dim=1), r_ij)
        gr, gz = torch.autograd.grad(out, (r_ij, z), self.g)
        return out.detach(), gr, gz

    def error(self, function: Callable[..., Results]) -> float:
        """Largest of the errors of features, forces and dE/dz against float64."""
        if function is VectorLayer.peer and peer_absence():
            raise ImportError(peer_absence())
        want = self.closed(copy.deepcopy(self.interaction).double(), "torch")
        pairs = [self._atom_forces(results) for results in (function(self), want)]
        return worst(*map(relative, *pairs))

    def _atom_forces(self, results: Results) -> Results:
        out, forces, gz = results
        on_pairs = len(forces) == self.problem.inside[0].n_pair
        return out, self.problem.sum_forces(forces) if on_pairs else forces, gz
