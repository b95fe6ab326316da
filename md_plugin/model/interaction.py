"""The interaction layer: features of neighbours flow into each atom through the sensitivities.

    env[i, c, nu, a] = sum_p t_c(p) s_nu(r_p) z[sender(p), a]            one envsum for all c
    m[i, c, b]       = sum_{nu, a} V[nu, a, b] env[i, c, nu, a]
    out[i, b]        = m[i, 0, b] + sum_a W[b, a] z[i, a] + bias[b]       scalar (HIP-NN)
                     + vector_scale[b]     sqrt(|m[i, vector, b]|^2     + cusp)    order >= 1
                     + quadrupole_scale[b] sqrt(|m[i, quadrupole, b]|^2 + cusp)    order  = 2

t_c are the tensor components of `radial.tensor_components`; the norm of a traceless symmetric
tensor Q is the Frobenius norm, Q:Q = 2 (xx^2 + xy^2 + xz^2 + yy^2 + yz^2 + xx yy). `cusp` keeps
the square root smooth where a tensor vanishes by symmetry. HIP-NN-TS: Chigaev et al.,
J. Chem. Phys. 158, 184108 (2023), eqs. 10-16.

HIP-HOP-NN forms more invariants than the norms, see `md_plugin.model.invariants`:

    out[i, b]        = mixed invariants of m[i, :, :]  +  sum_a W[b, a] z[i, a] + bias[b]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from md_plugin.kernels.registry import Backend
from md_plugin.model.invariants import InvariantMixing
from md_plugin.model.radial import N_COMPONENTS, InverseGaussianSensitivity
from md_plugin.pairs import Pairs


class InteractionLayer(nn.Module):
    """One interaction layer of a tensor order, before activation.

    Args:
        n_in: features that come in.
        n_out: features that go out.
        sensitivity: the layer's own radial functions.
        order: highest tensor order.
        cusp: regularisation of the norms, in squared feature units.
        mixing: takes the place of the norms.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        sensitivity: InverseGaussianSensitivity,
        order: int = 0,
        cusp: float = 1e-6,
        mixing: InvariantMixing | None = None,
    ):
        super().__init__()
        self.order, self.cusp = order, cusp
        self.sensitivity = sensitivity
        n_nu = sensitivity.n_nu
        self.weight = nn.Parameter(torch.empty(n_nu, n_in, n_out))
        nn.init.normal_(self.weight, std=(2.0 / (n_nu * (n_in + n_out))) ** 0.5)
        self.self_interaction = nn.Linear(n_in, n_out)
        nn.init.xavier_normal_(self.self_interaction.weight)
        self.mixing = mixing
        if order >= 1 and mixing is None:
            self.vector_scale = nn.Parameter(torch.randn(n_out))
        if order >= 2 and mixing is None:
            self.quadrupole_scale = nn.Parameter(torch.randn(n_out))

    def forward(
        self, features: Tensor, pairs: Pairs, r: Tensor, components: Tensor, backend: Backend
    ) -> Tensor:
        """Features (n_send, n_in) -> (n_recv, n_out).

        Args:
            features: (n_send, n_in), ghosts filled.
            pairs: who sees whom.
            r: (n_pair,) distances, Å.
            components: (n_pair, 1 | 4 | 9 | 16) tensor components of the unit vectors.
            backend: computes sensitivities and the sum over neighbours.
        """
        n_nu, n_in, n_out = self.weight.shape
        n_tensor = N_COMPONENTS[self.order]
        sense = self.sensitivity(r, backend)
        if self.order > 0:
            sense = backend.stack(components[:, :n_tensor], sense)
        env = backend.envsum(sense, features, pairs)
        mixed = env.reshape(-1, n_nu * n_in) @ self.weight.reshape(n_nu * n_in, n_out)
        mixed = mixed.reshape(-1, n_tensor, n_out)

        combined = self.norms(mixed) if self.mixing is None else self.mixing(mixed)
        out: Tensor = combined + self.self_interaction(features[: pairs.n_recv])
        return out

    def norms(self, mixed: Tensor) -> Tensor:
        """Tensors (n_recv, n_tensor, n_out) -> (n_recv, n_out), the sum of scaled norms."""
        out = mixed[:, 0]
        if self.order >= 1:
            square = mixed[:, 1:4].square().sum(dim=1)
            out = out + self.vector_scale * torch.sqrt(square + self.cusp)
        if self.order >= 2:
            q = mixed[:, 4:9]
            square = 2.0 * (q.square().sum(dim=1) + q[:, 0] * q[:, 3])
            out = out + self.quadrupole_scale * torch.sqrt(square + self.cusp)
        return out
