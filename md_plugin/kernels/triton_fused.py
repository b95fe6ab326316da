"""One interaction layer on the GPU, fused: from positions, and nothing per pair is ever stored.

    r_p      = x[sender(p)] + translation(p) - x[receiver(p)]  subtracted in float64, then rounded
    s_nu(r)  = exp(-(sigma_nu (1/r - 1/mu_nu))^2 / 2) cos^2(pi r / (2 rcut)),   0 from `end` on

    forward    env[i, c, nu, a] = sum_p t_c(p) s_nu(r_p) z[sender(p), a]
    backward   forces, virial, dE/dz from dE/denv
    mirror     what backward leaves out where each receiver takes only what is its own

t_c are the 1, 4, 9 or 16 components of `model.radial`: env comes before the weights in every order,
so that what a pair gathers is one row of features. Receivers come in blocks, begin .. begin +
n_block - 1, so that env of all need not be held. Nothing here makes the host wait for the device.
Kernels: `triton_layer`, `triton_mirror`.

A network in float64 has z, env and dE/denv in float64. One in float32 has them as halves, float16
tensors with one more dimension in front: two that add up, as good as float32 where the largest
number is near 1 (22 bits, and nothing below 2^-25), or one. Products of float16 are added in
float32.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from md_plugin.kernels import tuning
from md_plugin.kernels.triton_arrays import Geometry, Gradients, Radial, grade
from md_plugin.kernels.triton_layer import backward_kernel, forward_kernel
from md_plugin.kernels.triton_mirror import mirror_kernel
from md_plugin.kernels.triton_parts import (
    PRECISION,
    SIN_TERMS,
    on_device,
    power_of_two,
)

N_COMPONENTS = (1, 4, 9, 16)
# A Gaussian is felt within: beyond, s is below 2^-30 or 2^-64, and its slope below rounding.
WINDOW = {torch.float32: 5.5, torch.float64: 8.0}


def tiles(
    n_comp: int, n_nu: int, n_feat: int, dtype: torch.dtype, back: bool = False
) -> dict[str, int]:
    """Block sizes, and how many warps share a program.

    tl.dot takes no side below 16; GROUP components times BLOCK_NU make the rows of a product, 64
    of them for tensors. One or two warps: what belongs to a pair, which each warp computes for
    itself, is most of the instructions; half as many as with four, whose warp groups would multiply
    faster. What compiles to the fewest without filling local memory on sm_80 and sm_90 was found by
    looking at compiled code (docs/gpu_kernels.md). One stage: more would hold the next tile's loads
    in registers.
    """
    double, scalar = dtype == torch.float64, n_comp == 1
    if back:
        most = 16 if double else 32 if n_comp > 4 else 128 if dtype == torch.float16 else 64
        warps = (4 if scalar else 8) if double else 1 if scalar else 2
    else:
        most = 32 if double else 64 if scalar else 128
        warps = (2 if scalar else 4) if double else 1 if scalar or n_feat <= 32 else 2
    return {
        "GROUP": 1 if scalar else 4,
        "GROUPS": 1 if scalar else triton.cdiv(n_comp, 4),
        "BLOCK_P": 16,
        "BLOCK_NU": power_of_two(n_nu, 16, 32 if scalar and not back else 16),
        "BLOCK_F": power_of_two(n_feat, 16, most),
        "num_warps": warps,
        "num_stages": 1,
    }


def forward(where: Geometry, radial: Radial, z: Tensor | None, env: Tensor, begin: int = 0) -> None:
    """Write env ([2 | 1,] n_block, 1 | 4 | 9 | 16, n_nu, n_feat) of receivers from `begin` on.

    z ([2 | 1,] n_send, n_feat) is None in a one-hot first layer: n_feat is then the number of
    species. Both are halves, which have the dimension in front, if the table is in float32.

    Raises:
        TypeError: an array is neither in float64, as the table is, nor halves beside float32.
        ValueError: an array has the wrong shape, is not contiguous, or is on another device.
    """
    _check(where, radial, z, env, begin)
    n_block, _, n_nu, n_feat = env.shape[-4:]
    chosen = options(radial, env)
    n_part = triton.cdiv(n_nu, chosen["BLOCK_NU"]) * chosen["GROUPS"]
    if env.numel():
        with on_device(env):
            forward_kernel[(n_block, triton.cdiv(n_feat, chosen["BLOCK_F"]), n_part)](
                *where, z, *radial, env, begin, len(where.x), **chosen
            )


def backward(
    where: Geometry,
    radial: Radial,
    z: Tensor | None,
    ge: Tensor,
    gradients: Gradients,
    begin: int = 0,
    *,
    scale: Tensor | None = None,
) -> None:
    """Add what ge = dE/denv of a block, shaped as env, gives to forces, dE/dz, and virials.

    scale (2, n_block) in the table's dtype: what messages and forces of each receiver are
    multiplied by.

    Raises:
        TypeError: an array is neither in float64, as the table is, nor halves beside float32.
        ValueError: an array has the wrong shape, is not contiguous, or is on another device.
    """
    _check(where, radial, z, ge, begin)
    n_block, _, _, n_feat = ge.shape[-4:]
    if scale is not None:
        _check_array(radial, scale)
        _check_shape("powers of two", scale, (2, n_block))
    if z is not None and not gradients.own_rows:
        _check_array(radial, gradients.messages)
        _check_shape("features of senders", gradients.messages, (len(where.x), n_feat))
    chosen = options(radial, ge, back=True) | {"OWN_ROW": gradients.own_rows}
    if ge.numel():
        with on_device(ge):
            backward_kernel[(n_block,)](
                *where, z, *radial, ge, scale, gradients.forces, gradients.messages,
                gradients.sums, gradients.sent, begin, len(where.x), **chosen,
            )  # fmt: skip


def mirror(
    where: Geometry,
    radial: Radial,
    g: Tensor,
    q: Tensor,
    h: Tensor | None,
    gradients: Gradients,
    *,
    begin: int = 0,
) -> None:
    """Add to the forces of a block what other receivers' pairs with it give; write h where given.

    g (n_recv, C, n_hidden) is dE/dm of all receivers; q and h (n_block, n_nu, n_hidden) are
    z V and, before V, dE/dz of the block. See `triton_mirror`.

    Raises:
        TypeError: an array is not of the table's dtype.
        ValueError: senders that are not receivers, or an array has the wrong shape, is not
            contiguous, or is on another device.
    """
    n_recv, n_nu = len(where.row_ptr) - 1, radial.table.shape[1]
    if n_recv != len(where.x):
        raise ValueError(
            f"{len(where.x)} senders, but {n_recv} receivers: the rows of ghosts are not here"
        )
    _check_shape("gradients of sums", g, (n_recv, g.shape[1], g.shape[-1]))
    for array in (q,) if h is None else (q, h):
        _check_shape("an array of a block", array, (len(q), n_nu, g.shape[-1]))
    for array in (g, q) if h is None else (g, q, h):
        _check_array(radial, array)
    chosen = mirror_options(g, n_nu)
    if q.numel():
        with on_device(q):
            mirror_kernel[(len(q),)](
                *where[:-1], *radial, g, q, h, gradients.forces, begin, n_nu, g.shape[2], **chosen
            )


def options(radial: Radial, env: Tensor, back: bool = False) -> dict[str, Any]:
    """What is compiled in, for an array of this shape and dtype, and how it is launched."""
    shape, real, dtype = env.shape[-4:], radial.table.dtype, grade(env)
    _, n_comp, n_nu, n_feat = shape
    tile: dict[str, Any] = dict(tiles(n_comp, n_nu, n_feat, dtype, back))
    tile |= tuning.chosen("backward" if back else "forward", shape, dtype, env.device)
    if back:
        # A last block of as few as are left, which are at least 16 rows of a product, has fewer
        # instructions; in float64 it takes more registers than there are.
        n_whole, left = divmod(n_nu, tile["BLOCK_NU"])
        apart = left > 0 and real == torch.float32
        tile["NU_BLOCKS"] = n_whole if apart else triton.cdiv(n_nu, tile["BLOCK_NU"])
        least = 16 // tile["GROUP"]
        tile["REST"] = power_of_two(left, least, tile["BLOCK_NU"]) if apart else 0
        tile["F_BLOCKS"] = triton.cdiv(n_feat, tile["BLOCK_F"])
        tile["OWN_ROW"] = False
    n_part = 2 if dtype == torch.float32 else 1
    tile |= {"N_PART": n_part, "N_COMP": n_comp, "N_NU": n_nu, "N_FEAT": n_feat}
    return tile | _common(real) | {"WINDOW": WINDOW[real]}


def mirror_options(g: Tensor, n_nu: int) -> dict[str, Any]:
    """The same for `mirror`."""
    single, n_hidden = g.dtype == torch.float32, g.shape[2]
    block = power_of_two(n_hidden, 16, 32 if single else 16)
    return _common(g.dtype) | {
        "PRECISION": PRECISION[g.dtype],
        "N_COMP": g.shape[1],
        "B_BLOCKS": triton.cdiv(n_hidden, block),
        "BLOCK_P": 16,
        "BLOCK_NU": power_of_two(n_nu, 16, 1 << 30),
        "BLOCK_B": block,
        "num_warps": 4,
        "num_stages": 1,
    }


def _common(real: torch.dtype) -> dict[str, Any]:
    return {"TERMS": SIN_TERMS[real], "enable_fp_fusion": True}


def _check(where: Geometry, radial: Radial, z: Tensor | None, env: Tensor, begin: int) -> None:
    """Of an array with a tile (n_comp, n_nu, n_feat) for each receiver of a block."""
    front = _check_parts(radial, env, 4)
    n_nu, n_recv = radial.table.shape[1], len(where.row_ptr) - 1
    n_block, n_comp, *size = env.shape[-4:]
    if n_comp not in N_COMPONENTS or size[0] != n_nu:
        shape = (n_block, n_comp, *size)
        raise ValueError(
            f"an array of a block is {shape}, not (n_block, 1 | 4 | 9 | 16, {n_nu}, n_feat)"
        )
    if not 0 <= begin <= begin + n_block <= n_recv:
        raise ValueError(f"receivers {begin} .. {begin + n_block - 1}, but there are {n_recv}")
    if z is not None:
        _check_parts(radial, z, 2)
        _check_shape("features of senders", z, (*front, len(where.x), size[1]))
    elif where.species is None or len(where.species) != len(where.x):
        raise ValueError(f"a first layer needs the species of all {len(where.x)} atoms")


def _check_parts(radial: Radial, array: Tensor, n_dim: int) -> tuple[int, ...]:
    """The dimension in front of the others: none beside float64, that of halves beside float32."""
    double = radial.table.dtype == torch.float64
    _check_array(radial, array, radial.table.dtype if double else torch.float16)
    front = tuple(array.shape[: array.ndim - n_dim])
    if front not in ([()] if double else [(1,), (2,)]):
        what = f"{n_dim} dimensions" if double else f"halves, 1 or 2 of {n_dim} dimensions"
        raise ValueError(f"an array has shape {tuple(array.shape)}, but should be {what}")
    return front


def _check_shape(name: str, array: Tensor, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} have shape {tuple(array.shape)}, not {shape}")


def _check_array(radial: Radial, array: Tensor, dtype: torch.dtype | None = None) -> None:
    """Of the table's dtype, or another."""
    real, dtype = radial.table.dtype, dtype or radial.table.dtype
    if array.dtype != dtype:
        raise TypeError(
            f"an array is {array.dtype}, not {dtype} beside a table of sensitivities in {real}"
        )
    if array.device != radial.table.device:
        raise ValueError(f"an array is on {array.device}, the table on {radial.table.device}")
    if not array.is_contiguous():
        raise ValueError("an array is not contiguous")
