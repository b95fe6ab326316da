"""The gradient of the two-electron energy on CUDA with Triton, in double precision.

The tile of a program is (primitive pairs of the bra, products of its functions, primitive pairs of
the kets): the kets stream by in blocks. Per thread, in registers:

    F_m  by a Taylor step from the table     R_{h+h'}  by recursion     (`numba_kernels`, `hermite`)
    G_h' = sum_kl Gamma_mnkl (-1)^h' E_h'^kl,        Gamma from the density matrix, on the fly
    Y_h += sum_h' G_h' theta R_{h+h'}

Kets are summed at the end: no atomics, so two runs agree to the last bit. Hermite orders, index
tables and the recursion are compile-time constants, and everything is unrolled: the first use of an
installation compiles for about a minute. Where Gamma is a product, without exchange, one row serves
all products of a bra.

If TRITON_INTERPRET=1 is in the environment when this module is imported, Triton interprets the
kernel instead, on CPU tensors: slow, for tests. Electron repulsion integrals are torch's.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, misc"
from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from md_plugin.nanodft import boys
from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.hermite import n_hermite, steps, sums
from md_plugin.nanodft.shell_pairs import HermitePairs
from md_plugin.nanodft.two_electron_parts import (
    bounds,
    cut_of_energy,
    gradient_of,
    kept,
    parity,
    terms,
)
from md_plugin.nanodft.two_electron_torch import eri

__all__ = ["eri", "two_electron_gradient"]

CUT = 1e-12  # of the energy, per quartet of primitives; see `two_electron_parts`
# On a GPU two products share the 56 values of R, and their 2 x 20 sums fit the registers beside it.
TILE = {"BRAS": 1, "ROWS": 2, "BLOCK": 64}
_OPTIONS = {"num_warps": 2, "enable_fp_fusion": True}


@triton.jit
def _boys(
    t, table, ORDER: tl.constexpr, STEP: tl.constexpr, LAST: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """F_0 .. F_ORDER."""
    i = tl.minimum(t / STEP + 0.5, LAST).to(tl.int32)
    d = i.to(tl.float64) * STEP - t
    row = table + i * COLUMNS
    taylor = tl.load(row + ORDER + 6)
    decay = d / 6 + 1.0
    for n in tl.static_range(5, -1, -1):
        taylor = tl.load(row + ORDER + n) + d / (n + 1) * taylor
        if n > 0:
            decay = d / n * decay + 1.0
    far = t > LAST * STEP
    inverse = 0.5 / tl.maximum(t, 1.0)
    limit = tl.sqrt(inverse * 1.5707963267948966)
    for m in tl.static_range(ORDER):
        limit = limit * inverse * (2 * m + 1)
    value = tl.where(far, limit, taylor)
    decay = tl.where(far, 0.0, tl.load(row + COLUMNS - 1) * decay)
    values = (value,)
    for n in tl.static_range(ORDER):
        value = (2.0 * t * value + decay) / (2 * (ORDER - n) - 1)
        values = (value,) + values
    return values


@triton.jit
def _raised(level, base, distance, N: tl.constexpr, STEPS: tl.constexpr):
    """R^m_0 .. R^m_{N - 1} from R^{m+1} and R^m_0."""
    raised = (base,)
    for s in tl.static_range(N - 1):
        term = distance[STEPS[s][1]] * level[STEPS[s][2]]
        if STEPS[s][4] > 0:
            term += level[STEPS[s][3]] * STEPS[s][4]
        raised = raised + (term,)
    return raised


@triton.jit
def _place(places, i, n):
    """Exponent and centre of primitive pairs i, from (4, n); something finite beyond n."""
    place = (tl.load(places + i, mask=i < n, other=1.0),)
    for d in tl.static_range(1, 4):
        place = place + (tl.load(places + d * n + i, mask=i < n, other=0.0),)
    return place


@triton.jit
def _coulomb(
    bra, ket, table, ORDER: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, BOYS: tl.constexpr
):
    """R_0 .. R_{N[ORDER] - 1} / (p q sqrt(p + q)): theta without its constant.

    bra and ket: exponent and centre.
    """
    distance = (bra[1] - ket[1], bra[2] - ket[2], bra[3] - ket[3])
    square = distance[0] * distance[0] + distance[1] * distance[1] + distance[2] * distance[2]
    both = bra[0] + ket[0]
    alpha = bra[0] * ket[0] / both
    values = _boys(alpha * square, table, ORDER, BOYS[0], BOYS[1], BOYS[2])
    theta = 1.0 / (bra[0] * ket[0] * tl.sqrt(both))
    scaled = (values[0] * theta,)
    for m in tl.static_range(ORDER):
        theta = -2.0 * alpha * theta
        scaled = scaled + (values[m + 1] * theta,)
    hermite = (scaled[ORDER],)
    for m in tl.static_range(ORDER):
        hermite = _raised(hermite, scaled[ORDER - 1 - m], distance, N[m + 1], STEPS)
    return hermite


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
    expansion (n_prod, n_hermite, n_ket) with weight and sign; root: sqrt(hyb) / 2 dm.
    """
    b = (tl.program_id(0) * BRAS + tl.arange(0, BRAS))[:, None, None]
    r = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[None, :, None]
    there = b < n_bra
    N_BRA: tl.constexpr = len(SUMS)
    N_KET: tl.constexpr = len(SUMS[0])
    N_PROD: tl.constexpr = len(TERMS)
    site = _place(bra, b, n_bra)
    product = bra_ao + (tl.load(bra_pair + b, mask=there, other=0) * N_ROW + r) * 2
    m, n = tl.load(product), tl.load(product + 1)
    total = ()
    for _ in tl.static_range(N_BRA):
        total = total + (tl.zeros((BRAS, ROWS, BLOCK), tl.float64),)
    for k0 in range(0, n_ket, BLOCK):
        k = k0 + tl.arange(0, BLOCK)[None, None, :]
        live = k < n_ket
        hermite = _coulomb(site, _place(ket, k, n_ket), table, ORDER, N, STEPS, BOYS)
        pair = tl.load(ket_pair + k, mask=live, other=0)
        gamma = _gamma(pair, m, n, ket_ao, dm, root, n_dm, N_PROD, EXCHANGE)
        weights = ()
        for h in tl.static_range(N_KET):
            weight = tl.zeros((BRAS, ROWS, BLOCK), tl.float64)
            for c in tl.static_range(N_PROD):
                if TERMS[c][h]:
                    e = expansion + (c * N_KET + h) * n_ket + k
                    weight += gamma[c] * tl.load(e, mask=live, other=0.0)
            weights = weights + (weight,)
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


INTERPRETED = not isinstance(_potential, triton.JITFunction)
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def constants(bra: int, ket: int, exchange: bool) -> dict[str, Any]:
    """What is compiled in for Hermite orders of bra and ket; see `hermite` for the tables."""
    n_row = len(terms(bra - 1)) if exchange else 1
    # an interpreted program costs the same whatever its tile
    tile = {"BRAS": 16, "ROWS": n_row, "BLOCK": 64} if INTERPRETED else TILE
    return {
        "ORDER": bra + ket,
        "N": tuple(n_hermite(n) for n in range(bra + ket + 1)),
        "STEPS": steps(bra + ket),
        "SUMS": tuple(tuple(row) for row in sums(bra, ket).tolist()),
        "TERMS": tuple(tuple(h in t for h in range(n_hermite(ket))) for t in terms(ket)),
        "BOYS": (boys.TABLE_STEP, round(boys.TABLE_END / boys.TABLE_STEP), boys.TABLE_ORDERS + 1),
        "N_ROW": n_row,
        "EXCHANGE": exchange,
        **tile,
        "ROWS": min(n_row, tile["ROWS"]),
    }


def two_electron_gradient(
    basis: Basis, positions: Tensor, dm: Tensor, hyb: float, max_memory: int
) -> Tensor:
    """(n_atom, 3) gradient at constant density matrix, Ha/bohr; see `integrals`."""

    def potentials(tables, padded):
        parts = kept(tuple(bounds(t) for t in tables), cut_of_energy(CUT, dm))
        for bra, part in zip(tables, parts, strict=True):
            potential = _of_all_kets(bra, part, tables, parts, padded, hyb)
            if hyb:
                potential = potential * bra.kind.weight[bra.kind.pair[part], None, None]
            yield part, potential

    return gradient_of(basis, positions, dm, hyb, potentials)


def _of_all_kets(bra, part, tables, parts, dm, hyb) -> Tensor:
    """Y (n, n_hermite(order + 1), n_prod) of the part of a class, without the bra's weight."""
    order = bra.kind.order + 1
    n_row = bra.kind.ao.shape[1] if hyb else 1
    out: Tensor = dm.new_zeros((len(part), n_hermite(order), n_row))
    table = boys.table().to(dm.device)
    root = math.sqrt(hyb) / 2 * dm
    site, bra_pair, bra_ao = _places(bra, part), bra.kind.pair[part], bra.kind.ao % len(dm)
    for ket, other in zip(tables, parts, strict=True):
        pair = ket.kind.pair[other]
        sign = 2 * math.pi**2.5 * parity(ket.kind.order, dm)
        expansion = ket.expansion[other] * sign[:, None] * ket.kind.weight[pair, None, None]
        fixed = constants(order, ket.kind.order, bool(hyb))
        with _on_device(out):
            _potential[(-(-len(part) // fixed["BRAS"]), n_row // fixed["ROWS"])](
                site, bra_pair, bra_ao, _places(ket, other), pair, ket.kind.ao % len(dm),
                expansion.permute(2, 1, 0).contiguous(), dm, root, table, out,
                len(part), len(other), len(dm), **fixed, **_OPTIONS,
            )  # fmt: skip
    return out


def _places(table: HermitePairs, part: Tensor) -> Tensor:
    """(4, n) exponents and centres."""
    return torch.column_stack((table.exponent, table.centre))[part].T.contiguous()


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
