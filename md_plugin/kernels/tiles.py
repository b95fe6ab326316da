"""Register tiles: the inner loops of the three sums on the CPU.

    env_tile    env[i, nu : nu + 5, a : a + m L] = sum over first <= p < last of sense features
    sense_row   sense[p : p + 10, nu : nu + L]   = sum over a of turned features
    sense_tile  sense[p : p + 4, nu : nu + 4]    = sum over a of env features
    feat_tile   features[j, a : a + m L]        += sum over nu < high of sense env, for 4 pairs
    turn_tile   turned[a : a + L, :]             = env[i, nu : nu + L, a : a + L] transposed

LLVM does not keep the sums of such loops in registers by itself, because the arrays might overlap.
Here they are values of its intermediate language (phi nodes), so that they must be.

A tile is m vectors of L lanes wide, all full; an `edge` is one vector, of which lanes beyond n_feat
are neither read nor written. Where fewer sensitivities or pairs are left than a tile holds, it
computes the last one several times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from md_plugin.kernels import simd
from md_plugin.kernels.simd import I64, Arrays, Values, registers

FILES = (Path(__file__), Path(simd.__file__))  # see `compiled`

ENV_SENSES = 5  # of an env tile: 5 x 4 sums, 4 features and a factor in 32 registers
FEAT_PAIRS = 4
TILE_SENSES = 4  # of a sense tile
ROW_PAIRS = 10
# Features that are summed on their own first: one sum of 64 would round off four times as much.
CHUNK = 16
# One vector per row, so more rows: an addition takes 4 cycles, in which 7 others can start.
EDGE_SENSES, EDGE_PAIRS = 10, 8


def _tile(emit: Callable[..., None], *constants: int) -> Any:
    """An intrinsic tile(arrays, integers) -> None, written by emit(arrays, *constants)."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typing_context: Any, arrays: Any, integers: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(Arrays(context, builder, signature, args), *constants)
            return context.get_dummy_value()

        return types.void(arrays, integers), generate

    return tile


@intrinsic  # type: ignore[untyped-decorator]
def tile_sizes(typing_context: Any, array: Any) -> Any:
    """tile_sizes(array) -> (lanes, features of a tile, pairs of a sense tile), constants."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes, wide, pairs = registers(context, array.dtype)
        sizes = [I64(size) for size in (lanes, lanes * wide, pairs)]
        return context.make_tuple(builder, signature.return_type, sizes)

    return types.UniTuple(types.int64, 3)(array), generate


@intrinsic  # type: ignore[untyped-decorator]
def last_used(typing_context: Any, arrays: Any, integers: Any) -> Any:
    """last_used((sense,), (first, last, nu)) -> q + 1 of the last non-zero sense[..., nu + q].

    Of pairs first .. last - 1 and q < L; 0 where all are zero.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = Arrays(context, builder, signature, args)
        c, (first, last, nu), n_nu = found.code, found.integers, found.shapes[0][1]
        whole = ir.VectorType(ir.IntType(8 * c.size), c.lanes)

        def join(p: Any, bits: Values, mask: Any = None) -> Values:
            row = c.load(found.data[0], c.at((p, n_nu), nu), mask)
            return [c.b.or_(bits[0], c.b.bitcast(row, whole))]

        # One loop or the other: masks are slow on CPUs without them.
        end = c.b.select(c.is_full(nu, n_nu), last, first)
        bits = c.loop((first, end, 1), [ir.Constant(whole, None)], join)
        mask = c.mask(c.b.sub(n_nu, nu))
        (bits,) = c.loop((end, last, 1), bits, lambda p, values: join(p, values, mask))
        used = c.b.icmp_unsigned("!=", bits, ir.Constant(whole, None))
        flat = c.b.zext(c.b.bitcast(used, ir.IntType(c.lanes)), I64)
        return c.b.sub(I64(64), c.b.ctlz(flat, ir.IntType(1)(0)))

    return types.int64(arrays, integers), generate


def _emit_env(arrays: Arrays, is_edge: bool) -> None:
    c, (env, sense, features, sender) = arrays.code, arrays.data
    i, nu, a, first, last = arrays.integers
    _, n_nu, n_feat = arrays.shapes[0]
    n_vector = 1 if is_edge else c.wide
    mask = c.mask(c.b.sub(n_feat, a)) if is_edge else None
    columns = [c.at(a, I64(v * c.lanes)) for v in range(n_vector)]
    end = c.at(n_nu, I64(-1))
    nus = [c.least(c.at(nu, I64(q)), end) for q in range(EDGE_SENSES if is_edge else ENV_SENSES)]

    def add(p: Any, sums: Values) -> Values:
        row = c.at((c.index(sender, p), n_feat))
        z = [c.load(features, c.at(row, column), mask) for column in columns]
        s = [c.splat(c.scalar(sense, c.at((p, n_nu), nu))) for nu in nus]
        pairs = [(x, y) for x in s for y in z]
        return [c.fma(x, y, total) for (x, y), total in zip(pairs, sums, strict=True)]

    sums = iter(c.loop((first, last, 1), [c.zero] * (len(nus) * n_vector), add))
    for nu in nus:
        for column in columns:
            c.store(next(sums), env, c.at((i, n_nu, n_feat), (nu, n_feat), column), mask)


def _emit_sense(arrays: Arrays) -> None:
    c, (sense, env, features, sender) = arrays.code, arrays.data
    i, nu, p, last = arrays.integers
    _, n_nu, n_feat = arrays.shapes[1]
    base = c.least(nu, c.at(n_nu, I64(-TILE_SENSES)))
    base = c.b.select(c.b.icmp_signed("<", base, I64(0)), I64(0), base)
    nus = [c.least(c.at(base, I64(q)), c.at(n_nu, I64(-1))) for q in range(TILE_SENSES)]
    pairs = [c.least(c.at(p, I64(r)), c.at(last, I64(-1))) for r in range(c.pairs)]
    rows = [c.at((c.index(sender, pair), n_feat)) for pair in pairs]
    tile = [c.at((i, n_nu, n_feat), (q, n_feat)) for q in nus]

    def add(a: Any, sums: Values, mask: Any = None) -> Values:
        z = [c.load(features, c.at(row, a), mask) for row in rows]
        e = [c.load(env, c.at(row, a), mask) for row in tile]
        factors = [(x, y) for x in z for y in e]
        return [c.fma(x, y, total) for (x, y), total in zip(factors, sums, strict=True)]

    full = c.b.and_(n_feat, I64(-c.lanes))
    sums = c.loop((I64(0), full, c.lanes), [c.zero] * (c.pairs * TILE_SENSES), add)
    mask = c.mask(c.b.sub(n_feat, full))
    sums = c.loop((full, n_feat, c.lanes), sums, lambda a, values: add(a, values, mask))
    totals = [c.lane_sums(sums[g : g + c.lanes]) for g in range(0, len(sums), c.lanes)]
    with c.b.if_else(c.b.icmp_signed(">=", n_nu, I64(TILE_SENSES))) as (whole, narrow):
        for branch, width in ((whole, min(c.lanes, TILE_SENSES)), (narrow, 1)):
            with branch:
                for k in range(0, len(sums), width):
                    value = c.part(totals[k // c.lanes], k % c.lanes, width)
                    row = c.at((pairs[k // TILE_SENSES], n_nu), nus[k % TILE_SENSES])
                    c.store(value, sense, row)


def _emit_turn(arrays: Arrays, is_edge: bool) -> None:
    c, (turned, env) = arrays.code, arrays.data
    i, nu, a = arrays.integers
    _, n_nu, n_feat = arrays.shapes[1]
    nus = [c.least(c.at(nu, I64(q)), c.at(n_nu, I64(-1))) for q in range(c.lanes)]
    mask = c.mask(c.b.sub(n_feat, a)) if is_edge else None
    rows = [c.load(env, c.at((i, n_nu, n_feat), (q, n_feat), a), mask) for q in nus]
    for l, column in enumerate(c.turn(rows)):
        c.store(column, turned, c.at((a, I64(c.lanes)), I64(l * c.lanes)))


def _emit_row(arrays: Arrays) -> None:
    c, (sense, turned, features, sender) = arrays.code, arrays.data
    nu, p, last = arrays.integers
    n_nu, n_feat = arrays.shapes[0][1], arrays.shapes[2][1]
    pairs = [c.least(c.at(p, I64(r)), c.at(last, I64(-1))) for r in range(ROW_PAIRS)]
    rows = [c.at((c.index(sender, pair), n_feat)) for pair in pairs]

    def add(a: Any, sums: Values) -> Values:
        e = c.load(turned, c.at((a, I64(c.lanes))))
        z = [c.splat(c.scalar(features, c.at(row, a))) for row in rows]
        return [c.fma(x, e, total) for x, total in zip(z, sums, strict=True)]

    def add_chunk(a: Any, totals: Values) -> Values:
        sums = [c.zero] * ROW_PAIRS
        for k in range(CHUNK):
            sums = add(c.at(a, I64(k)), sums)
        return [c.b.fadd(x, y) for x, y in zip(totals, sums, strict=True)]

    full = c.b.and_(n_feat, I64(-CHUNK))
    sums = c.loop((I64(0), full, CHUNK), [c.zero] * ROW_PAIRS, add_chunk)
    sums = c.loop((full, n_feat, 1), sums, add)
    part = c.mask(c.b.sub(n_nu, nu))
    with c.b.if_else(c.is_full(nu, n_nu)) as (full_row, part_row):
        for branch, mask in ((full_row, None), (part_row, part)):
            with branch:
                for pair, value in zip(pairs, sums, strict=True):
                    c.store(value, sense, c.at((pair, n_nu), nu), mask)


def _emit_feat(arrays: Arrays, is_edge: bool, n_pair: int) -> None:
    c, (features, env, sense, sender) = arrays.code, arrays.data
    i, p, last, a, low, high = arrays.integers
    _, n_nu, n_feat = arrays.shapes[1]
    n_vector = 1 if is_edge else c.wide
    mask = c.mask(c.b.sub(n_feat, a)) if is_edge else None
    columns = [c.at(a, I64(v * c.lanes)) for v in range(n_vector)]
    end = c.at(last, I64(-1))
    pairs = [c.least(c.at(p, I64(r)), end) for r in range(n_pair)]

    def add(nu: Any, sums: Values) -> Values:
        row = c.at((i, n_nu, n_feat), (nu, n_feat))
        e = [c.load(env, c.at(row, column), mask) for column in columns]
        s = [c.splat(c.scalar(sense, c.at((pair, n_nu), nu))) for pair in pairs]
        factors = [(x, y) for x in s for y in e]
        return [c.fma(x, y, total) for (x, y), total in zip(factors, sums, strict=True)]

    sums = c.loop((low, high, 1), [c.zero] * (n_pair * n_vector), add)
    for r, pair in enumerate(pairs):
        with c.b.if_then(c.b.icmp_signed("<", c.at(p, I64(r)), last)):
            # Read only now: pairs of one tile may share a sender.
            row = c.at((c.index(sender, pair), n_feat))
            for column, value in zip(columns, sums[r * n_vector :], strict=False):
                place = c.at(row, column)
                c.store(c.b.fadd(c.load(features, place, mask), value), features, place, mask)


env_tile, env_edge = _tile(_emit_env, False), _tile(_emit_env, True)
sense_tile = _tile(_emit_sense)
turn_tile, turn_edge = _tile(_emit_turn, False), _tile(_emit_turn, True)
sense_row = _tile(_emit_row)
feat_tile, feat_edge = _tile(_emit_feat, False, FEAT_PAIRS), _tile(_emit_feat, True, EDGE_PAIRS)
pair_tile, pair_edge = _tile(_emit_feat, False, 1), _tile(_emit_feat, True, 1)
