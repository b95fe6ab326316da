"""Two-electron integrals in torch: the reference, on any device.

    (mn|kl) = sum_{bra, ket} theta sum_{h, h'} E_h^mn (-1)^{h'} E_h'^kl R_{h+h'}(alpha, P - Q)
    theta   = 2 pi^{5/2} / (p q sqrt(p + q)),    alpha = p q / (p + q)

with the sum over pairs of primitives and (-1)^{h'} the parity of t + u + v (McMurchie and Davidson
1978). Pairs of shells are taken in blocks; a block meets itself and the earlier ones, which is the
eightfold symmetry but for the blocks on the diagonal. In the gradient a block of integrals is
contracted with Gamma to a scalar and differentiated at once, so that memory follows the block. All
geometries (...) go through together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from md_plugin.nanodft.basis import Basis
from md_plugin.nanodft.hermite import coulomb, sums
from md_plugin.nanodft.shell_pairs import HermitePairs, hermite_pairs, shell_pairs
from md_plugin.nanodft.two_electron_parts import from_slopes, padded_density, parity

# Peak of (sp sp|sp sp) blocks per quartet of primitives, measured: 1.5 and 5.5 kB. 100 Hermite
# integrals and the half contracted ones are held, with autograd also the levels of the recursion.
_BYTES = {"integrals": 2_500, "gradient": 7_500}


@dataclass(frozen=True, eq=False)
class _Block:
    """Consecutive pairs of one class: their tables, cut out, and where they came from."""

    table: HermitePairs
    index: int  # of the class
    first_pair: int
    pairs: slice
    prims: slice

    @property
    def owner(self) -> Tensor:
        """(n_prim,) pair of each primitive pair, within the block."""
        pair: Tensor = self.table.kind.pair[self.prims] - self.first_pair
        return pair


def eri(basis: Basis, positions: Tensor, max_memory: int) -> Tensor:
    """(..., n_ao (n_ao + 1) / 2, same) integrals over unique products m >= n, in Hartree.

    Args:
        basis: the functions.
        positions: (..., n_atom, 3) bohr.
        max_memory: bytes for a block's intermediate arrays.
    """
    tables = hermite_pairs(shell_pairs(basis, positions.device), positions.detach())
    # one more row and column take the functions, numbered -1, that the basis lacks
    n = basis.n_ao * (basis.n_ao + 1) // 2 + 1
    many = positions.shape[:-2]
    packed = positions.new_zeros((*many, n, n))
    rows = [t.kind.product for t in tables]
    for bra, ket in _meetings(tables, max_memory // _BYTES["integrals"] // math.prod(many)):
        values = _integrals(bra.table, ket.table, bra.owner, ket.owner)
        row, column = rows[bra.index][bra.pairs].flatten(), rows[ket.index][ket.pairs].flatten()
        values = values.transpose(-2, -3).reshape(*many, len(row), len(column))
        packed[..., row[:, None], column] = values
        packed[..., column[:, None], row] = values.mT
    return packed[..., :-1, :-1]


def two_electron_gradient(
    basis: Basis, positions: Tensor, dm: Tensor, hyb: float, max_memory: int
) -> Tensor:
    """(..., n_atom, 3) gradient at constant density matrix, Ha/bohr; see `integrals`."""
    max_memory //= math.prod(positions.shape[:-2])
    with torch.enable_grad():
        x = positions.detach().requires_grad_()
        attached = hermite_pairs(shell_pairs(basis, x.device), x)
        tables = [
            replace(t, centre=t.centre.detach(), expansion=t.expansion.detach()) for t in attached
        ]
        slopes = [(torch.zeros_like(t.expansion), torch.zeros_like(t.centre)) for t in tables]
        for bra, ket in _meetings(tables, max_memory // _BYTES["gradient"]):
            twice = 1.0 if (bra.index, bra.pairs) == (ket.index, ket.pairs) else 2.0
            leaves = [
                leaf.detach().requires_grad_()
                for side in (bra, ket)
                for leaf in (side.table.expansion, side.table.centre)
            ]
            one = replace(bra.table, expansion=leaves[0], centre=leaves[1])
            other = replace(ket.table, expansion=leaves[2], centre=leaves[3])
            values = _integrals(one, other, bra.owner, ket.owner)
            energy = 0.5 * twice * (values * _gamma(dm, bra, ket, hyb)).sum()
            for leaf, slope in enumerate(torch.autograd.grad(energy, leaves)):
                side = (bra, ket)[leaf // 2]
                start, stop = side.prims.start, side.prims.stop
                whole = slopes[side.index][leaf % 2]
                whole.narrow(leaf % 2 - 3, start, stop - start).add_(slope)
        return from_slopes(attached, x, slopes)


def _gamma(dm: Tensor, bra: _Block, ket: _Block, hyb: float) -> Tensor:
    """(..., n_bra, n_ket, n_prod, n_prod) D_mn D_kl - hyb/4 (D_mk D_nl + D_ml D_nk), weighted."""
    dm = padded_density(dm)
    m, n = bra.table.kind.ao[bra.pairs].unbind(-1)
    k, l = ket.table.kind.ao[ket.pairs].unbind(-1)
    gamma = torch.einsum("...am,...bk->...abmk", dm[..., m, n], dm[..., k, l])
    if hyb:
        m, n = m[:, None, :, None], n[:, None, :, None]
        k, l = k[None, :, None, :], l[None, :, None, :]
        exchange = dm[..., m, k] * dm[..., n, l] + dm[..., m, l] * dm[..., n, k]
        gamma -= hyb / 4 * exchange
    weight = torch.outer(bra.table.kind.weight[bra.pairs], ket.table.kind.weight[ket.pairs])
    return gamma * weight[:, :, None, None]


def _integrals(bra: HermitePairs, ket: HermitePairs, owner: Tensor, other: Tensor) -> Tensor:
    """(..., n_bra, n_ket, n_prod, n_prod) integrals of two blocks; owner: pairs of primitives."""
    orders = bra.kind.order, ket.kind.order
    p, q = bra.exponent[:, None], ket.exponent
    theta = 2 * math.pi**2.5 / (p * q * torch.sqrt(p + q))
    distance = bra.centre[..., :, None, :] - ket.centre[..., None, :, :]
    hermite = theta * coulomb(sum(orders), p * q / (p + q), distance)
    hermite = hermite[sums(*orders).to(p.device)]  # (h, h', ..., bra, ket)
    signed = ket.expansion * parity(orders[1], q)[:, None]
    half = _add(torch.einsum("hj...ab,...bjk->...abhk", hermite, signed), other, -3)
    return _add(torch.einsum("...ahm,...abhk->...abmk", bra.expansion, half), owner, -4)


def _add(values: Tensor, owner: Tensor, axis: int) -> Tensor:
    """Sum along an axis what has the same owner."""
    shape = list(values.shape)
    shape[axis] = int(owner[-1]) + 1
    return values.new_zeros(shape).index_add(axis, owner, values)


def _meetings(
    tables: tuple[HermitePairs, ...] | list[HermitePairs], n_quartet: int
) -> Iterator[tuple[_Block, _Block]]:
    """Each unordered pair of blocks, with at most about n_quartet quartets of primitives."""
    blocks = _blocks(tables, max(int(math.sqrt(n_quartet)), 1))
    for i, bra in enumerate(blocks):
        for ket in blocks[: i + 1]:
            yield bra, ket


def _blocks(tables: tuple[HermitePairs, ...] | list[HermitePairs], size: int) -> list[_Block]:
    """Blocks of at most `size` primitive pairs, or of a single pair of shells."""
    blocks = []
    for index, table in enumerate(tables):
        start = table.kind.start.tolist()
        first = 0
        while first < len(start) - 1:
            last = first + 1
            while last < len(start) - 1 and start[last + 1] - start[first] <= size:
                last += 1
            prims = slice(start[first], start[last])
            cut = replace(
                table,
                exponent=table.exponent[prims],
                centre=table.centre[..., prims, :],
                expansion=table.expansion[..., prims, :, :],
            )
            blocks.append(_Block(cut, index, first, slice(first, last), prims))
            first = last
    return blocks
