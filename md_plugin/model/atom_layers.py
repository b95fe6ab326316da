"""The layers of a block that treat each atom by itself, and their gradient written by hand.

    h = norms(m) + W z + b              interaction layer, m from the sums over neighbours;
                                        in HIP-HOP-NN invariants take the place of the norms
    h = W x + b                         atom layers
    x' = U softplus(h) + c + A x        residual layers;   x' = softplus(h) others
    E = readout(x')

What goes forward comes with a function that takes a gradient back, from dE/doutput to dE/dinput,
once: it overwrites what was kept for it. The gradient of the readout is the same row for all atoms
and stays one row until it meets something that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from md_plugin.kernels import norms_cpu, softplus_cpu
from md_plugin.model.hipnn import Hipnn
from md_plugin.model.interaction import InteractionLayer
from md_plugin.model.invariants import InvariantMixing
from md_plugin.model.radial import N_COMPONENTS

Pull = Callable[[Tensor], Tensor]
Activation = Callable[[Tensor], tuple[Tensor, Pull]]


class AtomLayers:
    """Block `number` of a network without its sums over neighbours. Weights are read when made.

    Args:
        model: the network; on the CPU unless `plain`.
        number: of the block, from 0.
        plain: torch's own functions only, for any device.
    """

    by_species = False  # a first block is given features as well, one-hot
    workspace = 256_000_000  # bytes that activations of atoms may take at once

    def __init__(self, model: Hipnn, number: int, plain: bool = False):
        layers = [cast(Any, layer) for layer in cast(nn.ModuleList, model.blocks[number])]
        activation = _activation(model, plain)
        interaction: InteractionLayer = layers[0].layer
        self.combined = _combined(interaction, model, plain)
        self.n_components = N_COMPONENTS[interaction.order]
        self.inward = [_Linear(interaction.self_interaction)]
        self.inward += [_Linear(layer.layer) for layer in layers[1:]]
        self.outward = [_Outward(layer, activation) for layer in layers]
        self.readout = _Linear(cast(nn.Linear, model.readouts[number + 1]))

    @property
    def bytes_per_atom(self) -> int:
        """Of what the way back keeps or makes of each atom at once, about."""
        width, item = self.readout.weight.shape[1], self.readout.weight.element_size()
        n_hidden = self.inward[0].weight.shape[0]
        return item * (3 * self.n_components * n_hidden + len(self.inward) * (3 * n_hidden + width))

    @torch.no_grad()
    def forward(self, mixed: Tensor, z: Tensor, out: Tensor, energy: Tensor) -> None:
        """Write features that the block gives, and add its energies.

        Args:
            mixed: (n, C, n_hidden) m.
            z: (n, n_in) features.
            out: (n, n_out), written.
            energy: (n,) float64, eV, added to.
        """
        x, _, _ = self._run(mixed, z)
        out.copy_(x)
        energy += self.readout(x)[:, 0].double()

    @torch.no_grad()
    def backward(
        self,
        mixed: Tensor,
        z: Tensor,
        gradient: Tensor | None = None,
        along: Tensor | None = None,
        energy: Tensor | None = None,
    ) -> Tensor:
        """dE/dm (n, C, n_hidden) of sum E + sum (features * gradient).

        Args:
            mixed: (n, C, n_hidden) m.
            z: (n, n_in) features.
            gradient: (n, n_out), of the blocks above; None where there are none.
            along: (n, n_in) dE/dz that does not go through m, written unless None.
            energy: (n,) float64, eV, added to unless None.
        """
        x, pull_norms, pulls = self._run(mixed, z)
        if energy is not None:
            energy += self.readout(x)[:, 0].double()
        g = self.readout.weight if gradient is None else gradient + self.readout.weight
        for linear, pull in zip(self.inward[:0:-1], pulls[:0:-1], strict=True):
            g = linear.pull(*pull(g))
        g, past = pulls[0](g)
        if along is not None:
            along.copy_(self.inward[0].pull(g, past))
        return pull_norms(g)

    def _run(self, mixed: Tensor, z: Tensor) -> tuple[Tensor, Pull, list[Any]]:
        """Features, and the ways back: through the norms, and from each layer to its h and x."""
        norms, pull_norms = self.combined(mixed)
        x, pulls = z, []
        for k, (linear, outward) in enumerate(zip(self.inward, self.outward, strict=True)):
            h = linear(x)
            if k == 0:
                h += norms
            x, pull = outward(h, x)
            pulls.append(pull)
        return x, pull_norms, pulls


class _Linear:
    """x -> W x + b; `pull` takes a gradient back."""

    def __init__(self, linear: nn.Linear):
        self.weight = linear.weight.detach().contiguous()
        self.transposed = self.weight.T.contiguous()
        self.bias = None if linear.bias is None else linear.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.transposed
        return torch.addmm(self.bias, x, self.transposed)

    def pull(self, g: Tensor, along: Tensor | None = None) -> Tensor:
        """dE/dx from dE/dout, and from what came another way."""
        return g @ self.weight if along is None else torch.addmm(along, g, self.weight)


class _Outward:
    """h, x -> x': the activation, and the residual where there is one.

    The way back gives dE/dh and what of dE/dx does not go through h, None where there is none.
    """

    def __init__(self, layer: Any, activation: Activation):
        self.activation = activation
        self.out = _Linear(layer.out) if hasattr(layer, "out") else None
        adjust = getattr(layer, "adjust", None)
        self.adjust = _Linear(adjust) if isinstance(adjust, nn.Linear) else None

    def __call__(self, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        value, slope = self.activation(h)
        if self.out is None:
            return value, lambda g: (slope(g), None)
        out, adjust = self.out, self.adjust
        result = out(value)
        result += x if adjust is None else adjust(x)

        def pull(g: Tensor) -> tuple[Tensor, Tensor]:
            return slope(out.pull(g)), g if adjust is None else adjust.pull(g)

        return result, pull


def _activation(model: Hipnn, plain: bool) -> Activation:
    """The network's; softplus in float32 by a kernel of its own, unless `plain`."""
    function: Any = model.activation
    known = type(function) is nn.Softplus and function.beta == 1.0
    if known and model.encoder.dtype == torch.float32 and not plain:
        return _softplus
    return lambda h: _differentiated(function, h)


def _softplus(h: Tensor) -> tuple[Tensor, Pull]:
    value, slope = map(torch.from_numpy, softplus_cpu.softplus(h.numpy()))
    return value, slope.mul_


def _differentiated(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Pull]:
    """Any function, its gradient by autograd."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = function(leaf)

    def pull(g: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(value, leaf, g.expand_as(value))
        return found

    return value.detach(), pull


def _combined(interaction: InteractionLayer, model: Hipnn, plain: bool) -> Activation:
    """m (n, C, n_hidden) -> (n, n_hidden): norms or invariants, `md_plugin.model.interaction`."""
    if interaction.mixing is not None:
        return _invariants(interaction.mixing, model)
    if interaction.order == 0:
        return lambda m: (m[:, 0], lambda g: g[:, None])
    if plain:
        return lambda m: _norms(interaction, m)
    scales = [interaction.vector_scale, getattr(interaction, "quadrupole_scale", None)]
    table = torch.stack([scale.detach() for scale in scales if scale is not None]).numpy()

    def norms(mixed: Tensor) -> tuple[Tensor, Pull]:
        m = mixed.numpy()
        out, slopes = norms_cpu.norms(m, table, interaction.cusp)

        def pull(g: Tensor) -> Tensor:
            return torch.from_numpy(norms_cpu.norms_gradient(m, slopes, g.numpy()))

        return torch.from_numpy(out), pull

    return norms


def _norms(interaction: InteractionLayer, m: Tensor) -> tuple[Tensor, Pull]:
    """`InteractionLayer.norms`, and its gradient in one array.

    dE/dm_c = h m_c for a vector, with h = scale dE/dout / root; 2 h m_c for a quadrupole, and
    h m_yy more for xx, h m_xx for yy, whose trace with zz vanishes.
    """
    v, q = m[:, 1:4], m[:, 4:9]
    roots = [(v.square().sum(dim=1) + interaction.cusp).sqrt_()]
    scales = [interaction.vector_scale.detach()]
    if interaction.order == 2:
        square = q.square().sum(dim=1).addcmul_(q[:, 0], q[:, 3]).mul_(2.0)
        roots.append(square.add_(interaction.cusp).sqrt_())
        scales.append(interaction.quadrupole_scale.detach())
    out = m[:, 0]
    for scale, root in zip(scales, roots, strict=True):
        out = torch.addcmul(out, scale, root)

    def pull(g: Tensor) -> Tensor:
        back = torch.empty_like(m)
        back[:, 0] = g
        h = [(scale / root).mul_(g) for scale, root in zip(scales, roots, strict=True)]
        torch.mul(v, h[0][:, None], out=back[:, 1:4])
        if interaction.order == 2:
            torch.mul(q, (2.0 * h[1])[:, None], out=back[:, 4:9])
            back[:, 4].addcmul_(q[:, 3], h[1])
            back[:, 7].addcmul_(q[:, 0], h[1])
        return back

    return out, pull


def _invariants(mixing: InvariantMixing, model: Hipnn) -> Activation:
    """Of HIP-HOP-NN. The sums are those of exact tensors; a model may have rounded ones."""
    assert model.components is not None
    matrix = model.components.of_exact().to(model.encoder)
    rounding = 4 * torch.finfo(matrix.dtype).eps
    if torch.allclose(matrix, torch.eye(len(matrix)).to(matrix), rtol=0.0, atol=rounding):
        return lambda m: _differentiated(mixing, m)
    return lambda m: _differentiated(lambda exact: mixing(matrix @ exact), m)
