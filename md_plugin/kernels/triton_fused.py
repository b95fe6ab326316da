"""One interaction layer on the GPU, fused: from positions, and nothing per pair is ever stored.

    r_p      = x[sender(p)] + translation(p) - x[receiver(p)]  subtracted in float64, then rounded
    s_nu(r)  = exp(-(sigma_nu (1/r - 1/mu_nu))^2 / 2) cos^2(pi r / (2 rcut)),   0 from `end` on

    forward    env[i, c, nu, a] = sum_p t_c(p) s_nu(r_p) z[sender(p), a]
    backward   forces, virial, dE/dz from dE/denv

t_c are the 1, 4 or 9 components of `model.radial.tensor_components`: env comes before the weights
in every order, so that what a pair gathers is one row of features. Receivers come in blocks, begin
.. begin + n_block - 1, so that env of a block stays in the second-level cache. float32 products
are made of three in tf32 each, which is as good as float32; float64 stays float64. Nothing here
makes the host wait for the device. Kernels: `triton_layer`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from copy import copy
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from md_plugin.kernels import tuning
from md_plugin.kernels.triton_layer import backward_kernel, forward_kernel
from md_plugin.kernels.triton_parts import SIN_TERMS, on_device, power_of_two

N_COMPONENTS = (1, 4, 9)
N_SUM = 10  # of a receiver: the virial row by row, and the distance of its closest pair
_EXP2_SCALE = math.sqrt(0.5 / math.log(2.0))  # exp(-t^2 / 2) = 2^-(t scale)^2


class Geometry(NamedTuple):
    """Positions and pairs, on one device. Indices are not checked.

    Attributes:
        x: (n_send, 3) float64 positions, ghosts after the receivers.
        row_ptr: (n_recv + 1,) int32, rows of the pairs.
        sender: (n_pair,) int32; pairs from the end on are skipped.
        translation: (n_pair,) int16, row of `translations` that is added to each sender, or None.
        translations: (n_translation, 3) float64 lattice translations, or None.
        species: (n_send,) int32 index of the species, for a first layer only.
    """

    x: Tensor
    row_ptr: Tensor
    sender: Tensor
    translation: Tensor | None = None
    translations: Tensor | None = None
    species: Tensor | None = None


class Radial(NamedTuple):
    """Sensitivities as the kernels take them.

    Attributes:
        table: (2, n_nu) scale and offset: s = 2^-(scale / r - offset)^2 under the cutoff.
        rcut: where the squared cosine vanishes, Å.
        end: where pairs end, Å; at most rcut.
    """

    table: Tensor
    rcut: float
    end: float

    @classmethod
    def build(cls, mu: Tensor, sigma: Tensor, rcut: float, end: float | None = None) -> Radial:
        """Of centres mu and inverse widths sigma (n_nu,), whose dtype is the network's."""
        scale = sigma.detach().double() * _EXP2_SCALE
        table = torch.stack([scale, scale / mu.detach().double()]).to(mu.dtype)
        return cls(table, rcut, rcut if end is None else end)


class Gradients:
    """What backward passes add to.

    Args:
        where: positions and pairs.
        n_feat: features of the layer's input; 0 for a first layer.
        dtype: of the network.
        per_atom: whether virials of atoms are wanted.

    Attributes:
        forces: (n_send, 3) float64.
        messages: (n_send, n_feat), dE/dz.
        sums: (n_recv, 10) float64, virial and closest distance of each receiver.
        sent: (n_send, 9) float64, half of the virial of each sender's pairs; None where virials of
            atoms are not wanted.
    """

    def __init__(self, where: Geometry, n_feat: int, dtype: torch.dtype, *, per_atom: bool = False):
        n_recv = len(where.row_ptr) - 1
        self.forces = torch.zeros_like(where.x)
        self.messages = where.x.new_zeros(len(where.x), n_feat, dtype=dtype)
        self.sums = where.x.new_zeros(n_recv, N_SUM)
        self.sums[:, -1] = math.inf
        self.sent = where.x.new_zeros(len(where.x), 9) if per_atom else None

    def for_layer(self, n_feat: int) -> Gradients:
        """Messages of its own; the same forces and sums."""
        other = copy(self)
        other.messages = self.messages.new_zeros(len(self.forces), n_feat)
        return other

    def part(self, t: int) -> Gradients:
        """Itself: programs share everything."""
        return self

    @property
    def row_virials(self) -> Tensor:
        """(n_recv, 3, 3) of each receiver's pairs."""
        return self.sums[:, :9].view(-1, 3, 3)

    @property
    def virial(self) -> Tensor:
        """(3, 3)."""
        return self.row_virials.sum(dim=0)

    @property
    def atom_virials(self) -> Tensor | None:
        """(n_send, 3, 3), half of each pair's virial to each of its atoms; None if not wanted."""
        if self.sent is None:
            return None
        atoms = self.sent.reshape(-1, 3, 3).clone()
        atoms[: len(self.sums)] += 0.5 * self.row_virials
        return atoms

    @property
    def closest(self) -> Tensor:
        """() distance of the closest pair; infinite where there is none."""
        return torch.cat([self.sums[:, -1], self.sums.new_full((1,), math.inf)]).min()


def tiles(
    n_comp: int, n_nu: int, n_feat: int, dtype: torch.dtype, back: bool = False
) -> dict[str, int]:
    """Block sizes, and how many warps share a program.

    tl.dot takes no side below 16. The products of float32 hold their operands twice, and those of
    float64 in twice the space: what does not spill into memory on sm_80 and sm_90 was found by
    looking at compiled code. ALIGN is a power of two that divides n_feat, so that rows load in 16
    bytes. One stage: more would hold the next tile's loads in registers.
    """
    single = dtype == torch.float32
    if back:
        most, warps = (32, 4) if single else (16, 4 if n_comp == 1 else 8)
    else:
        most = 16 if n_comp == 9 else 64 if single else 32
        warps = 2 if n_comp == 1 else 4
    return {
        "ALIGN": math.gcd(n_feat, 16),
        "BLOCK_P": 16,
        "BLOCK_NU": power_of_two(n_nu, 16, 32),
        "BLOCK_F": power_of_two(n_feat, 16, most),
        "num_warps": warps,
        "num_stages": 1,
    }


def forward(where: Geometry, radial: Radial, z: Tensor | None, env: Tensor, begin: int = 0) -> None:
    """Write env (n_block, 1 | 4 | 9, n_nu, n_feat) of receivers begin .. begin + n_block - 1.

    z (n_send, n_feat) is None in a one-hot first layer: n_feat is then the number of species.

    Raises:
        TypeError: an array is not of the table's dtype.
        ValueError: an array has the wrong shape, is not contiguous, or is on another device.
    """
    _check(where, radial, z, env, begin)
    n_block, _, n_nu, n_feat = env.shape
    chosen = options(radial, env)
    grid = (
        n_block,
        triton.cdiv(n_feat, chosen["BLOCK_F"]),
        triton.cdiv(n_nu, chosen["BLOCK_NU"]),
    )
    if env.numel():
        with on_device(env):
            forward_kernel[grid](*where, z, radial.table, env, begin, n_nu, n_feat, **chosen)


def backward(
    where: Geometry,
    radial: Radial,
    z: Tensor | None,
    ge: Tensor,
    gradients: Gradients,
    begin: int = 0,
) -> None:
    """Add what ge = dE/denv of a block gives to forces, dE/dz, and sums of its receivers.

    Raises:
        TypeError: an array is not of the table's dtype.
        ValueError: an array has the wrong shape, is not contiguous, or is on another device.
    """
    _check(where, radial, z, ge, begin)
    if z is not None:
        _check_senders(where, radial, gradients.messages, ge.shape[3])
    n_block, _, n_nu, n_feat = ge.shape
    chosen = options(radial, ge, back=True)
    if ge.numel():
        with on_device(ge):
            backward_kernel[(n_block,)](
                *where, z, radial.table, ge, gradients.forces, gradients.messages, gradients.sums,
                gradients.sent, begin, n_nu, n_feat, **chosen,
            )  # fmt: skip


def options(radial: Radial, env: Tensor, back: bool = False) -> dict[str, Any]:
    """What is compiled in, for an array of this shape and dtype, and how it is launched."""
    _, n_comp, n_nu, n_feat = env.shape
    tile: dict[str, Any] = dict(tiles(n_comp, n_nu, n_feat, env.dtype, back))
    tile |= tuning.chosen("backward" if back else "forward", env.shape, env.dtype, env.device)
    if back:
        tile["NU_BLOCKS"] = triton.cdiv(n_nu, tile["BLOCK_NU"])
        tile["F_BLOCKS"] = triton.cdiv(n_feat, tile["BLOCK_F"])
    return tile | {
        "RCUT": radial.rcut,
        "END": radial.end,
        "TERMS": SIN_TERMS[env.dtype],
        "PRECISION": "tf32x3" if env.dtype == torch.float32 else "ieee",
        "N_COMP": n_comp,
        "enable_fp_fusion": True,
    }


def _check(where: Geometry, radial: Radial, z: Tensor | None, env: Tensor, begin: int) -> None:
    """Of an array with a tile (n_comp, n_nu, n_feat) for each receiver of a block."""
    _check_array(radial, env)
    n_nu, n_recv = radial.table.shape[1], len(where.row_ptr) - 1
    if env.ndim != 4 or env.shape[1] not in N_COMPONENTS or env.shape[2] != n_nu:
        shape = tuple(env.shape)
        raise ValueError(
            f"an array of a block is {shape}, not (n_block, 1 | 4 | 9, {n_nu}, n_feat)"
        )
    if not 0 <= begin <= begin + len(env) <= n_recv:
        raise ValueError(f"receivers {begin} .. {begin + len(env) - 1}, but there are {n_recv}")
    if z is not None:
        _check_senders(where, radial, z, env.shape[3])
    elif where.species is None or len(where.species) != len(where.x):
        raise ValueError(f"a first layer needs the species of all {len(where.x)} atoms")


def _check_senders(where: Geometry, radial: Radial, sent: Tensor, n_feat: int) -> None:
    """Of an array with features of each sender."""
    _check_array(radial, sent)
    if sent.shape != (len(where.x), n_feat):
        raise ValueError(
            f"features of senders have shape {tuple(sent.shape)}, not {len(where.x), n_feat}"
        )


def _check_array(radial: Radial, array: Tensor) -> None:
    if array.dtype != radial.table.dtype:
        raise TypeError(
            f"an array is {array.dtype}, the table of sensitivities {radial.table.dtype}"
        )
    if array.device != radial.table.device:
        raise ValueError(f"an array is on {array.device}, the table on {radial.table.device}")
    if not array.is_contiguous():
        raise ValueError("an array is not contiguous")
