"""The fused kernels of tensor layers compiled by numba; as `fused_rows` for scalar ones.

`comps` is a tuple of as many booleans as there are components, so that each order has code of its
own. `shared`: q is of species. `dq` is a tuple, empty where dE/dq is not wanted.
"""

from __future__ import annotations

from md_plugin.kernels.compiled import compiled
from md_plugin.kernels.fused_radial import N_BIN
from md_plugin.kernels.fused_row import FILES
from md_plugin.kernels.fused_rows import space_of
from md_plugin.kernels.fused_tensor import tensor_backward_rows, tensor_forward_rows

_jit = compiled(FILES)


@_jit
def tensor_space(table, where, q, comps, first, last):  # type: ignore[no-untyped-def]
    """Work space of one thread, and sizes."""
    rows = 2 * q.shape[1] + len(comps) - 1, len(comps)
    return space_of(table, where, (first, last), q.shape[1:], rows, N_BIN, 0)


@_jit
def tensor_forward_range(table, where, q, m, comps, shared, begin, first, last):  # type: ignore[no-untyped-def]
    """Write m."""
    space = tensor_space(table, where, q, comps, first, last)
    tensor_forward_rows(table, where, space, comps, (q, m, shared, begin, first, last))


@_jit
def tensor_backward_range(  # type: ignore[no-untyped-def]
    table, where, q, g, comps, target, dq, begin, first, last
):
    """Add to dq and the target: forces, sums, virials of atoms."""
    space = tensor_space(table, where, q, comps, first, last)
    layer = target + (len(target[2]), q, g) + dq + (begin, first, last)
    tensor_backward_rows(table, where, space, comps, layer)
