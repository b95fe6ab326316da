"""The gradient of the two-electron energy on CUDA with Triton, in double precision.

The tile of a program is (primitive pairs of the bra, products of its functions, primitive pairs of
the kets) of one molecule: the kets stream by in blocks. Per thread, in registers:

    G_h' = sum_kl Gamma_mnkl (-1)^h' E_h'^kl,        Gamma from the density matrix, on the fly
    Y_h += sum_h' G_h' theta R_{h+h'}                                    (R: `triton_parts`)

Kets are summed at the end: no atomics, so two runs agree to the last bit. The first use of an
installation compiles for about a minute. Where Gamma is a product, without exchange, one row serves
all products of a bra. Many geometries are one launch for each pair of classes; a primitive pair
that matters in one of them is computed in all.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, misc"
from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from md_plugin.nanodft import boys
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.hermite import n_hermite
from md_plugin.nanodft.triton_parts import (
    OPTIONS,
    constants,
    coulomb,
    on_device,
    place_of,
    places,
)
from md_plugin.nanodft.two_electron_parts import (
    bounds,
    cut_of_energy,
    gradient_of,
    kept,
    parity,
    terms,
)

CUT = 1e-12  # of the energy, per quartet of primitives; see `two_electron_parts`
ROWS = 2  # two products share the 56 values of R, and their 2 x 20 sums fit the registers beside it


@triton.jit
def _gamma(pair, m, n, ao, dm, root, n_dm, N_PROD: tl.constexpr, EXCHANGE: tl.constexpr):
    """Gamma_mnkl for each product kl of the kets' pairs; without exchange D_kl only."""
    gamma = ()
    for c in tl.static_range(N_PROD):
        k = tl.load(ao + (pair * N_PROD + c) * 2)
        l = tl.load(ao + (pair * N_PROD + c) * 2 + 1)
        value = tl.load(dm + k * n_dm + l)
        if EXCHANGE:
            value = value * tl.load(dm + m * n_dm + n)
            value -= tl.load(root + m * n_dm + k) * tl.load(root + n * n_dm + l)
            value -= tl.load(root + m * n_dm + l) * tl.load(root + n * n_dm + k)
        gamma = gamma + (value,)
    return gamma


@triton.jit
def _weights(gamma, e, live, zero, n_ket, N_KET: tl.constexpr, TERMS: tl.constexpr):
    """G_h' of the kets whose expansions begin at e."""
    weights = ()
    for h in tl.static_range(N_KET):
        weight = zero
        for c in tl.static_range(len(TERMS)):
            if TERMS[c][h]:
                weight += gamma[c] * tl.load(e + (c * N_KET + h) * n_ket, mask=live, other=0.0)
        weights = weights + (weight,)
    return weights


# Sizes are runtime values: another molecule compiles nothing.
@triton.jit(do_not_specialize=["n_bra", "n_ket", "n_dm"])
def _potential(
    bra, bra_pair, bra_ao, ket, ket_pair, ket_ao, expansion, dm, root, table, out, n_bra, n_ket,
    n_dm, ORDER: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, SUMS: tl.constexpr,
    TERMS: tl.constexpr, BOYS: tl.constexpr, N_ROW: tl.constexpr, EXCHANGE: tl.constexpr,
    BRAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to out (n_bra, n_hermite, N_ROW) the potential of the kets of one class.

    bra (4, n_bra), ket (4, n_ket): exponents and centres; pairs and ao: see `PairClass`;
    expansion (n_prod, n_hermite, n_ket) with weight and sign; root: sqrt(hyb) / 2 dm. Molecule by
    molecule, but for pairs and ao.
    """
    b = (tl.program_id(0) * BRAS + tl.arange(0, BRAS))[:, None, None]
    r = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[None, :, None]
    there = b < n_bra
    N_BRA: tl.constexpr = len(SUMS)
    N_KET: tl.constexpr = len(SUMS[0])
    N_PROD: tl.constexpr = len(TERMS)
    molecule = tl.program_id(2).to(tl.int64)
    bra, ket = bra + molecule * 4 * n_bra, ket + molecule * 4 * n_ket
    expansion += molecule * N_PROD * N_KET * n_ket
    dm, root = dm + molecule * n_dm * n_dm, root + molecule * n_dm * n_dm
    out += molecule * n_bra * N_BRA * N_ROW
    site = place_of(bra, b, n_bra)
    product = bra_ao + (tl.load(bra_pair + b, mask=there, other=0) * N_ROW + r) * 2
    m, n = tl.load(product), tl.load(product + 1)
    zero = tl.zeros((BRAS, ROWS, BLOCK), tl.float64)
    total = ()
    for _ in tl.static_range(N_BRA):
        total = total + (zero,)
    for k0 in range(0, n_ket, BLOCK):
        k = k0 + tl.arange(0, BLOCK)[None, None, :]
        live = k < n_ket
        hermite = coulomb(site, place_of(ket, k, n_ket), table, ORDER, N, STEPS, BOYS)
        pair = tl.load(ket_pair + k, mask=live, other=0)
        gamma = _gamma(pair, m, n, ket_ao, dm, root, n_dm, N_PROD, EXCHANGE)
        weights = _weights(gamma, expansion + k, live, zero, n_ket, N_KET, TERMS)
        raised = ()
        for h in tl.static_range(N_BRA):
            value = total[h]
            for j in tl.static_range(N_KET):
                value += weights[j] * hermite[SUMS[h][j]]
            raised = raised + (value,)
        total = raised
    for h in tl.static_range(N_BRA):
        where = out + (b * N_BRA + h) * N_ROW + r
        value = tl.load(where, mask=there) + tl.sum(total[h], axis=2, keep_dims=True)
        tl.store(where, value, mask=there)


def compiled_in(bra: int, ket: int, exchange: bool) -> dict[str, Any]:
    """The kernel's constants for Hermite orders of bra, its own one more, and ket."""
    n_row = len(terms(bra - 1)) if exchange else 1
    return constants(bra, ket, n_row, ROWS) | {"EXCHANGE": exchange}


def two_electron_gradient(
    basis: Basis, positions: Tensor, dm: Tensor, hyb: float, max_memory: int
) -> Tensor:
    """(..., n_atom, 3) gradient at constant density matrix, Ha/bohr; see `integrals`."""

    def potentials(tables, padded):
        parts = kept(tuple(bounds(t) for t in tables), cut_of_energy(CUT, dm))
        for bra, part in zip(tables, parts, strict=True):
            potential = _of_all_kets(bra, part, tables, parts, padded, hyb)
            if hyb:
                potential = potential * bra.kind.weight[bra.kind.pair[part], None, None]
            yield part, potential

    return gradient_of(basis, positions, dm, hyb, potentials)


def _of_all_kets(bra, part, tables, parts, dm, hyb) -> Tensor:
    """Y (..., n, n_hermite(order + 1), n_prod) of the part of a class, without its weight."""
    order, many, n_dm = bra.kind.order + 1, dm.shape[:-2], dm.shape[-1]
    n_row = bra.kind.ao.shape[1] if hyb else 1
    out: Tensor = dm.new_zeros((*many, len(part), n_hermite(order), n_row))
    table = boys.table().to(dm.device)
    root = math.sqrt(hyb) / 2 * dm
    site, bra_pair, bra_ao = places(bra, part), bra.kind.pair[part], bra.kind.ao % n_dm
    for ket, other in zip(tables, parts, strict=True):
        pair = ket.kind.pair[other]
        factor = 2 * math.pi**2.5 * ket.kind.weight[pair, None] * parity(ket.kind.order, dm)
        expansion = ket.expansion[..., other, :, :] * factor[:, :, None]
        fixed = compiled_in(order, ket.kind.order, bool(hyb))
        grid = (-(-len(part) // fixed["BRAS"]), n_row // fixed["ROWS"], math.prod(many))
        with on_device(out):
            _potential[grid](
                site, bra_pair, bra_ao, places(ket, other), pair, ket.kind.ao % n_dm,
                expansion.transpose(-1, -3).contiguous(), dm, root, table, out,
                len(part), len(other), n_dm, **fixed, **OPTIONS,
            )  # fmt: skip
    return out
