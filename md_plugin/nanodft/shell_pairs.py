"""Pairs of shells as sums of Hermite Gaussians: what every Coulomb integral is made of.

    chi_m chi_n = sum_k sum_tuv E_k,tuv^mn Lambda_tuv(r; p_k, P_k)         k: pairs of primitives

Shells of one atom with the same exponents, the s and p of STO-3G and 6-31G, are merged into one sp
shell of four functions: its Hermite integrals are then computed once, not four times per side. A
pair is unordered and in one of three classes, (s, s), (sp, s), (sp, sp), with 1, 4 and 16 products
of functions and Hermite orders up to 0, 1 and 2. What does not depend on positions is computed once
per Basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.hermite import TRIPLES, Triple, expansion, n_hermite

# Powers of x, y, z in the functions of an sp shell; a pure s shell has the first only.
POWERS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))


@dataclass(frozen=True, eq=False)
class Shell:
    """Functions on one centre with common exponents: s, or s and p.

    Attributes:
        atom: index of the centre.
        exponents: (n_prim,), 1/bohr^2.
        coefficients: (n_func, n_prim); zero for functions that the basis lacks.
        ao: indices of the functions, n_func of them; -1 where the basis lacks it.
    """

    atom: int
    exponents: Tensor
    coefficients: Tensor
    ao: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PairClass:
    """Pairs of shells with the same number of functions; n_prod products of functions in each.

    Attributes:
        order: highest Hermite order, 0, 1 or 2.
        ao: (n_pair, n_prod, 2) functions m, n of a product; -1 where the basis lacks it.
        product: (n_pair, n_prod) number of a product among the unique ones m >= n of the whole
            basis, m (m + 1) / 2 + n; -1 where the basis lacks a function.
        weight: (n_pair,) float64, 1 for a shell with itself, else 2.
        start: (n_pair + 1,) first primitive pair of each pair, within the class.
        pair: (n_prim,) the pair of each primitive pair.
        first, last: the class's primitive pairs within `ShellPairs`.
        coefficients: (n_prim, n_prod) c_m c_n.
    """

    order: int
    ao: Tensor
    product: Tensor
    weight: Tensor
    start: Tensor
    pair: Tensor
    first: int
    last: int
    coefficients: Tensor


@dataclass(frozen=True, eq=False)
class ShellPairs:
    """All pairs of shells of a Basis, by class.

    Attributes:
        classes: without empty ones, in rising order.
        atom: (2, n_prim) centres A, B.
        exponent: (2, n_prim) a, b.
    """

    classes: tuple[PairClass, ...]
    atom: Tensor
    exponent: Tensor


@dataclass(frozen=True, eq=False)
class HermitePairs:
    """Expansion of the pairs of one class at given positions.

    Attributes:
        kind: the class.
        exponent: (n_prim,) p, 1/bohr^2.
        centre: (..., n_prim, 3) P, bohr.
        expansion: (..., n_prim, n_hermite(order), n_prod) E.
    """

    kind: PairClass
    exponent: Tensor
    centre: Tensor
    expansion: Tensor


def merged_shells(basis: Basis) -> list[Shell]:
    """The shells of a basis, s shells joined with the p shells of the same centre and exponents."""
    groups: dict[tuple[int, tuple[float, ...]], dict[int, int]] = {}
    for shell, (atom, l) in enumerate(zip(basis.atom.tolist(), basis.l.tolist(), strict=True)):
        members = groups.setdefault((atom, tuple(basis.exponents[shell].tolist())), {})
        if l in members:  # the same exponents twice: two contractions of one set
            members = groups.setdefault((atom, (*basis.exponents[shell].tolist(), shell)), {})
        members[l] = shell
    shells = []
    for (atom, _), members in groups.items():
        exponents = basis.exponents[next(iter(members.values()))]
        rows, ao = [], []
        for function in range(4 if 1 in members else 1):
            l, part = (1, function - 1) if function else (0, 0)
            there = l in members
            rows.append(basis.coefficients[members[l]] if there else torch.zeros_like(exponents))
            ao.append(int(basis.ao[members[l]]) + part if there else -1)
        shells.append(Shell(atom, exponents, torch.stack(rows), tuple(ao)))
    return shells


@lru_cache(maxsize=64)
def shell_pairs(basis: Basis, device: torch.device) -> ShellPairs:
    """All pairs of shells of a basis on a device."""
    shells = merged_shells(basis)
    by_class: dict[int, list[tuple[Shell, Shell]]] = {0: [], 1: [], 2: []}
    for i, one in enumerate(shells):
        for other in shells[: i + 1]:
            pair = (one, other) if len(one.ao) >= len(other.ao) else (other, one)
            by_class[sum(len(s.ao) == 4 for s in pair)].append(pair)
    classes, first = [], 0
    for order, pairs in by_class.items():
        if pairs:
            classes.append(_pair_class(order, pairs, first, device))
            first = classes[-1].last
    everything = [pair for pairs in by_class.values() for pair in pairs]
    atoms = [
        (a.atom, b.atom) for a, b in everything for _ in range(len(a.exponents) * len(b.exponents))
    ]
    exponents = [torch.cartesian_prod(a.exponents, b.exponents) for a, b in everything]
    return ShellPairs(
        classes=tuple(classes),
        atom=torch.tensor(atoms).T.contiguous().to(device),
        exponent=torch.cat(exponents).T.contiguous().to(device),
    )


def _pair_class(
    order: int, pairs: Sequence[tuple[Shell, Shell]], first: int, device: torch.device
) -> PairClass:
    counts = [len(a.exponents) * len(b.exponents) for a, b in pairs]
    start = torch.tensor([0, *counts]).cumsum(0)
    weight = torch.tensor([1.0 if a is b else 2.0 for a, b in pairs], dtype=torch.float64)
    coefficients = [
        torch.einsum("mi,nj->ijmn", a.coefficients, b.coefficients).reshape(count, -1)
        for (a, b), count in zip(pairs, counts, strict=True)
    ]
    ao = torch.tensor([[(m, n) for m in a.ao for n in b.ao] for a, b in pairs])
    high, low = torch.maximum(*ao.unbind(-1)), torch.minimum(*ao.unbind(-1))
    return PairClass(
        order=order,
        ao=ao.to(device),
        product=torch.where(low < 0, -1, high * (high + 1) // 2 + low).to(device),
        weight=weight.to(device),
        start=start.to(device),
        pair=torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(counts)).to(device),
        first=first,
        last=first + int(start[-1]),
        coefficients=torch.cat(coefficients).to(device),
    )


def products(order: int) -> list[tuple[Triple, Triple]]:
    """Powers of x, y, z of the two functions in each product of a class."""
    first, second = ((1, 1), (4, 1), (4, 4))[order]
    return [(m, n) for m in POWERS[:first] for n in POWERS[:second]]


@lru_cache(maxsize=16)
def _factors(order: int, device: torch.device) -> tuple[Tensor, ...]:
    """Per axis: (n_hermite(order), n_prod) where the product's E_t^ij stands among the 12."""
    triples = TRIPLES[: n_hermite(order)]
    return tuple(
        torch.tensor(
            [[3 * (2 * m[d] + n[d]) + t[d] for m, n in products(order)] for t in triples]
        ).to(device)
        for d in range(3)
    )


def hermite_pairs(pairs: ShellPairs, positions: Tensor) -> tuple[HermitePairs, ...]:
    """Expand all pairs of shells; differentiable in the positions (..., n_atom, 3), bohr."""
    a, b = pairs.exponent
    p = a + b
    at, other = positions[..., pairs.atom[0], :], positions[..., pairs.atom[1], :]
    separation = at - other
    # P - A and P - B from A - B: no cancellation, exactly zero on one centre
    pa, pb = (-b / p)[:, None] * separation, (a / p)[:, None] * separation
    centre = at + pa
    prefactor = torch.exp(-a * b / p * (separation * separation).sum(-1))
    rows = expansion(1, 1, pa, pb, (0.5 / p)[:, None])
    zero = torch.zeros_like(pa)
    # (..., n_prim, 3, 12): i, j, t of one axis, zero where t > i + j
    axes = torch.stack([e for row in rows for e in (*row, zero, zero)[:3]], dim=-1)
    tables = []
    for kind in pairs.classes:
        part = slice(kind.first, kind.last)
        table = (prefactor[..., part, None] * kind.coefficients)[..., None, :]
        for axis, index in enumerate(_factors(kind.order, positions.device)):
            if kind.order:
                table = table * axes[..., part, axis, :][..., index]
        tables.append(HermitePairs(kind, p[part], centre[..., part, :], table))
    return tuple(tables)
