"""What the kernels of sensitivities are made of, in vector instructions.

A kernel goes over pairs in blocks of as many as a vector has lanes: what depends on r alone is
computed for a block at once, then each pair takes its row of sensitivities, `lanes` at a time.
Vectors of Gaussians that are all exactly zero are skipped: in condensed matter a third to a half,
since centres in 1/r crowd at distances where there are no pairs.

Centres 1/mu and 1/r are sums of two numbers, a high and a low one: their difference, times sigma,
would else carry the rounding of numbers that are ten times larger than itself.

    table      (5, width): 1/mu, its low part, sigma, alpha / mu^2, beta
    constants  1 / rcut, end, pi / rcut, (pi / rcut)^2 / 2
    scratch    (N_ROW + MAX_LANES, MAX_LANES), overwritten
    sums       (3, width), added to
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llvmlite import ir

from md_plugin.kernels.radial_reference import FAR
from md_plugin.kernels.vector_ir import I64, Emitter, Value
from md_plugin.kernels.vector_math import exp2, sin_half_pi

MAX_LANES = 16  # of any CPU
N_ROW = 9  # numbers per pair that the longest kernel keeps
# Closer pairs, and those beyond the end, count as this close: 1/r^3 is finite in float32, and every
# Gaussian is zero.
CLOSEST = 1e-6
CENTRE, CENTRE_LOW, SIGMA, DRIFT, BETA = range(5)

_LOG2_E = 1.0 / math.log(2.0)


class Radial(NamedTuple):
    """What depends on r alone, of a vector of pairs: 1/r = q + q_low, c, c', c''."""

    q: Value
    q_low: Value
    c: Value
    c1: Value
    c2: Value


class Table(NamedTuple):
    """Rows of numbers per sensitivity, each `width` long."""

    start: Value
    width: Value

    def at(self, e: Emitter, row: int, nu: Value) -> Value:
        """Address of sensitivity nu in a row."""
        return e.at(self.start, e.builder.add(nu, e.builder.mul(self.width, I64(row))))

    def load(self, e: Emitter, row: int, nu: Value) -> Value:
        """A vector of a row."""
        return e.load(self.at(e, row, nu))

    def add(self, e: Emitter, nu: Value, terms: Sequence[Value]) -> None:
        """Add a vector to each of the first rows."""
        for row, term in enumerate(terms):
            address = self.at(e, row, nu)
            e.store(e.add(e.load(address), term), address)


def radial(e: Emitter, r: Value, constants: Value, p: Value, last: Value) -> Radial:
    """Of the pairs from p on. Two atoms at one place give NaN, so that it shows."""
    b, one = e.builder, e.const(1.0)
    inverse_rcut, end, slope, curvature = (e.broadcast(e.at(constants, I64(k))) for k in range(4))
    distance = e.load(e.at(r, p), e.head_mask(b.sub(last, p)))
    outside = b.fcmp_ordered(">=", distance, end)
    nowhere = b.fcmp_ordered("<=", distance, e.const(0.0))
    distance = e.at_least(b.select(outside, e.const(CLOSEST), distance), CLOSEST)
    distance = b.select(nowhere, e.const(math.nan), distance)
    q = e.reciprocal(distance)
    q_low = e.mul(q, e.fma(e.neg(q), distance, one))
    x = e.mul(distance, inverse_rcut)
    sine, cosine = sin_half_pi(e, x), sin_half_pi(e, e.sub(one, x))
    c = e.mul(cosine, cosine)
    c1 = e.neg(e.mul(slope, e.mul(sine, cosine)))
    c2 = e.mul(curvature, e.sub(e.mul(sine, sine), c))
    return Radial(q, q_low, *(b.select(outside, e.const(0.0), v) for v in (c, c1, c2)))


def over_pairs(
    e: Emitter,
    span: Sequence[Value],
    scratch: Value,
    prepare: Callable[[Value], Sequence[Value]],
    pair: Callable[[Value, Value, list[Value]], None],
    finish: Callable[[Value, Value], None],
) -> None:
    """For each block: prepare(p) gives vectors; pair(p, k, numbers) takes lane k; finish(p, n)."""
    b = e.builder
    first, last = span

    def block(p: Value, _: list[Value]) -> list[Value]:
        vectors = prepare(p)
        for k, vector in enumerate(vectors):
            e.store(vector, e.at(scratch, I64(k * MAX_LANES)))
        left = b.sub(last, p)
        count = b.select(b.icmp_signed("<", left, I64(e.lanes)), left, I64(e.lanes))

        def one(k: Value, _: list[Value]) -> list[Value]:
            places = (b.add(k, I64(j * MAX_LANES)) for j in range(len(vectors)))
            pair(b.add(p, k), k, [e.broadcast(e.at(scratch, place)) for place in places])
            return []

        e.loop(I64(0), count, 1, [], one)
        finish(p, count)
        return []

    e.loop(first, last, e.lanes, [], block)


def offset(
    e: Emitter, table: Table, nu: Value, q: Value, q_low: Value
) -> tuple[Value, Value, Value]:
    """u, t and sigma of the sensitivities from nu on."""
    high = e.sub(q, table.load(e, CENTRE, nu))
    low = e.sub(q_low, table.load(e, CENTRE_LOW, nu))
    u, sigma = e.add(high, low), table.load(e, SIGMA, nu)
    return u, e.mul(sigma, u), sigma


def where_felt(
    e: Emitter,
    t: Value,
    carried: Sequence[Value],
    felt: Callable[[Value], Sequence[Value]],
    silent: Callable[[], None],
) -> list[Value]:
    """carried = felt(G) where a lane of G is not zero; else silent(), and carried stays."""
    b = e.builder
    exponent = e.mul(e.mul(t, t), e.const(-0.5 * _LOG2_E))
    limit = FAR * _LOG2_E
    far = b.fcmp_ordered("<=", exponent, e.const(limit))
    bits = ir.IntType(e.lanes)
    some = b.icmp_signed("!=", b.bitcast(far, bits), ir.Constant(bits, -1))
    with b.if_else(some) as (then, otherwise):
        with then:
            gaussian = b.select(far, e.const(0.0), exp2(e, exponent, -limit + 1.0))
            updated = felt(gaussian)
            after_then = b.block
        with otherwise:
            silent()
            after_otherwise = b.block
    merged = []
    for old, new in zip(carried, updated, strict=True):
        phi = b.phi(old.type)
        phi.add_incoming(new, after_then)
        phi.add_incoming(old, after_otherwise)
        merged.append(phi)
    return merged


def lane_totals(e: Emitter, scratch: Value) -> Value:
    """Lane k is the sum over vector N_ROW + k of the scratch."""
    places = (I64((N_ROW + k) * MAX_LANES) for k in range(e.lanes))
    vectors = [e.load(e.at(scratch, place)) for place in places]
    while len(vectors) > 1:
        couples = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [e.add_neighbours(a, b) for a, b in couples]
    return vectors[0]


def store_row_total(e: Emitter, scratch: Value, k: Value, total: Value) -> None:
    """What `lane_totals` sums for pair k of the block."""
    b = e.builder
    e.store(total, e.at(scratch, b.mul(b.add(k, I64(N_ROW)), I64(MAX_LANES))))


def store_totals(e: Emitter, scratch: Value, out: Value, p: Value, count: Value) -> None:
    """One sum for each pair of a block."""
    e.store(lane_totals(e, scratch), e.at(out, p), e.head_mask(count))
