"""The sums over neighbours of one interaction layer, fused, and their gradients, on a GPU.

    env[i, c, nu, a] = sum_p t_c(p) s_nu(r_p) z[sender(p), a]        m = env V

env comes first in every order (see `md_plugin.kernels.triton_fused`), for as many atoms at once as
keep it in the second-level cache; the product with V is a library's. Sensitivities that are mixed
from Gaussians: as in `md_plugin.model.fused_sums`. Where Triton interprets its kernels, they run
on the CPU as well, for tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from md_plugin.kernels import radial_reference, reference, triton_fused
from md_plugin.kernels.radial_reference import Cutoff
from md_plugin.kernels.registry import BackendError
from md_plugin.model.fused_sums import Sums, gaussian_weight
from md_plugin.model.hipnn import Hipnn
from md_plugin.model.radial import N_COMPONENTS, tensor_components
from md_plugin.pairs import Geometry, Pairs

# dE/denv and env of a block of atoms, beside features, in the 40 to 50 MB of an A100 or H100.
BLOCK_BYTES = 16_000_000


class DeviceEngine:
    """Kernels in Triton; atom layers in torch, for as many atoms at once as the workspace holds.

    Fewer, whose activations would stay in the second-level cache, are done before the next operator
    is launched: docs/gpu.md counts.
    """

    threads, max_block, workspace = False, 1 << 18, 256_000_000

    def __init__(self, model: Hipnn):
        self_check(model.encoder.device, model.encoder.dtype, model.config.order)

    def where(self, species: Tensor, geometry: Geometry) -> Any:
        """See `fused_sums.Engine`."""
        g = geometry
        x, rows = g.x.double().contiguous(), (g.pairs.row_ptr, g.pairs.sender)
        if g.translation is None or g.translations is None:
            return triton_fused.Geometry(x, *rows, species=species)
        images = g.translation, g.translations.double().contiguous()
        return triton_fused.Geometry(x, *rows, *images, species)

    def gradients(self, where: Any, dtype: torch.dtype, n_thread: int, split: str) -> Any:
        """See `fused_sums.Engine`."""
        return triton_fused.Gradients(where, 0, dtype, per_atom=split == "atoms")

    def results(self, found: Any, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `fused_sums.Engine`. Rows of receivers are there in any case."""
        halves = {"": None, "structures": found.row_virials, "atoms": found.atom_virials}
        return found.forces, found.virial, found.closest, halves[split]

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
        block = BLOCK_BYTES // (self.shape[0] * weight[..., 0].numel() * weight.element_size())
        self.block = block // 16 * 16  # multiples are all the same to Triton's compiler

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


@cache
def self_check(device: torch.device, dtype: torch.dtype, order: int) -> None:
    """Compare the kernels with autograd on a tiny problem, once per device, dtype and order.

    Raises:
        BackendError: a kernel is wrong.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # Four receivers and a ghost, of which each sees all others; five sensitivities, seven features.
    receiver, sender = (~torch.eye(5, dtype=torch.bool))[:4].nonzero().unbind(dim=1)
    pairs, _ = Pairs.from_edges(receiver, sender, 4, 5)
    species = torch.tensor([0, 2, 1, 2, 0])
    x, ge, z = normal(5, 3).double(), normal(4, N_COMPONENTS[order], 5, 7), normal(5, 7)
    mu = torch.linspace(0.8, 2.8, 5).to(dtype)
    for features in (z, None):
        sent = torch.eye(7, dtype=dtype)[species] if features is None else z
        want = _expected(pairs, x, (mu, 2 * mu), sent, ge)
        there = Geometry(x, pairs).to(device)
        where = triton_fused.Geometry(
            there.x, there.pairs.row_ptr, there.pairs.sender, species=species.int().to(device)
        )
        radial = triton_fused.Radial.build(mu.to(device), 2 * mu.to(device), 3.5)
        found = triton_fused.Gradients(where, 7, dtype)
        on = None if features is None else features.to(device)
        env = torch.empty_like(ge, device=device)
        triton_fused.forward(where, radial, on, env)
        triton_fused.backward(where, radial, on, ge.to(device), found)
        got = (env, found.forces, found.messages)[: 2 if features is None else 3]
        for name, a, b in zip(("env", "forces", "messages"), got, want, strict=False):
            error = float((a.cpu().double() - b).abs().max())
            if not error <= 64 * torch.finfo(dtype).eps * float(b.abs().max()):
                raise BackendError(
                    f"backend 'triton' computes wrong {name} of a fused layer in {dtype} on "
                    f"{device} (largest difference {error:.1e}); choose backend='torch' on this "
                    "machine, and report this with your versions"
                )


def _expected(
    pairs: Pairs, x: Tensor, radial: tuple[Tensor, Tensor], z: Tensor, ge: Tensor
) -> tuple[Tensor, ...]:
    """env, forces and dE/dz by the closed sums' reference, in float64."""
    mu, sigma, z, ge = (t.double() for t in (*radial, z, ge))
    with torch.enable_grad():
        x, z = x.clone().requires_grad_(), z.clone().requires_grad_()
        r_ij = Geometry(x, pairs).r_ij()
        r = torch.linalg.vector_norm(r_ij, dim=1)
        sense = radial_reference.sensitivity(r, mu, sigma, Cutoff(3.5, 3.5))
        order = N_COMPONENTS.index(ge.shape[1])
        stacked = reference.stack(tensor_components(r_ij / r[:, None], order), sense)
        env = reference.envsum(stacked, z, pairs).view_as(ge)
        gx, gz = torch.autograd.grad((env * ge).sum(), (x, z))
    return env.detach(), -gx, gz
