"""What Triton kernels of a fused layer do with each pair by itself; kernels: `triton_layer`.

r_p = x[j] + translation(p) - x[i]        1/r        G_nu = 2^-(scale / r - offset)^2
t_c = 1;  r_hat;  traceless r_hat r_hat and r_hat r_hat r_hat, see `md_plugin.model.radial`
g_p = dE/dr r_hat + (dE/dr_hat - (dE/dr_hat . r_hat) r_hat) / r

A Gaussian is felt where |scale / r - offset| < WINDOW; beyond, it is below rounding.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def vectors(x, sender, translation, translations, i, p, last, end):
    """j, whether the pair is felt, r_ij, r and 1/r: float64 differences, then rounded."""
    live = p < last
    j = tl.load(sender + p, mask=live, other=0).to(tl.int64)
    dx = tl.load(x + j * 3) - tl.load(x + i * 3)
    dy = tl.load(x + j * 3 + 1) - tl.load(x + i * 3 + 1)
    dz = tl.load(x + j * 3 + 2) - tl.load(x + i * 3 + 2)
    if translation is not None:  # the sender's image
        shift = translations + tl.load(translation + p, mask=live, other=0).to(tl.int32) * 3
        dx, dy, dz = dx + tl.load(shift), dy + tl.load(shift + 1), dz + tl.load(shift + 2)
    dx, dy, dz = dx.to(end.dtype), dy.to(end.dtype), dz.to(end.dtype)
    r2 = dx * dx + dy * dy + dz * dz
    felt = live & ((r2 >= end * end) == 0)
    r2 = tl.where(felt, r2, end * end)
    dx, dy, dz = tl.where(felt, dx, 0.0), tl.where(felt, dy, 0.0), tl.where(felt, dz, 0.0)
    q = tl.rsqrt(r2)
    q += 0.5 * q * (1.0 - r2 * q * q)  # the instruction is right to 22 bits
    return j, felt, (dx, dy, dz), r2 * q, q


@triton.jit
def handed_out(numbers):
    """The same numbers, of each pair, computed once and then given to whoever needs them.

    Without a gather Triton would take all that leads to a tile of a product, from the loads on,
    into the layout of that product, in which many lanes have the same pair.
    """
    handed = ()
    for k in tl.static_range(len(numbers)):
        index = tl.arange(0, numbers[k].shape[0])
        handed = handed + (tl.gather(numbers[k], index, axis=0),)
    return handed


@triton.jit
def gaussians(table, q, nu, n_nu):
    """G (nu, pairs), and how its logarithm changes with r, times r^2."""
    scale = tl.load(table + nu, mask=nu < n_nu, other=0.0)[:, None]
    offset = tl.load(table + n_nu + nu, mask=nu < n_nu, other=1e3)[:, None]  # G = 0 beyond n_nu
    y = q[None, :] * scale - offset
    return tl.exp2(-y * y), y * scale * 1.3862943611198906


@triton.jit
def span(q, near):
    """Smallest and largest 1/r of the near pairs of a tile; all there are where one is NaN."""
    low = tl.where(near, tl.where(q == q, q, 0.0), float("inf"))
    high = tl.where(near, tl.where(q == q, q, float("inf")), 0.0)
    return tl.min(low, axis=0), tl.max(high, axis=0)


@triton.jit
def reached(table, nu, n_nu, low, high, WINDOW: tl.constexpr):
    """Whether a pair with 1/r between low and high can feel any of the Gaussians."""
    scale = tl.load(table + nu, mask=nu < n_nu, other=0.0)
    offset = tl.load(table + n_nu + nu, mask=nu < n_nu, other=1e3)
    first, last = low * scale - offset, high * scale - offset
    felt = (tl.minimum(first, last) < WINDOW) & (tl.maximum(first, last) > -WINDOW)
    return (low <= high) & (tl.max(felt.to(tl.int32), axis=0) > 0)


@triton.jit
def _chosen(total, c, FIRST: tl.constexpr, values):
    """Row c of what `values` are from row FIRST on, else `total`."""
    for k in tl.static_range(len(values)):
        total = tl.where(c == FIRST + k, values[k], total)
    return total


@triton.jit
def components(c, unit, N_COMP: tl.constexpr):
    """t_c (c, pairs) of unit vectors."""
    index, x, y, z = c[:, None], unit[0][None, :], unit[1][None, :], unit[2][None, :]
    t = _chosen(tl.zeros((c.shape[0], x.shape[1]), x.dtype) + 1.0, index, 1, (x, y, z))
    if N_COMP > 4:
        third: tl.constexpr = 0.3333333333333333
        t = _chosen(t, index, 4, (x * x - third, x * y, x * z, y * y - third, y * z))
    if N_COMP > 9:
        xx, yy = x * x - 0.2, y * y - 0.2
        most = (x * (xx - 0.4), xx * y, xx * z, x * yy, x * y * z, y * (yy - 0.4), yy * z)
        t = _chosen(t, index, 9, most)
    return t


@triton.jit
def component_slopes(c, unit, N_COMP: tl.constexpr):
    """dt_c / dx, dy and dz (c, pairs), as if x, y and z were free."""
    index, x, y, z = c[:, None], unit[0][None, :], unit[1][None, :], unit[2][None, :]
    none = tl.zeros((c.shape[0], x.shape[1]), x.dtype)
    dx = _chosen(none, index, 1, (1.0,))
    dy = _chosen(none, index, 2, (1.0,))
    dz = _chosen(none, index, 3, (1.0,))
    if N_COMP > 4:
        dx = _chosen(dx, index, 4, (2.0 * x, y, z))
        dy = _chosen(dy, index, 5, (x, 0.0, 2.0 * y, z))
        dz = _chosen(dz, index, 6, (x, 0.0, y))
    if N_COMP > 9:
        xx, yy, xy = x * x - 0.2, y * y - 0.2, x * y
        dx = _chosen(dx, index, 9, (3.0 * xx, 2.0 * xy, 2.0 * x * z, yy, y * z))
        dy = _chosen(dy, index, 10, (xx, 0.0, 2.0 * xy, x * z, 3.0 * yy, 2.0 * y * z))
        dz = _chosen(dz, index, 11, (xx, 0.0, xy, 0.0, yy))
    return dx, dy, dz


@triton.jit
def pair_force(along, free, unit, q):
    """g_p from dE/dr and dE/dr_hat, as if the components of r_hat were free."""
    across = (free[0] * q, free[1] * q, free[2] * q)
    along -= dot_product(across, unit)
    return along * unit[0] + across[0], along * unit[1] + across[1], along * unit[2] + across[2]


@triton.jit
def added(a, b):
    """Term by term."""
    total = ()
    for k in tl.static_range(len(a)):
        total = total + (a[k] + b[k],)
    return total


@triton.jit
def summed(tiles):
    """Each over its rows."""
    sums = ()
    for k in tl.static_range(len(tiles)):
        sums = sums + (tl.sum(tiles[k], axis=0),)
    return sums


@triton.jit
def dot_product(a, b):
    """Of two tuples."""
    total = a[0] * b[0]
    for k in tl.static_range(1, len(a)):
        total += a[k] * b[k]
    return total


@triton.jit
def add_products(virial, d, g):
    """r_p (x) g_p, row by row."""
    return (
        added(virial[0], (d[0] * g[0], d[0] * g[1], d[0] * g[2])),
        added(virial[1], (d[1] * g[0], d[1] * g[1], d[1] * g[2])),
        added(virial[2], (d[2] * g[0], d[2] * g[1], d[2] * g[2])),
    )


@triton.jit
def add_to_senders(forces, sent, j, felt, d, g):
    """-g_p to forces and, unless None, -r (x) g / 2 to virials of atoms, by atomics."""
    for k in tl.static_range(3):
        tl.atomic_add(forces + j * 3 + k, -g[k].to(tl.float64), mask=felt, sem="relaxed")
    if sent is not None:
        for k in tl.static_range(9):
            half = d[k // 3].to(tl.float64) * g[k % 3].to(tl.float64) * -0.5
            tl.atomic_add(sent + j * 9 + k, half, mask=felt, sem="relaxed")


@triton.jit
def add_force(forces, i, force, ALONE: tl.constexpr):
    """Of one receiver; others add to it meanwhile unless this program is ALONE with it."""
    for k in tl.static_range(3):
        mine = tl.sum(force[k], axis=0).to(tl.float64)
        if ALONE:
            tl.store(forces + i * 3 + k, tl.load(forces + i * 3 + k) + mine)
        else:
            tl.atomic_add(forces + i * 3 + k, mine, sem="relaxed")


@triton.jit
def add_sums(sums, i, virial, least):
    """The 9 of the virial and the least distance, in a row that nobody else writes."""
    for k in tl.static_range(9):
        place = sums + i * 10 + k
        tl.store(place, tl.load(place) - tl.sum(virial[k // 3][k % 3], axis=0).to(tl.float64))
    place = sums + i * 10 + 9
    tl.store(place, tl.minimum(tl.load(place), tl.min(least, axis=0).to(tl.float64)))
