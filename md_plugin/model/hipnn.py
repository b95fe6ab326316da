"""HIP-NN: the hierarchically interacting particle neural network, readable from top to bottom.

    z^0        one-hot species
    z^k        block k: one interaction layer, then n_atom_layers atom layers
    E_i        = E_ref(species_i) + sum_k readout_k(z_i^k),        E = sum_i E_i

Lubbers, Smith, Barros, J. Chem. Phys. 148, 241715 (2018); tensor sensitivities (HIP-NN-TS):
Chigaev et al., J. Chem. Phys. 158, 184108 (2023); invariants (HIP-HOP-NN): Allen et al.,
arXiv:2503.23515 (2025). Layer for layer the same function as hippynn's Hipnn, HipnnVec, HipnnQuad
and HipHopnn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from md_plugin.halo import Halo, NoHalo, check_filled
from md_plugin.kernels.registry import backend_choice, resolve
from md_plugin.model.config import N_ELEMENTS, HipnnConfig, make_activation
from md_plugin.model.interaction import InteractionLayer
from md_plugin.model.invariants import InvariantMixing
from md_plugin.model.radial import (
    Distance,
    InverseGaussianSensitivity,
    TensorComponents,
    tensor_components,
)
from md_plugin.pairs import Pairs


class ResidualLayer(nn.Module):
    """x -> out(activation(hidden)) + x, where `hidden` comes from the wrapped layer.

    `adjust`, a matrix without bias, fits x to the new width where that differs.
    """

    def __init__(self, layer: nn.Module, n_in: int, n_hidden: int, n_out: int):
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(n_hidden, n_out)
        self.adjust = nn.Linear(n_in, n_out, bias=False) if n_in != n_out else nn.Identity()

    def forward(self, features: Tensor, activation: nn.Module, *rest: Any) -> Tensor:
        """Features (n_send, n_in) -> (n_recv, n_out)."""
        hidden = activation(self.layer(features, *rest))
        result: Tensor = self.out(hidden) + self.adjust(features[: hidden.shape[0]])
        return result


class PlainLayer(nn.Module):
    """x -> activation(layer(x)), in networks without residual layers."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor, activation: nn.Module, *rest: Any) -> Tensor:
        """Features (n_send, n_in) -> (n_recv, n_out)."""
        result: Tensor = activation(self.layer(features, *rest))
        return result


class Hipnn(nn.Module):
    """The network. Geometry may be wider than the network: float64 in, float32 layers.

    Args:
        config: the architecture.
        backend: name of the backend for the sums over neighbours; None looks at the enclosing
            `use_backend` block, the environment and the settings file, then takes "auto".
    """

    encoder: Tensor

    def __init__(self, config: HipnnConfig, backend: str | None = None):
        super().__init__()
        self.config = config
        self.backend = backend_choice(backend)
        n_species = len(config.species)
        self.blocks = nn.ModuleList(_block(config, k) for k in range(config.n_interactions))
        self.readouts = nn.ModuleList(
            nn.Linear(width, 1, bias=level > 0) for level, width in enumerate(config.widths)
        )
        self.activation = make_activation(config.activation)
        self.components = TensorComponents(config.order) if config.n_max else None
        # Unknown elements encode as NaN: never silently wrong, and no device sync to find out.
        encoder = torch.full((N_ELEMENTS, n_species), torch.nan)
        encoder[list(config.species)] = torch.eye(n_species)
        self.register_buffer("encoder", encoder, persistent=False)
        # No buffer: those are cast with the network, and float32 would round total energies.
        self._reference_energy = torch.zeros(N_ELEMENTS, dtype=torch.float64)
        if config.reference_energies:
            known = torch.tensor(config.reference_energies, dtype=torch.float64)
            self._reference_energy[list(config.species)] = known

    @property
    def parts(self) -> tuple[Hipnn, ...]:
        """The network itself: the parts of a `HipnnSum`."""
        return (self,)

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that the network knows."""
        return self.config.species

    @property
    def rcut(self) -> float:
        """Cutoff, Å."""
        return self.config.rcut

    @property
    def n_exchanges(self) -> int:
        """How often the halo is filled per energy, and its adjoint called per gradient."""
        return self.config.n_interactions - 1

    @property
    def n_feat(self) -> int:
        """Features per atom in an exchange, at most."""
        return max(self.config.widths[1:-1], default=self.config.widths[-1])

    def forward(
        self,
        species: Tensor,
        pairs: Pairs,
        r_ij: Tensor,
        halo: Halo | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Energy of each receiver.

        Args:
            species: (n_send,) integer atomic numbers, local atoms then ghosts.
            pairs: who sees whom; pairs beyond rcut contribute exactly nothing.
            r_ij: (n_pair, 3) x[sender] - x[receiver] (+ periodic shift), Å.
            halo: makes features of ghosts known; None where there are no ghosts.
            backend: overrides the model's backend for this call.

        Returns:
            (n_recv,) float64, eV. NaN for an element that the model does not know.
        """
        halo = halo or NoHalo()
        sums = resolve(backend, self.backend, r_ij.device)
        r: Tensor = Distance.apply(r_ij)  # type: ignore[no-untyped-call]
        components = self._components(r_ij, r)
        r, components = r.to(self.encoder.dtype), components.to(self.encoder.dtype)

        features = self.encoder[species.long()]
        energy = self.readouts[0](features[: pairs.n_recv])
        for level, block in enumerate(self.blocks):
            interaction, *atom_layers = cast(nn.ModuleList, block)
            if level > 0:
                features = check_filled(halo.fill(features), pairs)
            features = interaction(features, self.activation, pairs, r, components, sums)
            for atom_layer in atom_layers:
                features = atom_layer(features, self.activation)
            energy = energy + self.readouts[level + 1](features)

        atom_energy: Tensor = energy[:, 0].double() + self.reference_energy(species[: pairs.n_recv])
        return atom_energy

    def reference_energy(self, species: Tensor) -> Tensor:
        """(n,) atomic numbers -> (n,) float64, eV."""
        return self._reference_energy[species.long()]

    def _components(self, r_ij: Tensor, r: Tensor) -> Tensor:
        if self.config.order == 0:
            return torch.ones_like(r[:, None])
        r_hat = r_ij * r.reciprocal()[:, None]  # fewer passes than a quotient, differentiated
        if self.components is None:
            return tensor_components(r_hat, self.config.order)
        found: Tensor = self.components(r_hat)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._reference_energy = self._reference_energy.to(self.encoder.device)
        return self

    def extra_repr(self) -> str:
        """The backend, for repr."""
        return f"backend={self.backend!r}"


def _block(c: HipnnConfig, number: int) -> nn.ModuleList:
    n_in, n_out = c.widths[number : number + 2]
    n_hidden = c.hidden_widths[number]
    sensitivity = InverseGaussianSensitivity(
        c.n_nu, c.r_min, c.r_max, c.rcut, c.n_gaussians, c.pair_cutoff
    )
    mixing = InvariantMixing(n_hidden, c.n_max, c.order, c.norm_eps) if c.n_max else None
    first = InteractionLayer(n_in, n_hidden, sensitivity, c.order, c.cusp, mixing)
    layers = [_layer(c, first, n_in, n_hidden, n_out)]
    for _ in range(c.n_atom_layers):
        linear = nn.Linear(n_out, n_hidden)
        nn.init.xavier_normal_(linear.weight)
        layers.append(_layer(c, linear, n_out, n_hidden, n_out))
    return nn.ModuleList(layers)


def _layer(c: HipnnConfig, inner: nn.Module, n_in: int, n_hidden: int, n_out: int) -> nn.Module:
    return ResidualLayer(inner, n_in, n_hidden, n_out) if c.residual else PlainLayer(inner)


class HipnnSum(nn.Module):
    """Several networks whose energies add up; wherever a `Hipnn` fits.

    Args:
        networks: at least two, for the same species. Each keeps its cutoff.

    Raises:
        ValueError: fewer than two networks, or of different species.
    """

    def __init__(self, networks: Sequence[Hipnn]):
        super().__init__()
        if len(networks) < 2:
            raise ValueError(f"a sum needs at least two networks, got {len(networks)}")
        if len({network.species for network in networks}) > 1:
            raise ValueError(
                "the networks of a sum must know the same species: "
                + "; ".join(str(network.species) for network in networks)
            )
        self.networks = nn.ModuleList(networks)
        self.backend = networks[0].backend

    @property
    def parts(self) -> tuple[Hipnn, ...]:
        """The networks."""
        return tuple(cast(Hipnn, network) for network in self.networks)

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers that the networks know."""
        return self.parts[0].species

    @property
    def rcut(self) -> float:
        """Largest cutoff, Å."""
        return max(part.rcut for part in self.parts)

    @property
    def n_exchanges(self) -> int:
        """Exchanges of the deepest network; each network makes its own."""
        return max(part.n_exchanges for part in self.parts)

    @property
    def n_feat(self) -> int:
        """Features per atom in an exchange, at most."""
        return max(part.n_feat for part in self.parts)

    def forward(
        self,
        species: Tensor,
        pairs: Pairs,
        r_ij: Tensor,
        halo: Halo | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Energy of each receiver (n_recv,) float64, eV; see `Hipnn.forward`."""
        energies = [part(species, pairs, r_ij, halo, backend) for part in self.parts]
        return torch.stack(energies).sum(dim=0)
