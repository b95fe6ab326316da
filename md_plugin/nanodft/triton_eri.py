"""Electron repulsion integrals on CUDA with Triton, in double precision.

    half_h'^mn = sum_b E_h^mn theta R_{h+h'}              b: primitive pairs of the bra's pair
    (mn|kl)   += half_h'^mn (-1)^h' E_h'^kl               (R: `triton_parts`)

A program has one pair of shells as bra, of one molecule; its tile is (primitive pairs of the bra,
products of its functions, pairs of shells as kets). A thread contracts its quartet of shells in
registers and writes each integral once, with its mirror image: no atomics, no scratch memory, two
runs agree to the last bit. Pairs are sorted by the number of their primitives, so that the threads
of a tile have equal work; of a class with itself only half of the tiles have any. Nothing is
screened. Many geometries are one launch for each pair of classes.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, misc"
from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from md_plugin.nanodft import boys
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.shell_pairs import HermitePairs, PairClass, hermite_pairs, shell_pairs
from md_plugin.nanodft.triton_parts import (
    OPTIONS,
    constants,
    coulomb,
    on_device,
    place_of,
    places,
)
from md_plugin.nanodft.two_electron_parts import parity, terms, wanted_products


@triton.jit
def _contracted(
    bra, bra_expansion, b0, b1, r, site, zero, table, n_bra, ORDER: tl.constexpr, N: tl.constexpr,
    STEPS: tl.constexpr, SUMS: tl.constexpr, BOYS: tl.constexpr, N_ROW: tl.constexpr,
    BRAS: tl.constexpr,
):  # fmt: skip
    """half_h' of the bra's primitives b0 .. b1 - 1, in turns, and one primitive of each ket."""
    N_BRA: tl.constexpr = len(SUMS)
    N_KET: tl.constexpr = len(SUMS[0])
    half = ()
    for _ in tl.static_range(N_KET):
        half = half + (zero,)
    for turn in range(b0, b1, BRAS):
        b = turn + tl.arange(0, BRAS)[:, None, None]
        hermite = coulomb(place_of(bra, b, n_bra), site, table, ORDER, N, STEPS, BOYS)
        for h in tl.static_range(N_BRA):
            e = tl.load(bra_expansion + (h * N_ROW + r) * n_bra + b, mask=b < b1, other=0.0)
            added = ()
            for j in tl.static_range(N_KET):
                added = added + (half[j] + e * hermite[SUMS[h][j]],)
            half = added
    return half


@triton.jit
def _expanded(total, half, e, live, n_ket, N_KET: tl.constexpr, TERMS: tl.constexpr):
    """total with what primitives of the kets add, whose expansions begin at e."""
    N_PROD: tl.constexpr = len(TERMS)
    added = ()
    for c in tl.static_range(N_PROD):
        value = total[c]
        for h in tl.static_range(N_KET):
            if TERMS[c][h]:
                value += half[h] * tl.load(e + (h * N_PROD + c) * n_ket, mask=live, other=0.0)
        added = added + (value,)
    return added


@triton.jit
def _store(out, n_out, row, column, values, meets, twice):
    """Write integrals at (row, column), and at (column, row) where that is another place."""
    value = tl.sum(values, axis=0, keep_dims=True)
    wanted = (row >= 0) & (column >= 0)
    tl.store(out + row * n_out + column, value, mask=wanted & meets)
    tl.store(out + column * n_out + row, value, mask=wanted & twice)


# Sizes are runtime values: another molecule compiles nothing.
@triton.jit(do_not_specialize=["n_bra", "n_ket", "n_bra_pair", "n_ket_pair", "n_out"])
def _repulsion(
    bra, bra_expansion, bra_span, bra_row, ket, ket_expansion, ket_span, ket_row, table, out,
    n_bra, n_ket, n_bra_pair, n_ket_pair, n_out, ORDER: tl.constexpr, N: tl.constexpr,
    STEPS: tl.constexpr, SUMS: tl.constexpr, TERMS: tl.constexpr, BOYS: tl.constexpr,
    N_ROW: tl.constexpr, SAME: tl.constexpr, BRAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the integrals of bras and kets of two classes to out (n_out, n_out).

    bra (4, n_bra), ket (4, n_ket): exponents and centres; expansions (n_hermite, n_prod, n), the
    ket's with its sign; spans (2, n_pair): first primitives, and those after the last; rows
    (n_pair, n_prod): numbers of the products, -1 for one that is not wanted; SAME: both classes are
    one, and a bra meets kets up to itself. Molecule by molecule, but for spans and rows.
    """
    N_PROD: tl.constexpr = len(TERMS)
    N_KET: tl.constexpr = len(SUMS[0])
    GROUPS: tl.constexpr = N_ROW // ROWS
    i = tl.program_id(0)
    r = (tl.program_id(1) % GROUPS * ROWS + tl.arange(0, ROWS))[None, :, None]
    j = (tl.program_id(1) // GROUPS * BLOCK + tl.arange(0, BLOCK))[None, None, :]
    molecule = tl.program_id(2).to(tl.int64)
    bra, ket = bra + molecule * 4 * n_bra, ket + molecule * 4 * n_ket
    bra_expansion += molecule * len(SUMS) * N_ROW * n_bra
    ket_expansion += molecule * N_KET * N_PROD * n_ket
    out += molecule * n_out * n_out
    meets = j < n_ket_pair
    twice = meets
    if SAME:
        meets, twice = meets & (j <= i), meets & (j < i)
    b0, b1 = tl.load(bra_span + i), tl.load(bra_span + n_bra_pair + i)
    k0 = tl.load(ket_span + j, mask=j < n_ket_pair, other=0)
    k1 = tl.load(ket_span + n_ket_pair + j, mask=j < n_ket_pair, other=0)
    zero = tl.zeros((BRAS, ROWS, BLOCK), tl.float64)
    total = ()
    for _ in tl.static_range(N_PROD):
        total = total + (zero,)
    for s in range(0, tl.max(tl.where(meets, k1 - k0, 0))):
        k = k0 + s
        site = place_of(ket, k, n_ket)
        half = _contracted(
            bra, bra_expansion, b0, b1, r, site, zero, table, n_bra, ORDER, N, STEPS, SUMS, BOYS,
            N_ROW, BRAS,
        )  # fmt: skip
        total = _expanded(total, half, ket_expansion + k, k < k1, n_ket, N_KET, TERMS)
    row = tl.load(bra_row + i * N_ROW + r)
    for c in tl.static_range(N_PROD):
        column = tl.load(ket_row + j * N_PROD + c, mask=j < n_ket_pair, other=-1)
        _store(out, n_out, row, column, total[c], meets, twice)


def compiled_in(bra: int, ket: int) -> dict[str, Any]:
    """The kernel's constants for two classes; two rows share R where registers suffice."""
    rows = 2 if bra + ket < 3 else 1
    return constants(bra, ket, len(terms(bra)), rows) | {"SAME": bra == ket}


def eri(basis: Basis, positions: Tensor, max_memory: int) -> Tensor:
    """(..., n_ao (n_ao + 1) / 2, same) integrals over unique products m >= n, in Hartree."""
    tables = hermite_pairs(shell_pairs(basis, positions.device), positions.detach())
    many, n = positions.shape[:-2], basis.n_ao * (basis.n_ao + 1) // 2
    packed = positions.new_empty((*many, n, n))
    boys_table = boys.table().to(packed.device)
    bras = [_side(t, torch.ones_like(parity(t.kind.order, packed))) for t in tables]
    kets = [_side(t, 2 * math.pi**2.5 * parity(t.kind.order, packed)) for t in tables]
    for i, (table, bra) in enumerate(zip(tables, bras, strict=True)):
        for other, ket in zip(tables[: i + 1], kets, strict=False):
            (n_pair, n_row), n_ket_pair = table.kind.product.shape, len(other.kind.product)
            fixed = compiled_in(table.kind.order, other.kind.order)
            blocks = n_row // fixed["ROWS"] * -(-n_ket_pair // fixed["BLOCK"])
            with on_device(packed):
                _repulsion[(n_pair, blocks, math.prod(many))](
                    *bra, *ket, boys_table, packed, len(table.exponent), len(other.exponent),
                    n_pair, n_ket_pair, n, **fixed, **OPTIONS,
                )  # fmt: skip
    return packed


def _side(table: HermitePairs, sign: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's arrays of a class: places, expansion, spans, rows."""
    everything = torch.arange(len(table.exponent), device=sign.device)
    expansion = (table.expansion * sign[:, None]).movedim(-3, -1).contiguous()
    return places(table, everything), expansion, *_sorted(table.kind)


@lru_cache(maxsize=64)
def _sorted(kind: PairClass) -> tuple[Tensor, Tensor]:
    """Spans (2, n_pair) and rows (n_pair, n_prod) of a class, the shortest contractions first."""
    first, end = kind.start[:-1], kind.start[1:]
    order = torch.argsort(end - first, stable=True)
    return torch.stack((first[order], end[order])), wanted_products(kind)[order].contiguous()
