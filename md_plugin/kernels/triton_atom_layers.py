"""The layers of a block that treat each atom by itself, and their gradient, on the GPU.

From m, the sums over neighbours, and features z: features x that go out, and energies E; and from
dE/dx the gradients dE/dm and dE/dz, with E on the way. One kernel each way, whose equations and
design are in `triton_atoms`. Nothing of a model but its shapes is compiled in. float32 products
are made of three in tf32 each, which is as good as float32; float64 stays float64. Nothing here
makes the host wait for the device.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from md_plugin.kernels.triton_atoms import backward_kernel, forward_kernel
from md_plugin.kernels.triton_parts import (
    PRECISION,
    has_warp_groups,
    multiprocessors,
    on_device,
    power_of_two,
)

WIDEST = 128  # features whose sums of products fit into registers
MOST = 1 << 31  # numbers in an array, and more than in any that is made here
AT_ONCE = 64  # features that are multiplied at once, as in `triton_atoms`


class Weights(NamedTuple):
    """Of a block, on one device, in one dtype; X, H, Z: n_out, n_hidden, n_in up to `padded`.

    Attributes:
        first: (H, Z) W_0; in a first block (1 + n_species, H), a row for each species after one
            of NaN for atoms of none.
        adjust: (X, Z) A, or (1 + n_species, X); None for the identity.
        inward: (L, H, X) W_k.
        outward: (L + 1, X, H) U_k; None without residual layers.
        bias: (L + 1, H) b_k.
        shift: (L + 1, X) c_k.
        readout: (X + 1,) R, then e.
        scales: (1 + order H,) cusp, then v and w.
    """

    first: Tensor
    adjust: Tensor | None
    inward: Tensor
    outward: Tensor | None
    bias: Tensor
    shift: Tensor
    readout: Tensor
    scales: Tensor


class Shape(NamedTuple):
    """Of a block: components of m, and features."""

    n_comp: int
    n_in: int
    n_hidden: int
    n_out: int


def forward(
    shape: Shape, weights: Weights, m: Tensor, z: Tensor, out: Tensor, energy: Tensor
) -> None:
    """Write features and add energies.

    Args:
        shape: of the block.
        weights: its weights.
        m: (n, C, n_hidden).
        z: (n, n_in) features; in a first block (n,) int32 species, as indices.
        out: (n, n_out), written.
        energy: (n,) float64, added to.

    Raises:
        TypeError: an array is not of the dtype of the weights.
        ValueError: an array has the wrong shape, is not contiguous, or is on another device.
    """
    _check(shape, weights, m, z, {"features that come out": (out, (len(m), shape.n_out))})
    _check_energy(energy, m)
    chosen = options(shape, m)
    if len(m):
        with on_device(m):
            n_program = triton.cdiv(len(m), chosen["BLOCK_A"])
            forward_kernel[(n_program,)](
                *_sent(m, z), *weights, _scratch(m, n_program, chosen), out, energy,
                len(m), len(weights.inward), **chosen,
            )  # fmt: skip


def backward(
    shape: Shape,
    weights: Weights,
    m: Tensor,
    z: Tensor,
    gradient: Tensor | None,
    gm: Tensor,
    *,
    along: Tensor | None = None,
    energy: Tensor | None = None,
) -> None:
    """Write gradients of sum E + sum (features * gradient).

    Args:
        shape: of the block.
        weights: its weights.
        m: (n, C, n_hidden).
        z: (n, n_in) features; in a first block (n,) int32 species, as indices.
        gradient: (n, n_out), of the blocks above; None where there are none.
        gm: (n, C, n_hidden) dE/dm, written.
        along: (n, n_in) dE/dz that does not go through m, written unless None.
        energy: (n,) float64, added to unless None.

    Raises:
        TypeError: an array is not of the dtype of the weights.
        ValueError: an array has the wrong shape, is not contiguous, or is on another device.
    """
    given = {
        "gradients of sums": (gm, tuple(m.shape)),
        "gradients of features": (gradient, (len(m), shape.n_out)),
        "gradients of features that came in": (along, (len(m), shape.n_in)),
    }
    _check(shape, weights, m, z, {k: (a, s) for k, (a, s) in given.items() if a is not None})
    if energy is not None:
        _check_energy(energy, m)
    chosen = options(shape, m)
    n_program = triton.cdiv(len(m), chosen["BLOCK_A"])
    slopes = m.new_empty(n_program * chosen["BLOCK_A"] * weights.bias.numel())
    if len(m):
        with on_device(m):
            backward_kernel[(n_program,)](
                *_sent(m, z), *weights, _scratch(m, n_program, chosen), slopes,
                gradient, gm, along, energy, len(m), len(weights.inward), **chosen,
            )  # fmt: skip


def _sent(m: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """m, and features or species."""
    return (m, z, None) if z.ndim == 2 else (m, None, z)


def _scratch(m: Tensor, n_program: int, chosen: dict[str, Any]) -> Tensor:
    """For operands of products that are too wide to stay in registers; empty where none is."""
    widest = max(chosen[f"BLOCK_{name}"] for name in ("IN", "HIDDEN", "OUT"))
    return m.new_empty(n_program * chosen["BLOCK_A"] * widest if widest > AT_ONCE else 0)


def padded(width: int) -> int:
    """Rows or columns that weights are padded to with zeros: a power of two."""
    return power_of_two(width, 16, 1 << 30)


def few(device: torch.device) -> int:
    """Atoms that are split into tiles of 16: two for each multiprocessor."""
    return 32 * multiprocessors(device) if device.type == "cuda" else 0


def tiles(
    shape: Shape, dtype: torch.dtype, is_few: bool = False, hopper: bool = True
) -> dict[str, int]:
    """Atoms of a program, and the warps that share them.

    Few atoms are split into tiles of 16, the least that matrix units take, so that all
    multiprocessors have some. Of many, a program has 32, or 64 where warp groups multiply them and
    registers hold them: it reads and splits each weight once. Found by looking at compiled code
    (docs/gpu_kernels.md).
    """
    wide, scalar = max(shape[1:]) > AT_ONCE, shape.n_comp == 1
    if dtype == torch.float64:
        return {"BLOCK_A": 16, "num_warps": 8}
    if is_few:
        return {"BLOCK_A": 16, "num_warps": 4}
    return {"BLOCK_A": 64 if hopper and scalar else 32, "num_warps": 8 if wide else 4}


def options(shape: Shape, m: Tensor, hopper: bool | None = None) -> dict[str, Any]:
    """What is compiled in, for that many atoms, and how it is launched.

    For the array's device, or for one that has warp groups, or has not.
    """
    hopper = has_warp_groups(m.device) if hopper is None else hopper
    return tiles(shape, m.dtype, len(m) <= few(m.device), hopper) | {
        "PRECISION": PRECISION[m.dtype],
        "N_COMP": shape.n_comp,
        "N_IN": shape.n_in,
        "N_HIDDEN": shape.n_hidden,
        "N_OUT": shape.n_out,
        "BLOCK_IN": padded(shape.n_in),
        "BLOCK_HIDDEN": padded(shape.n_hidden),
        "BLOCK_OUT": padded(shape.n_out),
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _check(
    shape: Shape,
    weights: Weights,
    m: Tensor,
    z: Tensor,
    others: dict[str, tuple[Tensor, tuple[int, ...]]],
) -> None:
    arrays = others | {"sums": (m, (len(m), shape.n_comp, shape.n_hidden))}
    if z.ndim == 2:
        arrays |= {"features": (z, (len(m), shape.n_in))}
    elif z.dtype != torch.int32 or z.shape != m.shape[:1]:
        raise ValueError(f"species are {z.dtype} {tuple(z.shape)}, not int32 ({len(m)},)")
    if m.numel() + weights.bias.numel() * len(m) >= MOST:
        raise ValueError(
            f"{len(m)} atoms at once: offsets of 32 bits hold fewer; take blocks of them"
        )
    for name, (array, expected) in arrays.items():
        if array.shape != expected:
            raise ValueError(f"{name} have shape {tuple(array.shape)}, not {expected}")
        if array.dtype != weights.bias.dtype:
            raise TypeError(f"{name} are {array.dtype}, the weights {weights.bias.dtype}")
        if not array.is_contiguous():
            raise ValueError(f"{name} are not contiguous")
    for array in (z, *(array for array, _ in arrays.values())):
        if array.device != weights.bias.device:
            raise ValueError(f"an array is on {array.device}, weights on {weights.bias.device}")


def _check_energy(energy: Tensor, m: Tensor) -> None:
    if energy.dtype != torch.float64 or energy.shape != m.shape[:1]:
        raise ValueError(
            f"energies are {energy.dtype} {tuple(energy.shape)}, not float64 ({len(m)},)"
        )
