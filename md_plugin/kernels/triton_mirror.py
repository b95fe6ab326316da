"""What backward passes of other receivers give to a sender, found from the sender's own row.

Where every sender is a receiver and a list has both pairs of each two atoms, the pair back from j
to i is the pair p of row i turned round: r' = -r_p, with the same distance. With g = dE/dm of all
receivers and Q[i, nu, b] = sum_a z[i, a] V[nu, a, b],

    u[p, b]      = sum_c t_c(-r_hat_p) g[j, c, b]
    h[i, nu, b]  = sum_p s_nu(r_p) u[p, b]                      dE/dz[i, a] = sum V[nu, a, b] h[i]
    dE/dr'       = sum_b u[p, b] sum_nu s'_nu Q[i, nu, b]
    dE/dr_hat'   = sum_c dt_c/dr_hat(-r_hat_p) sum_b g[j, c, b] sum_nu s_nu Q[i, nu, b]
    F[i]        -= g_p', made of the two as in `triton_layer`

Nothing is added by atomics: every atom is written by one program, in the order of its row, and two
runs agree to the last bit.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from md_plugin.kernels.triton_pairs import (
    add_force,
    added,
    component_slopes,
    components,
    gaussians,
    handed_out,
    pair_force,
    summed,
    vectors,
)
from md_plugin.kernels.triton_parts import cosine_cutoff


@triton.jit
def _gradients(g, j, near, b, steep, flat, unit, n_hidden, N_COMP: tl.constexpr):
    """u (pairs, b); dE/dr' and dE/dr_hat' of these b.

    `steep` and `flat` are sums over nu of s' Q and s Q (pairs, b).
    """
    live = near[:, None] & (b < n_hidden)[None, :]
    u = tl.zeros_like(flat)
    of_x, of_y, of_z = tl.sum(u, axis=1), tl.sum(u, axis=1), tl.sum(u, axis=1)
    for c in range(N_COMP):
        place = (j * N_COMP + c)[:, None] * n_hidden + b[None, :]
        g_c = tl.load(g + place, mask=live, other=0.0)
        index = c + tl.arange(0, 1)
        u += g_c * tl.sum(components(index, unit, N_COMP), axis=0)[:, None]
        if N_COMP > 1:
            of_t = tl.sum(g_c * flat, axis=1)
            dx, dy, dz = summed(component_slopes(index, unit, N_COMP))
            of_x, of_y, of_z = of_x + of_t * dx, of_y + of_t * dy, of_z + of_t * dz
    return u, (tl.sum(u * steep, axis=1), of_x, of_y, of_z)


@triton.jit(do_not_specialize=["begin"])
def mirror_kernel(
    x, row_ptr, sender, translation, translations, table, limits, g, q_rows, h, forces,
    begin, n_nu, n_hidden,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, N_COMP: tl.constexpr, B_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_NU: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Writes h of one receiver unless it is None, and adds to its force.

    BLOCK_NU holds all sensitivities.
    """
    rcut, end = tl.load(limits), tl.load(limits + 1)
    row = tl.program_id(0).to(tl.int64)
    i = begin + row
    first, last = tl.load(row_ptr + i).to(tl.int64), tl.load(row_ptr + i + 1).to(tl.int64)
    real = table.dtype.element_ty
    zero = tl.zeros((BLOCK_P,), dtype=real)
    force = (zero, zero, zero)
    nu = tl.arange(0, BLOCK_NU)
    for block in range(B_BLOCKS):
        b = block * BLOCK_B + tl.arange(0, BLOCK_B)
        place = (row * n_nu + nu)[:, None] * n_hidden + b[None, :]
        there = (nu < n_nu)[:, None] & (b < n_hidden)[None, :]
        q_row = tl.load(q_rows + place, mask=there, other=0.0)
        total = tl.zeros((BLOCK_NU, BLOCK_B), dtype=real)
        for p0 in range(first, last, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            j, felt, d, r, q = vectors(x, sender, translation, translations, i, p, last, end)
            unit = (-d[0] * q, -d[1] * q, -d[2] * q)
            cut, cut_slope, _ = cosine_cutoff(r, rcut, end, TERMS)
            near, q_, cut, cut_slope, ux, uy, uz = handed_out(
                (felt.to(tl.int32), q, cut, cut_slope) + unit
            )
            s, decay = gaussians(table, q_, nu, n_nu)
            slope = s * (cut_slope[None, :] + (cut * q_ * q_)[None, :] * decay)
            s *= cut[None, :]
            none = tl.zeros((BLOCK_P, BLOCK_B), dtype=real)
            flat = tl.dot(tl.trans(s), q_row, none, input_precision=PRECISION, out_dtype=real)
            steep = tl.dot(tl.trans(slope), q_row, none, input_precision=PRECISION, out_dtype=real)
            u, of = _gradients(g, j, near != 0, b, steep, flat, (ux, uy, uz), n_hidden, N_COMP)
            if h is not None:
                total = tl.dot(s, u, total, input_precision=PRECISION, out_dtype=real)
            of_r, of_x, of_y, of_z = handed_out(of)
            force = added(force, pair_force(-of_r, (-of_x, -of_y, -of_z), unit, q))
        if h is not None:
            tl.store(h + place, total, mask=there)
    add_force(forces, i, force, True)
