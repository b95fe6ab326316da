"""The two kernels of a fused interaction layer, in Triton; `triton_fused` launches them.

    env[i, c, nu, a] = sum_p t_c(p) s_nu(r_p) z[j, a],    j = sender(p)                 (forward)

and from ge = dE/denv, with G[c, nu, p] = sum_a z[j, a] ge[i, c, nu, a]                (backward)

    message      dE/dz[j, a] += sum_{c, nu} t_c s_nu ge[i, c, nu, a]
    dE/dr_p      = sum_c t_c sum_nu s'_nu G[c, nu, p]
    dE/dr_hat_p  = sum_c dt_c/dr_hat sum_nu s_nu G[c, nu, p]
    F[i] += g_p        F[j] -= g_p        virial[i] -= r_p (x) g_p

A scalar layer has t = 1 only. In a first layer z is one-hot: env counts species, G is a row of ge,
and of a sender nothing is read but its species. Functions of the distance, t and G stay in
registers; sums over pairs and over features are products of tiles, whose rows are all c of a group
and all nu of a block: 64 and more are what Hopper's warp groups multiply at once.

A program has one receiver and goes over its row in tiles of pairs, of which those beyond the end
are given the end as distance and no features: nothing of them is felt, and NaN shows. Blocks of nu
that no pair of a tile feels are left out. What goes to senders is added by atomics, so the last
bits of forces and messages change from run to run; with OWN_ROW nothing goes there, and
`triton_mirror` finds the same from the senders' own rows.

Beside a float32 table, z, env and ge are halves: float16 arrays (2, ...) that add up to a number
of 22 bits, or (1, ...) of 11, and so are the operands of products, hi hi + hi lo + lo hi, which are
added in float32. `scale` has the powers of two that messages and forces are multiplied by.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from md_plugin.kernels.triton_pairs import (
    add_force,
    add_products,
    add_sums,
    add_to_senders,
    added,
    component_slopes,
    components,
    gaussians,
    handed_out,
    pair_force,
    reached,
    span,
    summed,
    vectors,
)
from md_plugin.kernels.triton_parts import cosine_cutoff, dot, loaded, split, turned


@triton.jit
def _features(z, species, n_send, j, felt, f, n_feat, like, N_PART: tl.constexpr):
    """(pairs, features) of senders, in parts; one-hot where z is None."""
    if z is None:
        kind = tl.load(species + j)
        return (((kind[:, None] == f[None, :]) & felt[:, None]).to(like.dtype.element_ty),)
    else:
        live, size = felt[:, None] & (f < n_feat)[None, :], n_send.to(tl.int64) * n_feat
        return loaded(z, size, j[:, None] * n_feat + f[None, :], live, N_PART)


@triton.jit
def _rows(row, c, nu, n_nu, N_COMP: tl.constexpr):
    """(c nu,) rows of a receiver of the block in env, and which are there."""
    place = (row * N_COMP + c)[:, None] * n_nu + nu[None, :]
    real = (c < N_COMP)[:, None] & (nu < n_nu)[None, :]
    n: tl.constexpr = c.shape[0] * nu.shape[0]
    return tl.reshape(place, (n,)), tl.reshape(real, (n,))


@triton.jit
def _env(rows, real, f, n_feat):
    """Places of rows (c nu, features), and which are there."""
    return rows[:, None] * n_feat + f[None, :], real[:, None] & (f < n_feat)[None, :]


@triton.jit
def _size(n_nu, n_feat, N_COMP: tl.constexpr):
    """Numbers in env of all receivers of the block."""
    return tl.num_programs(0).to(tl.int64) * N_COMP * n_nu * n_feat


@triton.jit
def _sensed(t, s):
    """t_c s_nu (c nu, pairs)."""
    n: tl.constexpr = t.shape[0] * s.shape[0]
    return tl.reshape(t[:, None, :] * s[None, :, :], (n, s.shape[1]))


@triton.jit(do_not_specialize=["begin", "n_send"])
def forward_kernel(
    x, row_ptr, sender, translation, translations, species, z, table, limits, env,
    begin, n_send, n_nu, n_feat,
    TERMS: tl.constexpr, WINDOW: tl.constexpr, N_PART: tl.constexpr, N_COMP: tl.constexpr,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Writes GROUP components, BLOCK_NU sensitivities and BLOCK_F features of one receiver."""
    n_feat = n_feat // ALIGN * ALIGN
    rcut, end = tl.load(limits), tl.load(limits + 1)
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    part = tl.program_id(2)
    c = part % GROUPS * GROUP + tl.arange(0, GROUP)
    nu = part // GROUPS * BLOCK_NU + tl.arange(0, BLOCK_NU)
    i = begin + row
    last = tl.load(row_ptr + i + 1).to(tl.int64)
    total = tl.zeros((GROUP * BLOCK_NU, BLOCK_F), dtype=table.dtype.element_ty)
    for p0 in range(tl.load(row_ptr + i).to(tl.int64), last, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        j, felt, d, r, q = vectors(x, sender, translation, translations, i, p, last, end)
        low, high = span(q, felt)
        if reached(table, nu, n_nu, low, high, WINDOW):
            cut, _, _ = cosine_cutoff(r, rcut, end, TERMS)
            near, q, cut, ux, uy, uz = handed_out(
                (felt.to(tl.int32), q, cut, d[0] * q, d[1] * q, d[2] * q)
            )
            sensed = gaussians(table, q, nu, n_nu)[0] * cut[None, :]
            if N_COMP > 1:
                sensed = _sensed(components(c, (ux, uy, uz), N_COMP), sensed)
            sent = _features(z, species, n_send, j, near != 0, f, n_feat, env, N_PART)
            total = dot(split(sensed, env, N_PART), sent, total)
    rows, real = _rows(row, c, nu, n_nu, N_COMP)
    place, real = _env(rows, real, f, n_feat)
    parts, size = split(total, env, N_PART), _size(n_nu, n_feat, N_COMP)
    for k in tl.static_range(N_PART):
        tl.store(env + size * k + place, parts[k], mask=real)


@triton.jit
def _one_hot(
    ge, species, j, felt, row, c, nu, n_nu, n_feat, like, N_PART: tl.constexpr, N_COMP: tl.constexpr
):
    """G (c, nu, pairs), which one-hot features only read."""
    kind = tl.load(species + j)[None, None, :]
    real = (c < N_COMP)[:, None, None] & (nu < n_nu)[None, :, None]
    live = real & felt[None, None, :] & (kind >= 0) & (kind < n_feat)
    place = ((row * N_COMP + c)[:, None] * n_nu + nu[None, :])[:, :, None] * n_feat + kind
    parts = loaded(ge, _size(n_nu, n_feat, N_COMP), place, live, N_PART)
    g = parts[0].to(like.dtype)
    for k in tl.static_range(1, N_PART):
        g += parts[k].to(like.dtype)
    return g


@triton.jit
def _products(
    ge, row, c, nu, n_nu, f, n_feat, sent, t, s, message, N_PART: tl.constexpr,
    N_COMP: tl.constexpr, OWN_ROW: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """G (c, nu, pairs) of a block of features, and the message with what these rows give."""
    rows, real = _rows(row, c, nu, n_nu, N_COMP)
    place, real = _env(rows, real, f, n_feat)
    of_env = loaded(ge, _size(n_nu, n_feat, N_COMP), place, real, N_PART)
    n_comp: tl.constexpr = t.shape[0]
    n_block: tl.constexpr = s.shape[0]
    n_pair: tl.constexpr = s.shape[1]
    g = dot(of_env, turned(sent), tl.zeros((n_comp * n_block, n_pair), dtype=s.dtype))
    if not OWN_ROW:
        sensed = split(_sensed(t, s), ge, N_PART)
        if TURNED:
            message = dot(turned(of_env), sensed, message)
        else:
            message = dot(turned(sensed), of_env, message)
    return tl.reshape(g, (n_comp, n_block, n_pair)), message


@triton.jit
def _added_slopes(of, g, s, slope, t, c, unit, N_COMP: tl.constexpr):
    """dE/dr and dE/dr_hat (pairs) with what G of some c and nu gives."""
    of_r, of_x, of_y, of_z = of
    of_r += t * tl.sum(g * slope[None, :, :], axis=1)
    if N_COMP > 1:
        of_t = tl.sum(g * s[None, :, :], axis=1)
        dx, dy, dz = component_slopes(c, unit, N_COMP)
        of_x += of_t * dx
        of_y += of_t * dy
        of_z += of_t * dz
    return of_r, of_x, of_y, of_z


@triton.jit
def _send(messages, message, j, near, f, n_feat, weight, TURNED: tl.constexpr):
    if TURNED:
        message = tl.trans(message)
    live = near[:, None] & (f < n_feat)[None, :]
    target = messages + j[:, None] * n_feat + f[None, :]
    tl.atomic_add(target, message * weight, mask=live, sem="relaxed")


@triton.jit
def _tile_slopes(
    species, z, table, ge, messages, weight, row, j, near, low, high, q, cut, cut_slope, unit,
    n_send, n_nu, n_feat,
    WINDOW: tl.constexpr, N_PART: tl.constexpr, N_COMP: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, NU_BLOCKS: tl.constexpr, F_BLOCKS: tl.constexpr, BLOCK_NU: tl.constexpr,
    BLOCK_F: tl.constexpr, OWN_ROW: tl.constexpr, TURNED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dE/dr and dE/dr_hat of a tile of pairs, as terms to add up; sends its messages."""
    n_pair: tl.constexpr = j.shape[0]
    of = (tl.zeros((GROUP, n_pair), q.dtype),) * 4
    blocks: tl.constexpr = 1 if z is None else F_BLOCKS
    for block in range(blocks):
        f = block * BLOCK_F + tl.arange(0, BLOCK_F)
        message = tl.zeros((BLOCK_F, n_pair) if TURNED else (n_pair, BLOCK_F), q.dtype)
        if z is not None:
            sent = _features(z, species, n_send, j, near, f, n_feat, z, N_PART)
        for part in range(NU_BLOCKS):
            nu = part * BLOCK_NU + tl.arange(0, BLOCK_NU)
            if reached(table, nu, n_nu, low, high, WINDOW):
                s, decay = gaussians(table, q, nu, n_nu)
                slope = s * (cut_slope[None, :] + (cut * q * q)[None, :] * decay)
                s *= cut[None, :]
                for group in tl.range(0, GROUPS, loop_unroll_factor=UNROLL):
                    c = group * GROUP + tl.arange(0, GROUP)
                    t = components(c, unit, N_COMP)
                    if z is None:
                        g = _one_hot(
                            ge, species, j, near, row, c, nu, n_nu, n_feat, s, N_PART, N_COMP
                        )
                    else:
                        g, message = _products(
                            ge, row, c, nu, n_nu, f, n_feat, sent, t, s, message,
                            N_PART, N_COMP, OWN_ROW, TURNED,
                        )  # fmt: skip
                    of = _added_slopes(of, g, s, slope, t, c, unit, N_COMP)
        if z is not None and not OWN_ROW:
            _send(messages, message, j, near, f, n_feat, weight, TURNED)
    return of


@triton.jit(do_not_specialize=["begin", "n_send"])
def backward_kernel(
    x, row_ptr, sender, translation, translations, species, z, table, limits, ge, scale,
    forces, messages, sums, sent, begin, n_send, n_nu, n_feat,
    TERMS: tl.constexpr, WINDOW: tl.constexpr, N_PART: tl.constexpr, N_COMP: tl.constexpr,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, NU_BLOCKS: tl.constexpr,
    F_BLOCKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
    OWN_ROW: tl.constexpr, TURNED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Adds to forces, messages, the row of sums of one receiver and, unless None, to sent.

    TURNED messages are (features, pairs) until they are sent. UNROLL: groups per turn of a loop.
    """
    n_feat = n_feat // ALIGN * ALIGN
    rcut, end = tl.load(limits), tl.load(limits + 1)
    row = tl.program_id(0).to(tl.int64)
    i = begin + row
    last = tl.load(row_ptr + i + 1).to(tl.int64)
    zero = tl.zeros((BLOCK_P,), dtype=table.dtype.element_ty)
    of_message, of_force = 1.0, 1.0
    if scale is not None:
        of_message = tl.load(scale + row)
        of_force = tl.load(scale + tl.num_programs(0) + row)
    force, least = (zero, zero, zero), zero + float("inf")
    virial = (force, force, force)
    for p0 in range(tl.load(row_ptr + i).to(tl.int64), last, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        j, felt, d, r, q = vectors(x, sender, translation, translations, i, p, last, end)
        low, high = span(q, felt)
        cut, cut_slope, _ = cosine_cutoff(r, rcut, end, TERMS)
        near, q, cut, cut_slope, ux, uy, uz = handed_out(
            (felt.to(tl.int32), q, cut, cut_slope, d[0] * q, d[1] * q, d[2] * q)
        )
        of = _tile_slopes(
            species, z, table, ge, messages, of_message, row, j, near != 0, low, high,
            q, cut, cut_slope, (ux, uy, uz), n_send, n_nu, n_feat,
            WINDOW, N_PART, N_COMP, GROUP, GROUPS, NU_BLOCKS, F_BLOCKS, BLOCK_NU, BLOCK_F,
            OWN_ROW, TURNED, UNROLL,
        )  # fmt: skip
        of_r, of_x, of_y, of_z = handed_out(summed(of))
        # Once more: less than keeping them in registers meanwhile.
        j, felt, d, r, q = vectors(x, sender, translation, translations, i, p, last, end)
        unit = (d[0] * q, d[1] * q, d[2] * q)
        g_p = pair_force(of_r * of_force, (of_x, of_y, of_z), unit, q * of_force)
        if not OWN_ROW:
            add_to_senders(forces, sent, j, felt, d, g_p)
        force = added(force, g_p)
        virial = add_products(virial, d, g_p)
        least = tl.minimum(least, tl.where(felt, r, float("inf")))
    add_force(forces, i, force, OWN_ROW)
    add_sums(sums, i, virial, least)
