"""The sums over neighbours of one interaction layer, fused, and their gradients, on a GPU.

    env[i, c, nu, a] = sum_p t_c(p) s_nu(r_p) z[sender(p), a]        m = env V

env comes first in every order (see `md_plugin.kernels.triton_fused`), for as many atoms at once as
keep it in the second-level cache; the product with V is a library's. Sensitivities that are mixed
from Gaussians: as in `md_plugin.model.fused_sums`. Where Triton interprets its kernels, they run
on the CPU as well, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from md_plugin.kernels import triton_fused
from md_plugin.model.fused_sums import Sums, gaussian_weight
from md_plugin.model.radial import N_COMPONENTS
from md_plugin.pairs import Geometry

# dE/denv and env of a block of atoms, beside features, in the 40 to 50 MB of an A100 or H100.
BLOCK_BYTES = 16_000_000


class DeviceEngine:
    """Kernels in Triton; atom layers in torch, for as many atoms at once as there are."""

    threads, max_block = False, 1 << 18

    def where(self, species: Tensor, geometry: Geometry) -> Any:
        """See `fused_sums.Engine`."""
        g = geometry
        images = (g.translation, g.translations)
        if g.translation is None or g.translations is None:
            images = (None, None)
        return triton_fused.Geometry(
            g.x.contiguous(), g.pairs.row_ptr, g.pairs.sender, *images, species
        )

    def gradients(self, where: Any, dtype: torch.dtype, n_thread: int) -> Any:
        """See `fused_sums.Engine`."""
        return triton_fused.Gradients(where, 0, dtype)

    def results(self, found: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `fused_sums.Engine`."""
        return found.forces, found.virial, found.closest

    def sums(self, interaction: Any, is_first: bool) -> Sums:
        """See `fused_sums.Engine`."""
        return DeviceSums(interaction, is_first)


class DeviceSums:
    """Layers of any tensor order; see `fused_sums.Sums`."""

    def __init__(self, interaction: Any, is_first: bool):
        s = interaction.sensitivity
        self.is_first = is_first
        self.radial = triton_fused.Radial.build(s.mu, s.sigma, s.rcut, s.end)
        weight = gaussian_weight(interaction)
        self.n_nu, self.n_in, n_hidden = weight.shape
        self.weight = weight.reshape(-1, n_hidden).contiguous()
        self.transposed = self.weight.T.contiguous()
        self.shape = (N_COMPONENTS[interaction.order], n_hidden)
        self.block = BLOCK_BYTES // (self.shape[0] * weight[..., 0].numel() * weight.element_size())

    def source(self, z: Tensor, n_thread: int) -> Any:
        """See `fused_sums.Sums`."""
        return None if self.is_first else z

    def mix(self, where: Any, source: Any, start: int, m: Tensor) -> None:
        """See `fused_sums.Sums`."""
        env = m.new_empty(len(m), self.shape[0], self.n_nu, self.n_in)
        triton_fused.forward(where, self.radial, source, env, start)
        torch.mm(env.reshape(-1, len(self.weight)), self.weight, out=m.view(-1, self.shape[1]))

    def sink(self, found: Any) -> Any:
        """See `fused_sums.Sums`."""
        return found.for_layer(0 if self.is_first else self.n_in)

    def gradient(self, where: Any, source: Any, g: Tensor, sink: Any, start: int) -> None:
        """See `fused_sums.Sums`."""
        ge = g.reshape(-1, self.shape[1]) @ self.transposed
        ge = ge.reshape(len(g), self.shape[0], self.n_nu, self.n_in)
        triton_fused.backward(where, self.radial, source, ge, sink, start)

    def sent(self, sink: Any) -> Tensor:
        """See `fused_sums.Sums`."""
        messages: Tensor = sink.messages
        return messages
