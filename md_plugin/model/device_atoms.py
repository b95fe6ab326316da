"""Layers of a block that treat each atom by itself, as one kernel each way on a GPU.

The same function as `md_plugin.model.atom_layers`, which has the equations; kernels and their
arrays: `md_plugin.kernels.triton_atom_layers`. The first use on a device compares both.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from md_plugin.kernels import triton_atom_layers
from md_plugin.kernels.registry import BackendError
from md_plugin.kernels.triton_atom_layers import WIDEST, Shape, Weights, padded
from md_plugin.model.atom_layers import AtomLayers
from md_plugin.model.config import HipnnConfig
from md_plugin.model.hipnn import Hipnn
from md_plugin.model.radial import N_COMPONENTS

logger = logging.getLogger("md_plugin")


def why_not(model: Hipnn) -> str:
    """Why the atom layers of a network are left to torch's operators; "" where they are not."""
    function: Any = model.activation
    usual = type(function) is nn.Softplus and (function.beta, function.threshold) == (1.0, 20.0)
    if model.config.n_max:
        return "invariants take the place of norms"
    if not usual:
        return f"the activation is {function}, not Softplus"
    widest = max(*model.config.widths, *model.config.hidden_widths)
    if widest > WIDEST:
        return f"layers have {widest} features, and at most {WIDEST} fit"
    return ""


def atom_layers(model: Hipnn, number: int) -> AtomLayers | DeviceAtomLayers:
    """Block `number` of a network, wherever it is: in kernels, unless `why_not`; it is logged."""
    if reason := why_not(model):
        if number == 0:
            logger.info("atom layers by torch's operators, 40 to 70 launches each: %s", reason)
        return AtomLayers(model, number, plain=True)
    atoms_check(model.encoder.device, model.encoder.dtype, model.config.order)
    return DeviceAtomLayers(model, number)


class DeviceAtomLayers:
    """Block `number` of a network without its sums over neighbours. Weights are read when made.

    Args:
        model: the network, on a GPU; on the CPU where Triton interprets its kernels.
        number: of the block, from 0, which takes species in the place of features.
    """

    # Bytes that m, its gradient and slopes of atoms may take at once. A program reads slopes soon
    # after it has written them: they are in the cache whatever the size.
    workspace = 128_000_000

    def __init__(self, model: Hipnn, number: int):
        config = model.config
        n_in, n_out = config.widths[number : number + 2]
        n_hidden = config.hidden_widths[number]
        self.shape = Shape(N_COMPONENTS[config.order], n_in, n_hidden, n_out)
        self.by_species = number == 0
        self.weights = _weights(model, number, self.shape)

    @property
    def bytes_per_atom(self) -> int:
        """Of what the way back reads and makes of each atom at once."""
        bias = self.weights.bias
        n_comp, n_in, n_hidden, n_out = self.shape
        return bias.element_size() * (2 * n_comp * n_hidden + 2 * n_in + n_out + bias.numel())

    def forward(self, mixed: Tensor, z: Tensor, out: Tensor, energy: Tensor) -> None:
        """See `AtomLayers.forward`; z are species (n,) int32, as indices, in the first block."""
        triton_atom_layers.forward(self.shape, self.weights, mixed, z, out, energy)

    def backward(
        self,
        mixed: Tensor,
        z: Tensor,
        gradient: Tensor | None = None,
        along: Tensor | None = None,
        energy: Tensor | None = None,
    ) -> Tensor:
        """See `AtomLayers.backward`; z are species (n,) int32, as indices, in the first block."""
        gm = torch.empty_like(mixed)
        given = self.shape, self.weights, mixed, z, gradient, gm
        triton_atom_layers.backward(*given, along=along, energy=energy)
        return gm


def _weights(model: Hipnn, number: int, shape: Shape) -> Weights:
    """Of a block, padded with zeros to whole blocks of columns."""
    layers = [cast(Any, layer) for layer in cast(nn.ModuleList, model.blocks[number])]
    interaction, readout = layers[0].layer, cast(Any, model.readouts[number + 1])
    first, adjust = interaction.self_interaction.weight, getattr(layers[0], "adjust", None)
    matrix = adjust.weight if isinstance(adjust, nn.Linear) else None
    n_in, n_hidden, n_out = (padded(n) for n in shape[1:])

    def whole(numbers: Tensor, *sizes: int) -> Tensor:
        numbers = numbers.detach()
        missing = [(0, n - now) for n, now in zip(sizes, numbers.shape, strict=True)]
        return pad(numbers, [k for pair in reversed(missing) for k in pair]).contiguous()

    def stack(tensors: list[Tensor], *sizes: int) -> Tensor:
        return torch.stack([whole(t, *sizes) for t in tensors]) if tensors else first.new_zeros(0)

    residual = model.config.residual
    if number == 0:  # species are looked up
        none, n_in = first.new_full((1, 1), torch.nan), 1 + shape.n_in
        matrix = torch.eye(shape.n_in).to(first) if matrix is None else matrix.T
        first, matrix = (torch.cat([none.expand(1, w.shape[1]), w]) for w in (first.T, matrix))
        sizes = (n_in, n_hidden), (n_in, n_out)
    else:
        sizes = (n_hidden, n_in), (n_out, n_in)
    scales = [getattr(interaction, f"{name}_scale", None) for name in ("vector", "quadrupole")]
    return Weights(
        first=whole(first, *sizes[0]),
        adjust=whole(matrix, *sizes[1]) if residual and matrix is not None else None,
        inward=stack([layer.layer.weight for layer in layers[1:]], n_hidden, n_out),
        outward=stack([layer.out.weight for layer in layers], n_out, n_hidden)
        if residual
        else None,
        bias=stack(
            [interaction.self_interaction.bias, *(x.layer.bias for x in layers[1:])], n_hidden
        ),
        shift=stack([layer.out.bias for layer in layers] if residual else [], n_out),
        readout=torch.cat([whole(readout.weight[0], n_out), readout.bias.detach()]),
        scales=torch.cat(
            [
                first.new_tensor([interaction.cusp]),
                *(whole(s, n_hidden) for s in scales if s is not None),
            ]
        ),
    )


@cache
def atoms_check(device: torch.device, dtype: torch.dtype, order: int) -> None:
    """Compare the kernels with torch's operators, once per device, dtype and order.

    Raises:
        BackendError: a kernel is wrong.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs as well
        config = HipnnConfig((1, 6), n_feat=5, n_hidden=7, n_atom_layers=2, order=order)
        model = Hipnn(config, backend="torch").to(device, dtype)
        z, g = torch.randn(2, 3, 5).to(device, dtype)
        m = torch.randn(3, N_COMPONENTS[order], 7).to(device, dtype)
    found = []
    for layers in (AtomLayers(model, 1, plain=True), DeviceAtomLayers(model, 1)):
        out, along, energy = torch.empty_like(z), torch.empty_like(z), z.new_zeros(3).double()
        layers.forward(m, z, out, energy)
        found.append((out, layers.backward(m, z, g, along, energy), along, energy))
    for name, want, got in zip(("features", "dE/dm", "dE/dz", "energies"), *found, strict=True):
        error = float((got - want).abs().max())
        if not error <= 64 * torch.finfo(dtype).eps * float(want.abs().max()):
            raise BackendError(
                f"backend 'triton' computes wrong {name} of atom layers in {dtype} on {device} "
                f"(largest difference {error:.1e}); choose backend='torch' on this machine, and "
                "report this with your versions"
            )
