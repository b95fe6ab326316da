"""The two kernels of a fused interaction layer, in Triton; `triton_fused` launches them.

    env[i, c, nu, a] = sum_p t_c(p) s_nu(r_p) z[j, a],    j = sender(p)                 (forward)

and from ge = dE/denv, with G_c[p, nu] = sum_a z[j, a] ge[i, c, nu, a]                 (backward)

    message    dE/dz[j, a] += sum_{c, nu} t_c s_nu ge[i, c, nu, a]
    dE/dr_p    = sum_{c, nu} t_c s'_nu G_c[p, nu]         dE/dt_c = sum_nu s_nu G_c[p, nu]
    pair force   g_p = dE/dr r_hat + (dE/dr_hat - (dE/dr_hat . r_hat) r_hat) / r
    F[i] += g_p        F[j] -= g_p        virial[i] -= r_p (x) g_p

A scalar layer has t = 1 only. In a first layer z is one-hot: env counts species, G_c is a row of
ge, and of a sender nothing is read but its species. Functions of the distance, t and G stay in
registers; sums over pairs and over features are products of tiles.

A program has one receiver and goes over its row in tiles of pairs, of which those beyond the end
are given the end as distance and no features: nothing of them is felt, and NaN shows. What goes to
senders is added by atomics, so the last bits of forces and messages change from run to run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from md_plugin.kernels.triton_pairs import (
    add_products,
    add_row,
    added,
    components,
    dot_product,
    gaussians,
    handed_out,
    pair_force,
    vectors,
)
from md_plugin.kernels.triton_parts import cosine_cutoff


@triton.jit
def _features(z, species, j, felt, f, n_feat, table):
    """(pairs, features) of senders; one-hot where z is None."""
    if z is None:
        kind = tl.load(species + j)
        return ((kind[:, None] == f[None, :]) & felt[:, None]).to(table.dtype.element_ty)
    else:
        live = felt[:, None] & (f < n_feat)[None, :]
        return tl.load(z + j[:, None] * n_feat + f[None, :], mask=live, other=0.0)


@triton.jit
def _rows(env, row, c, nu, f, n_nu, n_feat, N_COMP: tl.constexpr):
    """Places of (nu, features) of one component of a receiver of the block, and which are there."""
    place = (row * N_COMP + c) * n_nu + nu
    return env + place[:, None] * n_feat + f[None, :], (nu < n_nu)[:, None] & (f < n_feat)[None, :]


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, like):
    return (tl.zeros((ROWS, COLUMNS), dtype=like.dtype.element_ty),) * N


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _add_sensed(total, s, t, sent, N_COMP: tl.constexpr, PRECISION: tl.constexpr):
    """total_c + sum_p t_c s z."""
    added = ()
    for c in tl.static_range(N_COMP):
        added = added + (_dot(tl.trans(s * t[c][:, None]), sent, total[c], PRECISION),)
    return added


@triton.jit
def forward_kernel(
    x, row_ptr, sender, translation, translations, species, z, table, env, begin, n_nu, n_feat,
    RCUT: tl.constexpr, END: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    N_COMP: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_NU sensitivities and BLOCK_F features of all components of one receiver."""
    n_feat = n_feat // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    nu = tl.program_id(2) * BLOCK_NU + tl.arange(0, BLOCK_NU)
    i = begin + row
    last = tl.load(row_ptr + i + 1).to(tl.int64)
    total = _zeros(BLOCK_NU, BLOCK_F, N_COMP, env)
    for p0 in range(tl.load(row_ptr + i).to(tl.int64), last, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        j, felt, d, r, q = vectors(x, sender, translation, translations, i, p, last, END, table)
        cut = cosine_cutoff(r, RCUT, END, TERMS)[0]
        near, q, cut, ux, uy, uz = handed_out(
            (felt.to(tl.int32), q, cut, d[0] * q, d[1] * q, d[2] * q)
        )
        s = gaussians(table, q, nu, n_nu)[0] * cut[:, None]
        sent = _features(z, species, j, near != 0, f, n_feat, table)
        t = components((ux, uy, uz), N_COMP)
        total = _add_sensed(total, s, t, sent, N_COMP, PRECISION)
    for c in tl.static_range(N_COMP):
        place, real = _rows(env, row, c, nu, f, n_nu, n_feat, N_COMP)
        tl.store(place, total[c], mask=real)


@triton.jit
def _add_folded(
    found, ge, sent, row, nu, f, n_nu, n_feat, N_COMP: tl.constexpr, PRECISION: tl.constexpr
):
    """G_c + sum_a z ge."""
    added = ()
    for c in tl.static_range(N_COMP):
        place, real = _rows(ge, row, c, nu, f, n_nu, n_feat, N_COMP)
        rows = tl.load(place, mask=real, other=0.0)
        added = added + (_dot(sent, tl.trans(rows), found[c], PRECISION),)
    return added


@triton.jit
def _folded(
    z, species, ge, j, felt, row, nu, n_nu, n_feat, N_COMP: tl.constexpr, PRECISION: tl.constexpr,
    F_BLOCKS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """G_c (pairs, nu): features times ge, which one-hot features only read."""
    if z is None:
        kind = tl.load(species + j)[:, None]
        live = felt[:, None] & (nu < n_nu)[None, :] & (kind >= 0) & (kind < n_feat)
        found = ()
        for c in tl.static_range(N_COMP):
            place = ((row * N_COMP + c) * n_nu + nu)[None, :] * n_feat + kind
            found = found + (tl.load(ge + place, mask=live, other=0.0),)
        return found
    else:
        found = _zeros(j.shape[0], nu.shape[0], N_COMP, ge)
        for k in range(F_BLOCKS):
            f = k * BLOCK_F + tl.arange(0, BLOCK_F)
            sent = _features(z, species, j, felt, f, n_feat, ge)
            found = _add_folded(found, ge, sent, row, nu, f, n_nu, n_feat, N_COMP, PRECISION)
        return found


@triton.jit
def _send(
    ge, messages, table, j, felt, q, cut, t, row, n_nu, n_feat,
    N_COMP: tl.constexpr, PRECISION: tl.constexpr, NU_BLOCKS: tl.constexpr, F_BLOCKS: tl.constexpr,
    BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Adds sum_{c, nu} t_c s ge to the messages of the senders."""
    for k in range(F_BLOCKS):
        f = k * BLOCK_F + tl.arange(0, BLOCK_F)
        message = tl.zeros((j.shape[0], BLOCK_F), dtype=ge.dtype.element_ty)
        for block in tl.static_range(NU_BLOCKS):
            nu = block * BLOCK_NU + tl.arange(0, BLOCK_NU)
            s = gaussians(table, q, nu, n_nu)[0] * cut[:, None]
            for c in tl.static_range(N_COMP):
                place, real = _rows(ge, row, c, nu, f, n_nu, n_feat, N_COMP)
                rows = tl.load(place, mask=real, other=0.0)
                message = _dot(s * t[c][:, None], rows, message, PRECISION)
        live = felt[:, None] & (f < n_feat)[None, :]
        target = messages + j[:, None] * n_feat + f[None, :]
        tl.atomic_add(target, message, mask=live, sem="relaxed")


@triton.jit
def _row_sums(tiles, weight):
    sums = ()
    for k in tl.static_range(len(tiles)):
        sums = sums + (tl.sum(tiles[k] * weight, axis=1),)
    return sums


@triton.jit
def _send_virial(sent, j, felt, d, g_p):
    """Adds -r (x) g / 2 to the virials of the senders."""
    for a in tl.static_range(3):
        for b in tl.static_range(3):
            half = d[a].to(tl.float64) * g_p[b].to(tl.float64) * -0.5
            tl.atomic_add(sent + j * 9 + 3 * a + b, half, mask=felt, sem="relaxed")


@triton.jit
def backward_kernel(
    x, row_ptr, sender, translation, translations, species, z, table, ge, forces, messages, sums,
    sent, begin, n_nu, n_feat,
    RCUT: tl.constexpr, END: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    N_COMP: tl.constexpr, ALIGN: tl.constexpr, NU_BLOCKS: tl.constexpr, F_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Adds to forces, messages, the row of sums of one receiver and, unless None, to sent."""
    n_feat = n_feat // ALIGN * ALIGN
    row = tl.program_id(0).to(tl.int64)
    i = begin + row
    last = tl.load(row_ptr + i + 1).to(tl.int64)
    zero = tl.zeros((BLOCK_P,), dtype=table.dtype.element_ty)
    force, least = (zero, zero, zero), zero + float("inf")
    virial = (force, force, force)
    for p0 in range(tl.load(row_ptr + i).to(tl.int64), last, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        j, felt, d, r, q = vectors(x, sender, translation, translations, i, p, last, END, table)
        cut, cut_slope, _ = cosine_cutoff(r, RCUT, END, TERMS)
        unit = (d[0] * q, d[1] * q, d[2] * q)
        near, q_, cut, cut_slope, ux, uy, uz = handed_out(
            (felt.to(tl.int32), q, cut, cut_slope) + unit
        )
        t = components((ux, uy, uz), N_COMP)
        of_t, of_r = (zero,) * N_COMP, zero
        for block in tl.static_range(NU_BLOCKS):
            nu = block * BLOCK_NU + tl.arange(0, BLOCK_NU)
            g = _folded(
                z, species, ge, j, near != 0, row, nu, n_nu, n_feat,
                N_COMP, PRECISION, F_BLOCKS, BLOCK_F,
            )  # fmt: skip
            gaussian, decay = gaussians(table, q_, nu, n_nu)
            slope = gaussian * (cut_slope[:, None] + (cut * q_ * q_)[:, None] * decay)
            of_t = added(of_t, _row_sums(g, gaussian * cut[:, None]))
            of_r += dot_product(_row_sums(g, slope), t)
        if z is not None:
            _send(
                ge, messages, table, j, near != 0, q_, cut, t, row, n_nu, n_feat,
                N_COMP, PRECISION, NU_BLOCKS, F_BLOCKS, BLOCK_NU, BLOCK_F,
            )  # fmt: skip
        found = handed_out(of_t + (of_r,))
        g_p = pair_force(found, unit, q, N_COMP)
        for k in tl.static_range(3):
            tl.atomic_add(forces + j * 3 + k, -g_p[k].to(tl.float64), mask=felt, sem="relaxed")
        if sent is not None:
            _send_virial(sent, j, felt, d, g_p)
        force = added(force, g_p)
        virial = add_products(virial, d, g_p)
        least = tl.minimum(least, tl.where(felt, r, float("inf")))
    add_row(forces, sums, i, force, virial, least)
