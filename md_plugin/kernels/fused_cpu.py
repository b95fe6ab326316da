"""One interaction layer on the CPU, fused: from positions, and nothing per pair is ever stored.

    r_p      = x[sender(p)] + translation(p) - x[receiver(p)]  subtracted in float64, then rounded
    s_nu(r)  = exp(-(sigma_nu (1/r - 1/mu_nu))^2 / 2) cos^2(pi r / (2 rcut)),   0 from rcut on

    forward          env[i, nu, a]   = sum_p s_nu(r_p) z[sender(p), a]
    backward         forces, virial, dE/dz from dE/denv
    tensor_forward   mixed[i, c, a]  = sum_p t_c(p) sum_nu s_nu(r_p) q[sender(p), nu, a]
    tensor_backward  forces, virial, dE/dq from dE/dmixed

    F[i] += g_p        F[j] -= g_p        virial -= r_p (x) g_p        g_p = dE/dr_p

and, where they are asked for, virials of atoms: half of -r_p (x) g_p to i, half to j.

A receiver's row of pairs is the unit of work: its radial functions are computed on the way.
Receivers come in blocks, begin .. begin + n_block - 1, so that the tiles of a block stay in cache.

`fused_arrays` holds what is given and found; `fused_radial` makes the tables of sensitivities;
`fused_row` reads and sorts a row, `fused_tiles` computes its radial functions, `fused_scalar` and
`fused_tensor` sum, `fused_forces` ends a row; `fused_rows` and `fused_tensor_rows` are what numba
compiles. Several threads are `workers`; each scatters into a buffer of its own, so that sums are in
fixed order for a fixed number of buffers.
"""

from __future__ import annotations

import numpy as np

from md_plugin.kernels import fused_rows as rows
from md_plugin.kernels import fused_tensor_rows as tensor_rows
from md_plugin.kernels.fused_arrays import Geometry, Gradients, aligned_zeros, geometry
from md_plugin.kernels.fused_radial import RadialTable
from md_plugin.kernels.workers import share, span

__all__ = [
    "Geometry",
    "Gradients",
    "RadialTable",
    "aligned_zeros",
    "backward",
    "forward",
    "geometry",
    "tensor_backward",
    "tensor_forward",
]


def forward(
    where: Geometry,
    table: RadialTable,
    z: np.ndarray | None,
    env: np.ndarray,
    begin: int = 0,
    n_thread: int = 1,
) -> None:
    """Write env (n_block, n_nu, n_feat) of receivers begin .. begin + n_block - 1.

    z (n_send, n_feat) is None in a one-hot first layer: n_feat is then the number of species.

    Raises:
        TypeError: an array is not of the table's dtype.
        ValueError: an array is not C-contiguous, or too small.
    """
    _check(where, table, env, begin, (table.n_nu,))
    if z is None:
        _check_species(where)
    else:
        _check_senders(where, table, z, env.shape[2:])

    def work(t: int) -> None:
        part = _part(begin, len(env), t, n_thread)
        if z is None:
            rows.forward_species_range(table.arrays, tuple(where), env, begin, *part)
        else:
            rows.forward_range(table.arrays, tuple(where), z, env, begin, *part)

    share(work, n_thread)


def backward(
    where: Geometry,
    table: RadialTable,
    z: np.ndarray | None,
    ge: np.ndarray,
    gradients: Gradients,
    begin: int = 0,
) -> None:
    """Add what ge = dE/denv (n_block, n_nu, n_feat) of a block gives to forces, dE/dz, virial.

    Raises:
        TypeError: an array is not of the table's dtype.
        ValueError: an array is not C-contiguous, or too small.
    """
    ge = np.ascontiguousarray(ge)
    _check(where, table, ge, begin, (table.n_nu,))
    given, n_thread = (table.arrays, tuple(where)), len(gradients.forces)
    if z is None:
        _check_species(where)
    else:
        _check_senders(where, table, z, ge.shape[2:])
        _check_senders(where, table, gradients.messages[0], ge.shape[2:])

    def work(t: int) -> None:
        part, target = _part(begin, len(ge), t, n_thread), gradients.target(t)
        if z is None:
            rows.backward_species_range(*given, ge, target, begin, *part)
        else:
            rows.backward_range(*given, z, ge, gradients.messages[t], target, begin, *part)

    share(work, n_thread)


def tensor_forward(
    where: Geometry,
    table: RadialTable,
    q: np.ndarray,
    mixed: np.ndarray,
    begin: int = 0,
    n_thread: int = 1,
    *,
    by_species: bool = False,
) -> None:
    """Write mixed (n_block, 1 | 4 | 9 | 16, n_feat) of receivers begin .. begin + n_block - 1.

    Components are those of `model.radial.tensor_components`, and of the third order. q is
    (n_send, n_nu, n_feat), or by_species (n_species, n_nu, n_feat).

    Raises:
        TypeError: an array is not of the table's dtype.
        ValueError: an array is not C-contiguous, or has another shape.
    """
    comps = _check_tensor(where, table, q, mixed, begin, by_species)
    given = table.arrays, tuple(where), q, mixed, comps, int(by_species), begin

    def work(t: int) -> None:
        tensor_rows.tensor_forward_range(*given, *_part(begin, len(mixed), t, n_thread))

    share(work, n_thread)


def tensor_backward(
    where: Geometry,
    table: RadialTable,
    q: np.ndarray,
    g: np.ndarray,
    gradients: Gradients,
    begin: int = 0,
    *,
    by_species: bool = False,
) -> None:
    """Add what g = dE/dmixed of a block gives to forces, virial and, unless by_species, dE/dq.

    dE/dq goes to the messages, n_nu n_feat numbers per atom.

    Raises:
        TypeError: an array is not of the table's dtype.
        ValueError: an array is not C-contiguous, or has another shape.
    """
    g = np.ascontiguousarray(g)
    comps = _check_tensor(where, table, q, g, begin, by_species)
    given, messages = (table.arrays, tuple(where), q, g, comps), gradients.messages
    if not by_species:
        _check_senders(where, table, messages[0], (q.shape[1] * q.shape[2],))
    n_thread = len(gradients.forces)

    def work(t: int) -> None:
        part = _part(begin, len(g), t, n_thread)
        dq = () if by_species else (messages[t].reshape(q.shape),)
        tensor_rows.tensor_backward_range(*given, gradients.target(t), dq, begin, *part)

    share(work, n_thread)


def _part(begin: int, n_block: int, t: int, n_thread: int) -> tuple[int, int]:
    """First and last + 1 receiver of thread t."""
    part = span(n_block, t, n_thread)
    return begin + part.start, begin + part.stop


def _check_tensor(
    where: Geometry, table: RadialTable, q: np.ndarray, mixed: np.ndarray, begin: int, shared: bool
) -> tuple[bool, ...]:
    _check(where, table, mixed, begin, (1, 4, 9, 16))
    if shared:
        _check_species(where)
    _check_array(table, q)
    shape = (len(q) if shared else len(where.x), table.n_nu, mixed.shape[2])
    if q.shape != shape:
        raise ValueError(f"q has shape {q.shape}, not {shape}")
    n_comp: int = mixed.shape[1]
    return (True,) * n_comp


def _check(
    where: Geometry, table: RadialTable, mine: np.ndarray, begin: int, widths: tuple[int, ...]
) -> None:
    """Of an array with a tile (width, n_feat) for each receiver of a block."""
    _check_array(table, mine)
    if mine.ndim != 3 or mine.shape[1] not in widths:
        wanted = " | ".join(str(width) for width in widths)
        raise ValueError(f"an array of a block is {mine.shape}, not (n_block, {wanted}, n_feat)")
    if not 0 <= begin <= begin + len(mine) <= len(where.row_ptr) - 1:
        raise ValueError(
            f"receivers {begin} .. {begin + len(mine) - 1}, but there are {len(where.row_ptr) - 1}"
        )


def _check_senders(
    where: Geometry, table: RadialTable, sent: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Of an array with features of each sender."""
    _check_array(table, sent)
    if sent.shape != (len(where.x), *shape):
        raise ValueError(f"features of senders have shape {sent.shape}, not {len(where.x), *shape}")


def _check_species(where: Geometry) -> None:
    if len(where.species) != len(where.x):
        raise ValueError(f"{len(where.species)} species of {len(where.x)} atoms")


def _check_array(table: RadialTable, array: np.ndarray) -> None:
    if array.dtype != table.dtype:
        raise TypeError(f"an array is {array.dtype}, the table of sensitivities {table.dtype}")
    if not array.flags.c_contiguous:
        raise ValueError("an array is not C-contiguous")
