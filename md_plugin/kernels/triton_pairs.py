"""What Triton kernels of a fused layer do with each pair by itself; kernels: `triton_layer`.

r_p = x[j] + translation(p) - x[i]        1/r        G_nu = 2^-(scale / r - offset)^2
t_c = 1;  r_hat;  r_hat r_hat^T - 1/3     pair force from dE/dr and dE/dt_c
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def vectors(x, sender, translation, translations, i, p, last, END: tl.constexpr, table):
    """j, whether the pair is felt, r_ij, r and 1/r: float64 differences, then rounded."""
    real = table.dtype.element_ty
    live = p < last
    j = tl.load(sender + p, mask=live, other=0).to(tl.int64)
    dx = tl.load(x + j * 3) - tl.load(x + i * 3)
    dy = tl.load(x + j * 3 + 1) - tl.load(x + i * 3 + 1)
    dz = tl.load(x + j * 3 + 2) - tl.load(x + i * 3 + 2)
    if translation is not None:  # the sender's image
        shift = translations + tl.load(translation + p, mask=live, other=0).to(tl.int32) * 3
        dx, dy, dz = dx + tl.load(shift), dy + tl.load(shift + 1), dz + tl.load(shift + 2)
    dx, dy, dz = dx.to(real), dy.to(real), dz.to(real)
    r2 = dx * dx + dy * dy + dz * dz
    felt = live & ((r2 >= END * END) == 0)
    r2 = tl.where(felt, r2, END * END)
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
    """G (pairs, nu), and how its logarithm changes with r, times r^2."""
    scale = tl.load(table + nu, mask=nu < n_nu, other=0.0)[None, :]
    offset = tl.load(table + n_nu + nu, mask=nu < n_nu, other=1e3)[None, :]  # G = 0 beyond n_nu
    y = q[:, None] * scale - offset
    return tl.exp2(-y * y), y * scale * 1.3862943611198906


@triton.jit
def components(unit, N_COMP: tl.constexpr):
    """t_c of unit vectors."""
    x, y, z = unit
    vector = (x * 0.0 + 1.0, x, y, z)
    third: tl.constexpr = 0.3333333333333333
    if N_COMP == 1:
        return (vector[0],)
    elif N_COMP == 4:
        return vector
    else:
        return vector + (x * x - third, x * y, x * z, y * y - third, y * z)


@triton.jit
def _unit_gradient(g, unit, N_COMP: tl.constexpr):
    """dE/dr_hat, as if its components were free, from g_c = dE/dt_c."""
    x, y, z = unit
    if N_COMP == 4:
        return g[1], g[2], g[3]
    else:
        return (
            g[1] + 2.0 * x * g[4] + y * g[5] + z * g[6],
            g[2] + x * g[5] + 2.0 * y * g[7] + z * g[8],
            g[3] + x * g[6] + y * g[8],
        )


@triton.jit
def pair_force(found, unit, q, N_COMP: tl.constexpr):
    """g_p from dE/dt_c of all components, and dE/dr."""
    if N_COMP == 1:
        along, across = found[1], (0.0, 0.0, 0.0)
    else:
        free = _unit_gradient(found, unit, N_COMP)
        across = (free[0] * q, free[1] * q, free[2] * q)
        along = found[N_COMP] - dot_product(across, unit)
    return along * unit[0] + across[0], along * unit[1] + across[1], along * unit[2] + across[2]


@triton.jit
def added(a, b):
    """Term by term."""
    total = ()
    for k in tl.static_range(len(a)):
        total = total + (a[k] + b[k],)
    return total


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
def add_row(forces, sums, i, force, virial, least):
    """Of one receiver, whose row of sums nobody else writes: 9 of the virial, the least distance.

    Others add to its force meanwhile.
    """
    for k in tl.static_range(3):
        mine = tl.sum(force[k], axis=0).to(tl.float64)
        tl.atomic_add(forces + i * 3 + k, mine, sem="relaxed")
    for k in tl.static_range(9):
        place = sums + i * 10 + k
        tl.store(place, tl.load(place) - tl.sum(virial[k // 3][k % 3], axis=0).to(tl.float64))
    place = sums + i * 10 + 9
    tl.store(place, tl.minimum(tl.load(place), tl.min(least, axis=0).to(tl.float64)))
