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
and all nu of a block.

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
def _features(z, species, n_send, j, felt, f, like, N_PART: tl.constexpr, N_FEAT: tl.constexpr):
    """(pairs, features) of senders, in parts; one-hot where z is None."""
    if z is None:
        kind = tl.load(species + j)
        return (((kind[:, None] == f[None, :]) & felt[:, None]).to(like.dtype.element_ty),)
    else:
        live, size = felt[:, None] & (f < N_FEAT)[None, :], n_send.to(tl.int64) * N_FEAT
        return loaded(z, size, j[:, None] * N_FEAT + f[None, :], live, N_PART)


@triton.jit
def _places(c, nu, f, N_COMP: tl.constexpr, N_NU: tl.constexpr, N_FEAT: tl.constexpr):
    """Where (c nu, features) are in env of a receiver, and which are there."""
    row = c[:, None] * N_NU + nu[None, :]
    real = (c < N_COMP)[:, None] & (nu < N_NU)[None, :]
    n: tl.constexpr = c.shape[0] * nu.shape[0]
    row, real = tl.reshape(row, (n,)), tl.reshape(real, (n,))
    return row[:, None] * N_FEAT + f[None, :], real[:, None] & (f < N_FEAT)[None, :]


@triton.jit
def _sensed(t, s):
    """t_c s_nu (c nu, pairs)."""
    n: tl.constexpr = t.shape[0] * s.shape[0]
    return tl.reshape(t[:, None, :] * s[None, :, :], (n, s.shape[1]))


@triton.jit(do_not_specialize=["begin", "n_send"])
def forward_kernel(
    x, row_ptr, sender, translation, translations, species, z, table, limits, env,
    begin, n_send,
    TERMS: tl.constexpr, WINDOW: tl.constexpr, N_PART: tl.constexpr, N_COMP: tl.constexpr,
    N_NU: tl.constexpr, N_FEAT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Writes GROUP components, BLOCK_NU sensitivities and BLOCK_F features of one receiver."""
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
        if reached(table, nu, N_NU, low, high, WINDOW):
            cut, _, _ = cosine_cutoff(r, rcut, end, TERMS)
            near, q, cut, ux, uy, uz = handed_out(
                (felt.to(tl.int32), q, cut, d[0] * q, d[1] * q, d[2] * q)
            )
            sensed = gaussians(table, q, nu, N_NU)[0] * cut[None, :]
            if N_COMP > 1:
                sensed = _sensed(components(c, (ux, uy, uz), N_COMP), sensed)
            sent = _features(z, species, n_send, j, near != 0, f, env, N_PART, N_FEAT)
            total = dot(split(sensed, env, N_PART), sent, total)
    place, real = _places(c, nu, f, N_COMP, N_NU, N_FEAT)
    parts, mine = split(total, env, N_PART), env + row * (N_COMP * N_NU * N_FEAT)
    size = tl.num_programs(0).to(tl.int64) * (N_COMP * N_NU * N_FEAT)
    for k in tl.static_range(N_PART):
        tl.store(mine + size * k + place, parts[k], mask=real)


@triton.jit
def _one_hot(
    ge, size, kind, felt, c, nu, like,
    N_PART: tl.constexpr, N_COMP: tl.constexpr, N_NU: tl.constexpr, N_FEAT: tl.constexpr,
):  # fmt: skip
    """G (c, nu, pairs), which one-hot features only read."""
    real = (c < N_COMP)[:, None, None] & (nu < N_NU)[None, :, None]
    live = real & (felt & (kind >= 0) & (kind < N_FEAT))[None, None, :]
    place = (c[:, None] * N_NU + nu[None, :])[:, :, None] * N_FEAT + kind[None, None, :]
    parts = loaded(ge, size, place, live, N_PART)
    g = parts[0].to(like.dtype)
    for k in tl.static_range(1, N_PART):
        g += parts[k].to(like.dtype)
    return g


@triton.jit
def _products(
    ge, size, c, nu, f, sent, t, s, message, N_PART: tl.constexpr, N_COMP: tl.constexpr,
    N_NU: tl.constexpr, N_FEAT: tl.constexpr, OWN_ROW: tl.constexpr,
):  # fmt: skip
    """G (c, nu, pairs) of a block of features, and the message with what these rows give."""
    place, real = _places(c, nu, f, N_COMP, N_NU, N_FEAT)
    of_env = loaded(ge, size, place, real, N_PART)
    n_comp: tl.constexpr = t.shape[0]
    n_block: tl.constexpr = s.shape[0]
    n_pair: tl.constexpr = s.shape[1]
    g = dot(of_env, turned(sent), tl.zeros((n_comp * n_block, n_pair), dtype=s.dtype))
    if not OWN_ROW:
        message = dot(turned(split(_sensed(t, s), ge, N_PART)), of_env, message)
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
def _send(messages, message, j, near, f, weight, N_FEAT: tl.constexpr):
    live = near[:, None] & (f < N_FEAT)[None, :]
    target = messages + j[:, None] * N_FEAT + f[None, :]
    tl.atomic_add(target, message * weight, mask=live, sem="relaxed")


@triton.jit
def _added_block(
    of, message, sent, table, ge, size, nu, f, low, high, q, cut, cut_slope, near, unit,
    WINDOW: tl.constexpr, N_PART: tl.constexpr, N_COMP: tl.constexpr, N_NU: tl.constexpr,
    N_FEAT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ONE_HOT: tl.constexpr,
    OWN_ROW: tl.constexpr,
):  # fmt: skip
    """Slopes and message with what a block of sensitivities gives, if a pair feels any of them."""
    if reached(table, nu, N_NU, low, high, WINDOW):
        s, decay = gaussians(table, q, nu, N_NU)
        slope = s * (cut_slope[None, :] + (cut * q * q)[None, :] * decay)
        s *= cut[None, :]
        for group in range(GROUPS):
            c = group * GROUP + tl.arange(0, GROUP)
            t = components(c, unit, N_COMP)
            if ONE_HOT:
                g = _one_hot(ge, size, sent, near, c, nu, s, N_PART, N_COMP, N_NU, N_FEAT)
            else:
                g, message = _products(
                    ge, size, c, nu, f, sent, t, s, message, N_PART, N_COMP, N_NU, N_FEAT, OWN_ROW
                )
            of = _added_slopes(of, g, s, slope, t, c, unit, N_COMP)
    return of, message


@triton.jit
def _tile_slopes(
    species, z, table, ge, size, messages, weight, j, near, low, high, q, cut, cut_slope, unit,
    n_send,
    WINDOW: tl.constexpr, N_PART: tl.constexpr, N_COMP: tl.constexpr, N_NU: tl.constexpr,
    N_FEAT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, NU_BLOCKS: tl.constexpr,
    REST: tl.constexpr, F_BLOCKS: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr,
    OWN_ROW: tl.constexpr,
):  # fmt: skip
    """dE/dr and dE/dr_hat of a tile of pairs, as terms to add up; sends its messages.

    Sensitivities come in NU_BLOCKS blocks of BLOCK_NU and one of REST.
    """
    one_hot: tl.constexpr = z is None
    of = (tl.zeros((GROUP, j.shape[0]), q.dtype),) * 4
    for block in range(1 if one_hot else F_BLOCKS):
        f = block * BLOCK_F + tl.arange(0, BLOCK_F)
        message = tl.zeros((j.shape[0], BLOCK_F), q.dtype)
        if one_hot:
            sent = tl.load(species + j)
        else:
            sent = _features(z, species, n_send, j, near, f, z, N_PART, N_FEAT)
        for part in range(NU_BLOCKS):
            nu = part * BLOCK_NU + tl.arange(0, BLOCK_NU)
            of, message = _added_block(
                of, message, sent, table, ge, size, nu, f, low, high, q, cut, cut_slope, near, unit,
                WINDOW, N_PART, N_COMP, N_NU, N_FEAT, GROUP, GROUPS, one_hot, OWN_ROW,
            )  # fmt: skip
        if REST > 0:
            nu = NU_BLOCKS * BLOCK_NU + tl.arange(0, REST)
            of, message = _added_block(
                of, message, sent, table, ge, size, nu, f, low, high, q, cut, cut_slope, near, unit,
                WINDOW, N_PART, N_COMP, N_NU, N_FEAT, GROUP, GROUPS, one_hot, OWN_ROW,
            )  # fmt: skip
        if not one_hot and not OWN_ROW:
            _send(messages, message, j, near, f, weight, N_FEAT)
    return of


@triton.jit(do_not_specialize=["begin", "n_send"])
def backward_kernel(
    x, row_ptr, sender, translation, translations, species, z, table, limits, ge, scale,
    forces, messages, sums, sent, begin, n_send,
    TERMS: tl.constexpr, WINDOW: tl.constexpr, N_PART: tl.constexpr, N_COMP: tl.constexpr,
    N_NU: tl.constexpr, N_FEAT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    NU_BLOCKS: tl.constexpr, REST: tl.constexpr, F_BLOCKS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_NU: tl.constexpr, BLOCK_F: tl.constexpr, OWN_ROW: tl.constexpr,
):  # fmt: skip
    """Adds to forces, messages, the row of sums of one receiver and, unless None, to sent."""
    rcut, end = tl.load(limits), tl.load(limits + 1)
    row = tl.program_id(0).to(tl.int64)
    i = begin + row
    last = tl.load(row_ptr + i + 1).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64) * (N_COMP * N_NU * N_FEAT)
    mine = ge + row * (N_COMP * N_NU * N_FEAT)
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
            species, z, table, mine, size, messages, of_message, j, near != 0, low, high,
            q, cut, cut_slope, (ux, uy, uz), n_send,
            WINDOW, N_PART, N_COMP, N_NU, N_FEAT, GROUP, GROUPS, NU_BLOCKS, REST, F_BLOCKS,
            BLOCK_NU, BLOCK_F, OWN_ROW,
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
