"""Pieces of the fused kernels: radial functions of a sorted row, and register tiles of features.

What is here emits IR. Radial functions are computed for a vector of pairs at a time; a `Tile` is a
few vectors of features, of which only the last may be partial.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from md_plugin.kernels.fused_radial import NU_BLOCK
from md_plugin.kernels.fused_row import CUT, CUTQ2, DCUT, SENSE, Q, Row, unpack
from md_plugin.kernels.vector_ir import I64, Value
from md_plugin.kernels.vector_math import exp2, sin_half_pi


def radial(row: Row, n: Value, slopes: bool) -> None:
    """1/r and cos^2(pi r / 2 rcut) of n pairs; for slopes also its derivative and cutoff / r^2."""
    e = row.e
    inverse_rcut, pi_over = (e.broadcast(e.at(row.constants, I64(k))) for k in (0, 1))

    def body(p: Value, _: Any) -> list[Value]:
        r = e.sqrt(unpack(e, row.pairs, p)[3])
        u = e.mul(r, inverse_rcut)
        q = e.reciprocal(r)
        cosine = sin_half_pi(e, e.at_least(e.sub(e.const(1.0), u), 0.0))
        cut = e.mul(cosine, cosine)
        e.store(q, e.at(row.number(Q), p))
        e.store(cut, e.at(row.number(CUT), p))
        if slopes:
            dcut = e.mul(e.mul(e.neg(pi_over), cosine), sin_half_pi(e, u))
            e.store(dcut, e.at(row.number(DCUT), p))
            e.store(e.mul(cut, e.mul(q, q)), e.at(row.number(CUTQ2), p))
        return []

    e.loop(I64(0), n, e.lanes, [], body)


def gaussian(row: Row, nu: Value, p: Value) -> tuple[Value, Value]:
    """2^-y^2 and y of one sensitivity, for the pairs from p on."""
    e = row.e
    scale = e.broadcast(e.at(row.gaussian, nu))
    offset = e.broadcast(e.at(row.gaussian, e.builder.add(nu, row.n_table)))
    y = e.fma(scale, e.load(e.at(row.number(Q), p)), e.neg(offset))
    return exp2(e, e.mul(e.neg(y), y)), y


def slope(row: Row, nu: Value, p: Value, value: Value, y: Value) -> Value:
    """ds/dr = 2^-y^2 (slope y cut / r^2 + dcut)."""
    e, b = row.e, row.e.builder
    factor = e.broadcast(e.at(row.gaussian, b.add(nu, b.mul(row.n_table, I64(2)))))
    cutq2, dcut = (e.load(e.at(row.number(k), p)) for k in (CUTQ2, DCUT))
    return e.mul(value, e.fma(e.mul(factor, y), cutq2, dcut))


def pairs_of(
    row: Row, table: Value, width: Value, k: Value, base: Value | None = None
) -> tuple[Value, Value]:
    """First of the sorted pairs that column k of a reach table names, and one past the last."""
    e, b = row.e, row.e.builder
    bins = e.index(table, k), e.index(table, b.add(k, width))
    if base is not None:
        bins = b.add(bins[0], base), b.add(bins[1], base)
    return e.index(row.starts, bins[0]), e.index(row.starts, bins[1])


def sense_block(row: Row, nu0: Value, start: Value, stop: Value) -> None:
    """s[k, p] of sensitivities nu0 + k, k < NU_BLOCK."""
    e, b = row.e, row.e.builder

    def body(p: Value, _: Any) -> list[Value]:
        cut = e.load(e.at(row.number(CUT), p))
        for k in range(NU_BLOCK):
            value, _ = gaussian(row, b.add(nu0, I64(k)), p)
            e.store(e.mul(value, cut), e.at(row.number(SENSE + k), p))
        return []

    e.loop(start, stop, e.lanes, [], body)


def sense_rows(row: Row, slopes: bool) -> None:
    """s[nu, p], and ds[nu, p], over each sensitivity's range, and one pair more at both ends."""
    e, b = row.e, row.e.builder

    def one(nu: Value, _: Any) -> list[Value]:
        start, stop = pairs_of(row, row.reach, row.n_nu, nu)
        start = b.select(b.icmp_signed(">", start, I64(0)), b.sub(start, I64(1)), start)
        at = b.mul(row.capacity, nu)

        def body(p: Value, _: Any) -> list[Value]:
            value, y = gaussian(row, nu, p)
            s = e.mul(value, e.load(e.at(row.number(CUT), p)))
            e.store(s, e.at(row.number(SENSE), b.add(at, p)))
            if slopes:
                e.store(slope(row, nu, p, value, y), e.at(row.slopes, b.add(at, p)))
            return []

        e.loop(start, b.add(stop, I64(1)), e.lanes, [], body)
        return []

    e.loop(I64(0), row.n_nu, 1, [], one)


class Tile:
    """A few vectors of features, from f0 on.

    Args:
        row: what is at work.
        f0: the first feature.
        masks: of each vector; None where all its lanes are features.
    """

    def __init__(self, row: Row, f0: Value, masks: list[Value | None]):
        self.row, self.f0, self.masks = row, f0, masks

    @property
    def size(self) -> int:
        """Vectors."""
        return len(self.masks)

    def zeros(self, count: int) -> list[Value]:
        """Of `count` tiles."""
        return [self.row.e.const(0.0)] * (count * self.size)

    def is_later(self) -> Value:
        """A mask: whether other features came before."""
        e = self.row.e
        return e.splat(e.builder.icmp_signed(">", self.f0, I64(0)))

    def of(self, base: Value, number: Value) -> Value:
        """Address of the tile in row `number` of an array of rows of features."""
        b = self.row.e.builder
        return self.row.e.at(base, b.add(b.mul(number, self.row.n_feat), self.f0))

    def load(self, address: Value) -> list[Value]:
        """The vectors; zero beyond the features."""
        e = self.row.e
        return [e.load(e.at(address, I64(v * e.lanes)), mask) for v, mask in enumerate(self.masks)]

    def store(self, values: list[Value], address: Value) -> None:
        """The vectors, without what is beyond the features."""
        e = self.row.e
        for v, (value, mask) in enumerate(zip(values, self.masks, strict=True)):
            e.store(value, e.at(address, I64(v * e.lanes)), mask)

    def prefetch(self, bases: list[Value], number: Value) -> None:
        """The lines of the tile in row `number` of some arrays."""
        e = self.row.e
        for base in bases:
            for v in range(self.size):
                e.prefetch(e.at(self.of(base, number), I64(v * e.lanes)))

    def add_product(self, rows: tuple[list[Value], list[Value]], p: Value, number: int = 0) -> None:
        """part[number, p] += product of two tiles, by lanes; the first tile starts the sum."""
        row, e, b = self.row, self.row.e, self.row.e.builder
        at = b.mul(b.add(b.mul(row.capacity, I64(number)), p), I64(e.lanes))
        address = e.at(row.part, at)
        total = e.load(address, self.is_later())
        for left, right in zip(*rows, strict=True):
            total = e.fma(left, right, total)
        e.store(total, address)


def each_tile(row: Row, emit: Callable[[Tile], None], wide: int | None = None) -> None:
    """Emit code for tiles of up to `wide` vectors, as many as the registers hold if not given."""
    e, b = row.e, row.e.builder
    wide = wide or e.wide

    def body(f0: Value, _: Any) -> list[Value]:
        rest = b.sub(row.n_feat, f0)
        for size in range(1, wide + 1):
            last = I64((size - 1) * e.lanes)
            fits = b.icmp_signed(">", rest, last)
            if size < wide:
                fits = b.and_(fits, b.icmp_signed("<=", rest, I64(size * e.lanes)))
            with e.when(fits):
                emit(Tile(row, f0, [None] * (size - 1) + [e.head_mask(b.sub(rest, last))]))
        return []

    e.loop(I64(0), row.n_feat, wide * e.lanes, [], body)


def lane_sums(row: Row, p: Value, number: int = 0) -> Value:
    """part[number, p : p + lanes] summed over lanes, by a tree of shuffles."""
    e, b = row.e, row.e.builder
    at = b.mul(b.add(b.mul(row.capacity, I64(number)), p), I64(e.lanes))
    values = [e.load(e.at(row.part, b.add(at, I64(k * e.lanes)))) for k in range(e.lanes)]
    while len(values) > 1:
        values = [e.add_neighbours(*two) for two in zip(values[::2], values[1::2], strict=True)]
    return values[0]
