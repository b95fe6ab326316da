"""An imported network beside hippynn's own modules, on random atoms."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor

from md_plugin.hippynn_io.graph import NetworkPart
from md_plugin.hippynn_io.settings import HippynnError
from md_plugin.model.hipnn import Hipnn, HipnnSum
from md_plugin.pairs import Pairs

# Largest difference from hippynn's atom energies, relative to how much they vary: both are summed
# in float64, in different orders, and reference energies may be a thousand times larger.
AGREEMENT = 1e-8


@torch.no_grad()
def compare(parts: list[NetworkPart], model: Hipnn | HipnnSum, target: int | None = None) -> float:
    """Largest difference of atom energies from hippynn's own modules, on random atoms.

    Args:
        parts: networks and heads with hippynn's modules.
        model: what was built of them, in the units of the parts.
        target: which energy, where heads predict several.

    Returns:
        The difference, relative to how much energies of atoms of a species vary.

    Raises:
        HippynnError: more than AGREEMENT.
    """
    generator = torch.Generator().manual_seed(0)
    species = torch.tensor([z for z in model.species for _ in range(6)])
    n = species.numel()
    x = torch.rand(n, 3, generator=generator, dtype=torch.float64) * (model.rcut * n ** (1 / 3) / 2)
    first, second = (k.flatten() for k in torch.meshgrid(*[torch.arange(n)] * 2, indexing="ij"))
    r_ij = x[second] - x[first]
    kept = (first != second) & (r_ij.norm(dim=1) > 0.1 * model.rcut)
    first, second, r_ij = first[kept], second[kept], r_ij[kept]
    pairs, order = Pairs.from_edges(first, second, n_recv=n, n_send=n)
    found = deepcopy(model).double()(species, pairs, r_ij[order])
    with plain_sums():
        expected = torch.zeros(n, dtype=torch.float64)
        for part in parts:
            expected += _hippynn_energy(part, species, (first, second, r_ij), target)
    by_species = expected.reshape(len(model.species), -1)
    varies = (by_species - by_species.mean(dim=1, keepdim=True)).abs().max()
    scale = float(varies) or float(expected.abs().max()) or 1.0
    difference = float((found - expected).abs().max()) / scale
    if not difference < AGREEMENT:
        raise HippynnError(
            f"the imported model differs from hippynn by {difference:.1e} (energies of random "
            "atoms, relative): this hippynn computes something that is not known here"
        )
    return difference


def _hippynn_energy(
    part: NetworkPart, species: Tensor, pairs: tuple[Tensor, Tensor, Tensor], target: int | None
) -> Tensor:
    first, second, r_ij = pairs
    r = r_ij.norm(dim=1)
    inside = r < part.settings.get("pair_cutoff", float("inf"))
    first, second, r_ij, r = first[inside], second[inside], r_ij[inside], r[inside]
    possible = torch.tensor(part.settings["module_kwargs"]["possible_species"])
    one_hot = (species[:, None] == possible[None, 1:]).double()
    network = deepcopy(part.module).cpu().double().eval()
    none = torch.zeros(0, dtype=torch.int64)
    vectors = [] if part.settings["network"] == "Hipnn" else [r_ij]
    features = network(one_hot, first, second, r, *vectors)
    total = torch.zeros(len(species), dtype=torch.float64)
    for head in part.heads:
        module, zero = deepcopy(head.module).cpu().double(), torch.zeros(len(species)).long()
        if head.kind == "HEnergyNode":
            energies = module(features, zero, 1)[1]
        else:
            alone = [v[:0] for v in vectors]
            vacuum = network(torch.eye(len(possible) - 1).double(), none, none, r[:0], *alone)
            energies = sum(module(features, vacuum, one_hot, zero, 1)[1])
        total += head.coefficient * energies[:, (target or 0) if energies.shape[1] > 1 else 0]
    return total


@contextmanager
def plain_sums() -> Iterator[None]:
    """hippynn's sums in plain torch: its numba ones leave sensitivities below 1e-10 out, and
    compile for long."""
    from hippynn import custom_kernels

    active = custom_kernels.CUSTOM_KERNELS_ACTIVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        custom_kernels.set_custom_kernels("_legacy")
        try:
            yield
        finally:
            custom_kernels.set_custom_kernels(active)
