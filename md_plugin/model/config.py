"""HipnnConfig: everything that defines the architecture of a network, as plain data.

Names of fields are those of the papers; `md_plugin.hippynn_settings` maps them to hippynn's.
"""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.modules import activation as torch_activations

N_ELEMENTS = 119  # index 0 is no element
MAX_INVARIANT_ORDER = 4  # factors in the invariants of `md_plugin.model.invariants`

# Those that map a number, or a row of features, to one of the same shape.
ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU"),
    *("LogSigmoid", "LogSoftmax", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU"),
    *("Sigmoid", "Softmax", "Softmin", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
    "Threshold",
)


@dataclass(frozen=True)
class HipnnConfig:
    """What defines the architecture of a `Hipnn`; JSON-serialisable.

    Attributes:
        species: atomic numbers that the model knows, ascending.
        n_feat: features per atom, in every block or block by block.
        n_nu: sensitivities per interaction layer.
        n_interactions: interaction blocks.
        n_atom_layers: atom layers per block.
        rcut: cutoff, Å.
        r_min: centre of the innermost sensitivity where training starts, Å.
        r_max: centre of the outermost sensitivity where training starts, Å.
        order: highest tensor order: 0 scalar (HIP-NN), 1 vector, 2 quadrupole (HIP-NN-TS); up to
            3 (octupole) with invariants (HIP-HOP-NN).
        cusp: regularisation of tensor norms (HIP-NN-TS).
        reference_energies: energy of each species, eV; empty means zero. Kept in float64.
        n_hidden: width inside residual layers, in every block or block by block; None: n_feat.
        residual: whether layers are residual; else each is a layer and an activation.
        activation: one of torch.nn, with its options: "Softplus", "LeakyReLU(negative_slope=0.1)".
        n_gaussians: Gaussians that a matrix turns into the n_nu sensitivities (a bottleneck);
            None: each sensitivity is one Gaussian.
        n_max: tensors multiplied in one invariant, at most (HIP-HOP-NN); 0: norms (HIP-NN-TS).
        norm_eps: epsilon of the normalisation of invariants; None: they are not normalised.
        pair_cutoff: pairs from here on are left out although the cutoff function has not vanished
            yet, Å; None: there are none.
    """

    species: tuple[int, ...]
    n_feat: int | tuple[int, ...] = 20
    n_nu: int = 20
    n_interactions: int = 2
    n_atom_layers: int = 3
    rcut: float = 6.0
    r_min: float = 1.5
    r_max: float = 5.5
    order: int = 0
    cusp: float = 1e-6
    reference_energies: tuple[float, ...] = ()
    n_hidden: int | tuple[int, ...] | None = None
    residual: bool = True
    activation: str = "Softplus"
    n_gaussians: int | None = None
    n_max: int = 0
    norm_eps: float | None = 1e-5
    pair_cutoff: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "species", tuple(int(z) for z in self.species))
        object.__setattr__(self, "reference_energies", tuple(map(float, self.reference_energies)))
        for name in ("n_feat", "n_hidden"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                widths = tuple(int(width) for width in value)
                alike = len(widths) == self.n_interactions and len(set(widths)) == 1
                object.__setattr__(self, name, widths[0] if alike else widths)
        self._check_species()
        self._check_sizes()
        self._check_tensors()
        if not 0 < self.r_min < self.r_max <= self.rcut < float("inf"):
            raise ValueError(
                f"needs 0 < r_min < r_max <= rcut, got {self.r_min}, {self.r_max}, {self.rcut} Å"
            )
        if self.pair_cutoff is not None and not 0 < self.pair_cutoff < self.rcut:
            raise ValueError(
                f"pair_cutoff must lie between 0 and rcut ({self.rcut} Å), got {self.pair_cutoff}"
            )
        make_activation(self.activation)

    def _check_species(self) -> None:
        if not self.species or sorted(set(self.species)) != list(self.species):
            raise ValueError(f"species must be ascending atomic numbers, got {self.species}")
        if not 0 < self.species[0] <= self.species[-1] < N_ELEMENTS:
            raise ValueError(f"species must lie between 1 and {N_ELEMENTS - 1}: {self.species}")
        if len(self.reference_energies) not in (0, len(self.species)):
            raise ValueError("reference_energies must hold one energy per species, or none")

    def _check_sizes(self) -> None:
        if min(self.n_nu, self.n_interactions) < 1 or self.n_atom_layers < 0:
            raise ValueError("n_nu and n_interactions must be at least 1, n_atom_layers at least 0")
        for name in ("n_feat", "n_hidden"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.n_interactions:
                raise ValueError(
                    f"{name} has {len(value)} widths for {self.n_interactions} interaction blocks"
                )
        n_gaussians = 1 if self.n_gaussians is None else self.n_gaussians
        if min(*self.widths, *self.hidden_widths, n_gaussians) < 1:
            raise ValueError("n_feat, n_hidden and n_gaussians must be at least 1")
        if self.n_hidden is not None and not self.residual:
            raise ValueError("n_hidden is the width inside residual layers: it needs residual=True")

    def _check_tensors(self) -> None:
        if self.n_max not in range(MAX_INVARIANT_ORDER + 1):
            raise ValueError(f"n_max must be 0 to {MAX_INVARIANT_ORDER}, got {self.n_max}")
        if self.order not in range(4 if self.n_max else 3):
            raise ValueError(
                f"order must be 0, 1 or 2, or 3 for a model with invariants (n_max > 0): "
                f"got {self.order}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Features before the first block and after each block."""
        each = self.n_feat if isinstance(self.n_feat, tuple) else (self.n_feat,)
        n_repeat = 1 if isinstance(self.n_feat, tuple) else self.n_interactions
        return (len(self.species), *(each * n_repeat))

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Width inside the layers of each block."""
        if self.n_hidden is None:
            return self.widths[1:]
        if isinstance(self.n_hidden, tuple):
            return self.n_hidden
        return (self.n_hidden,) * self.n_interactions

    @property
    def kind(self) -> str:
        """What such a network is called."""
        if self.n_max:
            return f"HIP-HOP-NN (order {self.order}, up to {self.n_max} tensors)"
        return ("HIP-NN", "HIP-NN-TS vector", "HIP-NN-TS quadrupole")[self.order]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def make_activation(text: str) -> nn.Module:
    """The module of torch.nn that `text` names, as in "Softplus" or "ELU(alpha=0.5)".

    Raises:
        ValueError: no such activation, or options that it does not have.
    """
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Name):
            name, options = call.id, {}
        else:
            assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
            name = call.func.id
            options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError, TypeError) as error:
        raise ValueError(
            f"activation {text!r} is not of the form Name or Name(option=value)"
        ) from error
    if name not in ACTIVATIONS:
        raise ValueError(f"no activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    if "max" in name and options.get("dim") not in (1, -1):
        raise ValueError(f"activation {text!r} must act on the features of each atom: dim=1")
    try:
        module: nn.Module = getattr(torch_activations, name)(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"activation {text!r}: {error}") from error
    return module
