"""Two-electron integrals on the CPU: tables in torch, kernels in numba.

Primitive pairs too far apart to matter are dropped. By their bounds (`two_electron_parts`) what is
left out is under `ERI_CUT` per quartet of primitives in the integrals, and in the gradient under
`GRADIENT_CUT` of the energy per quartet: the gradient of benzene in 6-31G is then 3e-10 Ha/bohr
from the complete one, that of smaller molecules 1e-10. A tenfold cut costs or saves 5 % of time.

Compiled code is cached on disk by numba; the first use in a fresh installation compiles for 12 s,
with several threads for 20 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from md_plugin.kernels.numba_cpu import threads
from md_plugin.nanodft import boys, numba_eri, numba_gradient
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.hermite import n_hermite, steps, sums
from md_plugin.nanodft.numba_kernels import Pairs, Recursion
from md_plugin.nanodft.shell_pairs import HermitePairs, hermite_pairs, shell_pairs
from md_plugin.nanodft.two_electron_parts import (
    bounds,
    cut_of_energy,
    gradient_of,
    kept,
    parity,
    terms,
    wanted_products,
)

ERI_CUT = 1e-14
GRADIENT_CUT = 1e-12
# Quartets of primitives that one thread does in about 3 ms; on a busy machine waking others may
# take longer.
SMALL = 100_000


def eri(basis: Basis, positions: Tensor, max_memory: int) -> Tensor:
    """(n_ao (n_ao + 1) / 2,) * 2 integrals over unique products m >= n, in Hartree."""
    tables = hermite_pairs(shell_pairs(basis, positions.device), positions.detach())
    sides = _sides(tables, ERI_CUT)
    products = [wanted_products(t.kind).numpy() for t in tables]
    n = basis.n_ao * (basis.n_ao + 1) // 2
    packed = np.zeros((n, n))
    share = _share(sides)
    for i, side in enumerate(sides):
        sign = parity(side.order, positions).numpy()
        bra = side.arrays._replace(expansion=side.arrays.expansion * sign[:, None])
        for j, ket in enumerate(sides[: i + 1]):
            recursion = _recursion(side.order, ket.order)
            numbers = (products[i], products[j])
            share(numba_eri, "eri", bra, ket.arrays, i == j, recursion, *numbers, packed)
    return torch.from_numpy(packed)


def two_electron_gradient(
    basis: Basis, positions: Tensor, dm: Tensor, hyb: float, max_memory: int
) -> Tensor:
    """(n_atom, 3) gradient at constant density matrix, Ha/bohr; see `integrals`."""

    def potentials(
        tables: tuple[HermitePairs, ...], padded: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        sides = _sides(tables, cut_of_energy(GRADIENT_CUT, dm))
        for bra in sides:
            yield bra.kept, _potential(bra.order, bra, sides, padded.numpy(), hyb)

    return gradient_of(basis, positions, dm, hyb, potentials)


@dataclass(frozen=True, eq=False)
class _Side:
    """Pairs of one class that matter: arrays with the sign of a ket; kept: which primitives."""

    order: int
    arrays: Pairs
    kept: Tensor


def _potential(order: int, bra: _Side, sides: list[_Side], dm: np.ndarray, hyb: float) -> Tensor:
    """Y (n_prim, n_hermite(order + 1), n_prod) of a class of bras; (..., 1) without exchange."""
    n_row = bra.arrays.ao.shape[1] if hyb else 1
    out = np.zeros((len(bra.kept), n_hermite(order + 1), n_row))
    share = _share(sides)
    for ket in sides:
        recursion = _recursion(order + 1, ket.order)
        both = (bra.arrays, ket.arrays)
        share(numba_gradient, "gradient", *both, dm, hyb, GRADIENT_CUT, recursion, out)
    return torch.from_numpy(out)


def _share(sides: list[_Side]) -> Callable[..., None]:
    """Calls a kernel for all bras: in this thread alone, or in all that there are.

    One thread calls it directly, and numba's threads are then never started.
    """
    small = sum(len(side.kept) for side in sides) ** 2 < SMALL
    n_thread = 1 if small else threads()

    def call(module: Any, name: str, *arguments: Any) -> None:
        if n_thread == 1:
            getattr(module, f"{name}_rows")(*arguments, 0, 1)
        else:
            getattr(module, f"{name}_threads")(*arguments, n_thread)

    return call


def _sides(tables: tuple[HermitePairs, ...], cut: float) -> list[_Side]:
    """The kernels' arrays, without the primitive pairs that the cut drops."""
    bound = tuple(bounds(t) for t in tables)
    return [_side(*each) for each in zip(tables, bound, kept(bound, cut), strict=True)]


def _side(table: HermitePairs, bound: Tensor, part: Tensor) -> _Side:
    kind, order = table.kind, table.kind.order
    total = torch.zeros_like(kind.weight).index_add(0, kind.pair, bound)
    signed = table.expansion.detach()[part] * parity(order, bound)[:, None]
    arrays = Pairs(
        start=torch.searchsorted(part, kind.start).numpy(),
        ao=kind.ao.numpy(),
        weight=kind.weight.numpy(),
        exponent=table.exponent[part].numpy(),
        centre=table.centre.detach()[part].T.contiguous().numpy(),
        expansion=signed.permute(2, 1, 0).contiguous().numpy(),
        bound=bound[part].numpy(),
        total=total.numpy(),
        terms=_padded_terms(order),
    )
    return _Side(order, arrays, part)


@lru_cache(maxsize=3)
def _padded_terms(order: int) -> np.ndarray:
    """(n_prod, 5) number of the terms of each product, then these, the last repeated."""
    return np.array([(len(t), *t, *[t[-1]] * (4 - len(t))) for t in terms(order)])


@lru_cache(maxsize=16)
def _recursion(bra: int, ket: int) -> Recursion:
    """Constants for Hermite orders of the two sides."""
    plan = np.array(steps(bra + ket), dtype=np.int64).reshape(-1, 5)
    return Recursion(bra + ket, plan, sums(bra, ket).numpy(), boys.table().numpy())
