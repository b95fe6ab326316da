"""HIP-NN: the hierarchically interacting particle neural network, readable from top to bottom.

    z^0        one-hot species
    z^k        block k: one interaction layer, then n_atom_layers residual atom layers
    E_i        = E_ref(species_i) + sum_k readout_k(z_i^k),        E = sum_i E_i

Lubbers, Smith, Barros, J. Chem. Phys. 148, 241715 (2018); tensor sensitivities (HIP-NN-TS):
Chigaev et al., J. Chem. Phys. 158, 184108 (2023). Layer for layer the same function as hippynn's
Hipnn, HipnnVec, HipnnQuad with residual layers and softplus.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from md_plugin.halo import Halo, NoHalo
from md_plugin.kernels.registry import backend_choice, resolve
from md_plugin.model.interaction import InteractionLayer
from md_plugin.model.radial import InverseGaussianSensitivity, tensor_components
from md_plugin.pairs import Pairs

N_ELEMENTS = 119  # index 0 is no element


@dataclass(frozen=True)
class HipnnConfig:
    """What defines the architecture of a `Hipnn`; JSON-serialisable.

    Attributes:
        species: atomic numbers that the model knows, ascending.
        n_feat: features per atom in every block.
        n_nu: sensitivities per interaction layer.
        n_interactions: interaction blocks.
        n_atom_layers: residual atom layers per block.
        rcut: cutoff, Å.
        r_min: centre of the innermost sensitivity, Å.
        r_max: centre of the outermost sensitivity, Å.
        order: 0 scalar (HIP-NN), 1 vector, 2 quadrupole (HIP-NN-TS).
        cusp: regularisation of tensor norms.
        reference_energies: energy of each species, eV; empty means zero. Kept in float64.
    """

    species: tuple[int, ...]
    n_feat: int = 20
    n_nu: int = 20
    n_interactions: int = 2
    n_atom_layers: int = 3
    rcut: float = 6.0
    r_min: float = 1.5
    r_max: float = 5.5
    order: int = 0
    cusp: float = 1e-6
    reference_energies: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "species", tuple(int(z) for z in self.species))
        object.__setattr__(self, "reference_energies", tuple(map(float, self.reference_energies)))
        if not self.species or sorted(set(self.species)) != list(self.species):
            raise ValueError(f"species must be ascending atomic numbers, got {self.species}")
        if not 0 < self.species[0] <= self.species[-1] < N_ELEMENTS:
            raise ValueError(f"species must lie between 1 and {N_ELEMENTS - 1}: {self.species}")
        if self.order not in (0, 1, 2):
            raise ValueError(f"order must be 0, 1 or 2, got {self.order}")
        if min(self.n_feat, self.n_nu, self.n_interactions) < 1 or self.n_atom_layers < 0:
            raise ValueError(
                "n_feat, n_nu and n_interactions must be at least 1, n_atom_layers at least 0"
            )
        if not 0 < self.r_min < self.r_max <= self.rcut < float("inf"):
            raise ValueError(
                f"needs 0 < r_min < r_max <= rcut, got {self.r_min}, {self.r_max}, {self.rcut} Å"
            )
        if len(self.reference_energies) not in (0, len(self.species)):
            raise ValueError("reference_energies must hold one energy per species, or none")

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class ResidualLayer(nn.Module):
    """x -> out(softplus(hidden)) + x, where `hidden` comes from the wrapped layer.

    `adjust`, a matrix without bias, fits x to the new width where that differs.
    """

    def __init__(self, layer: nn.Module, n_in: int, n_out: int):
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(n_out, n_out)
        self.adjust = nn.Linear(n_in, n_out, bias=False) if n_in != n_out else nn.Identity()

    def forward(self, features: Tensor, *rest: Any) -> Tensor:
        """Features (n_send, n_in) -> (n_recv, n_out)."""
        hidden = softplus(self.layer(features, *rest))
        result: Tensor = self.out(hidden) + self.adjust(features[: hidden.shape[0]])
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
        widths = [n_species] + [config.n_feat] * config.n_interactions
        self.blocks = nn.ModuleList(_block(config, n_in, n_out) for n_in, n_out in pairwise(widths))
        self.readouts = nn.ModuleList(
            nn.Linear(width, 1, bias=level > 0) for level, width in enumerate(widths)
        )
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
    def n_exchanges(self) -> int:
        """How often the halo is filled per energy, and its adjoint called per gradient."""
        return self.config.n_interactions - 1

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
        r = torch.linalg.vector_norm(r_ij, dim=1)
        components = tensor_components(r_ij / r[:, None], self.config.order)
        r, components = r.to(self.encoder.dtype), components.to(self.encoder.dtype)

        features = self.encoder[species.long()]
        energy = self.readouts[0](features[: pairs.n_recv])
        for level, block in enumerate(self.blocks):
            interaction, *atom_layers = cast(nn.ModuleList, block)
            if level > 0:
                features = _filled(halo, features, pairs)
            features = interaction(features, pairs, r, components, sums)
            for atom_layer in atom_layers:
                features = atom_layer(features)
            energy = energy + self.readouts[level + 1](features)

        reference = self._reference_energy[species[: pairs.n_recv].long()]
        atom_energy: Tensor = energy[:, 0].double() + reference
        return atom_energy

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._reference_energy = self._reference_energy.to(self.encoder.device)
        return self

    def extra_repr(self) -> str:
        """The backend, for repr."""
        return f"backend={self.backend!r}"


def _filled(halo: Halo, features: Tensor, pairs: Pairs) -> Tensor:
    filled = halo.fill(features)
    if filled.shape[0] != pairs.n_send:
        raise ValueError(
            f"{pairs.n_send - pairs.n_recv} ghost atoms, but the features of "
            f"{filled.shape[0] - pairs.n_recv} are known: models with several interaction layers "
            "need a halo that fills them"
        )
    return filled


def _block(config: HipnnConfig, n_in: int, n_out: int) -> nn.ModuleList:
    sensitivity = InverseGaussianSensitivity(config.n_nu, config.r_min, config.r_max, config.rcut)
    interaction = InteractionLayer(n_in, n_out, sensitivity, config.order, config.cusp)
    layers: list[nn.Module] = [ResidualLayer(interaction, n_in, n_out)]
    for _ in range(config.n_atom_layers):
        linear = nn.Linear(n_out, n_out)
        nn.init.xavier_normal_(linear.weight)
        layers.append(ResidualLayer(linear, n_out, n_out))
    return nn.ModuleList(layers)
