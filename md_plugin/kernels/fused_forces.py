"""The end of a row in a backward pass: forces of both atoms of each pair, virials, closest pair.

What is here emits IR. A target is what a row adds to, all float64: forces (n_send, 4); sums
(N_SUM,), the virial, row by row, and the smallest r^2; virials (n_send, 3, 4) of atoms, half of
each pair's -r (x) g to each of its two atoms; and whether these are wanted.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from md_plugin.kernels.fused_row import DCUT, GR, Q, Row, sender_of, unpack
from md_plugin.kernels.fused_tiles import lane_sums
from md_plugin.kernels.vector_ir import F64, I32, I64, Emitter, Value

N_SUM = 10


def radial_forces(row: Row, n: Value, i: Value, target: list[Value]) -> None:
    """Of pair forces dE/dr r_hat, from row GR."""
    e, b = row.e, row.e.builder

    def body(p: Value, before: list[Value]) -> list[Value]:
        address = e.at(row.number(GR), p)
        inside = e.head_mask(b.sub(n, p))
        factor = e.mul(e.load(address, inside), e.load(e.at(row.number(Q), p)))
        e.store(factor, address)
        x, y, z, r2 = unpack(e, row.pairs, p)
        fx, fy, fz = (e.mul(factor, d) for d in (x, y, z))
        terms = ((fx, x), (fx, y), (fx, z), (fy, y), (fy, z), (fz, z))
        closest = _closest(row, r2, inside, before[-1])
        added = [e.fma(f, d, total) for (f, d), total in zip(terms, before[:-1], strict=True)]
        return [*added, closest]

    xx, xy, xz, yy, yz, zz, closest = _over_pairs(row, n, 6, body)
    _add_sums(row, [xx, xy, xz, xy, yy, yz, xz, yz, zz], closest, target[1])
    _scatter(row, n, i, target, _along)


def tensor_forces(row: Row, n: Value, i: Value, target: list[Value], n_comp: int) -> None:
    """Of pair forces dE/dr r_hat + (dE/dt - (dE/dt . r_hat) r_hat) / r, from `part`.

    Rows DCUT, DCUT + 1 and GR take the pair force.
    """
    e, b = row.e, row.e.builder
    rows = (DCUT, DCUT + 1, GR)

    def body(p: Value, before: list[Value]) -> list[Value]:
        inverse = e.load(e.at(row.number(Q), p))
        x, y, z, r2 = unpack(e, row.pairs, p)
        unit = [e.mul(inverse, d) for d in (x, y, z)]
        along = lane_sums(row, p)
        across = _unit_gradient(row, p, unit, n_comp)
        for u, t in zip(unit, across, strict=False):
            along = e.sub(along, e.mul(e.mul(t, u), inverse))
        inside = e.head_mask(b.sub(n, p))
        g = []
        for k in range(3):
            value = e.mul(along, unit[k])
            if across:
                value = e.fma(across[k], inverse, value)
            g.append(b.select(inside, value, e.const(0.0)))
            e.store(g[k], e.at(row.number(rows[k]), p))
        terms = [(d, f) for d in (x, y, z) for f in g]
        closest = _closest(row, r2, inside, before[-1])
        added = [e.fma(d, f, total) for (d, f), total in zip(terms, before[:-1], strict=True)]
        return [*added, closest]

    *virial, closest = _over_pairs(row, n, 9, body)
    _add_sums(row, virial, closest, target[1])
    _scatter(row, n, i, target, _stored)


def _unit_gradient(row: Row, p: Value, unit: list[Value], n_comp: int) -> list[Value]:
    """dE/dr_hat, as if its components were free, from dE/dt; nothing where t = 1 only."""
    e = row.e
    if n_comp == 1:
        return []
    gradient = [lane_sums(row, p, c) for c in (1, 2, 3)]
    if n_comp == 4:
        return gradient
    x, y, z = unit
    xx, xy, xz, yy, yz = (lane_sums(row, p, c) for c in range(4, 9))
    terms = (
        ((e.add(xx, xx), x), (xy, y), (xz, z)),
        ((xy, x), (e.add(yy, yy), y), (yz, z)),
        ((xz, x), (yz, y)),
    )
    _add_terms(e, gradient, terms)
    if n_comp > 9:
        _add_terms(
            e, gradient, _octupole_terms(e, unit, [lane_sums(row, p, c) for c in range(9, 16)])
        )
    return gradient


def _add_terms(e: Emitter, gradient: list[Value], terms: Any) -> None:
    """gradient[k] += the products of line k."""
    for k, line in enumerate(terms):
        for t, u in line:
            gradient[k] = e.fma(t, u, gradient[k])


def _octupole_terms(e: Emitter, unit: list[Value], of: list[Value]) -> Any:
    """Products that make sum_c of_c dt_c/dr_hat of the third order."""
    x, y, z = unit
    xxx, xxy, xxz, xyy, xyz, yyy, yyz = of
    fifth, three = e.const(-0.2), e.const(3.0)
    xx, yy, xy = e.fma(x, x, fifth), e.fma(y, y, fifth), e.mul(x, y)
    three_xx, three_yy = (e.mul(three, square) for square in (xx, yy))
    double = e.add(xy, xy), e.mul(e.add(x, x), z), e.mul(e.add(y, y), z)
    return (
        ((xxx, three_xx), (xxy, double[0]), (xxz, double[1]), (xyy, yy), (xyz, e.mul(y, z))),
        ((xxy, xx), (xyy, double[0]), (xyz, e.mul(x, z)), (yyy, three_yy), (yyz, double[2])),
        ((xxz, xx), (xyz, xy), (yyz, yy)),
    )


def _over_pairs(row: Row, n: Value, n_sum: int, body: Any) -> list[Value]:
    """n_sum sums of vectors, and the smallest r^2 of each lane."""
    e = row.e
    start = [e.const(0.0)] * n_sum + [e.const(float("inf"))]
    return e.loop(I64(0), n, e.lanes, start, body)


def _closest(row: Row, r2: Value, inside: Value, before: Value) -> Value:
    e = row.e
    return e.lesser(e.builder.select(inside, r2, e.const(float("inf"))), before)


def _add_sums(row: Row, virial: list[Value], closest: Value, sums: Value) -> None:
    e, b = row.e, row.e.builder
    done: dict[int, Value] = {}  # a symmetric virial names its sums twice
    for k, vector in enumerate(virial):
        address = e.at(sums, I64(k), F64)
        if id(vector) not in done:
            done[id(vector)] = e.widen(e.total(vector))
        e.store_scalar(b.fsub(e.load_scalar(address, F64), done[id(vector)]), address)
    address = e.at(sums, I64(N_SUM - 1), F64)
    nearest = e.lesser(e.widen(e.least(closest)), e.load_scalar(address, F64))
    e.store_scalar(nearest, address)


def _along(row: Row, p: Value) -> Value:
    """The pair force: row GR times the vector of the pair."""
    e, b = row.e, row.e.builder
    record = e.load_quad(e.at(row.pairs, b.shl(p, I64(2))))
    record = b.insert_element(record, ir.Constant(e.scalar, 0.0), I32(3))
    if e.size == 4:
        record = b.fpext(record, e.quad(F64))
    factor = b.insert_element(record, e.widen(e.load_scalar(e.at(row.number(GR), p))), I32(0))
    return b.fmul(e.shuffle(factor, factor, [0] * 4), record)


def _stored(row: Row, p: Value) -> Value:
    """The pair force, from rows DCUT, DCUT + 1, GR."""
    e, b = row.e, row.e.builder
    g = ir.Constant(e.quad(F64), None)
    for k, number in enumerate((DCUT, DCUT + 1, GR)):
        value = e.widen(e.load_scalar(e.at(row.number(number), p)))
        g = b.insert_element(g, value, I32(k))
    return g


def _scatter(row: Row, n: Value, i: Value, target: list[Value], pair_force: Any) -> None:
    """F[i] += g_p, F[j] -= g_p; and, where they are wanted, virials of atoms."""
    e, b = row.e, row.e.builder
    forces, _, virials, wanted = target

    def body(p: Value, before: list[Value]) -> list[Value]:
        g = pair_force(row, p)
        address = e.at(forces, b.shl(sender_of(row, p), I64(2)), F64)
        e.store(b.fsub(e.load_quad(address, F64), g), address)
        return [b.fadd(before[0], g)]

    (mine,) = e.loop(I64(0), n, 1, [ir.Constant(e.quad(F64), None)], body)
    address = e.at(forces, b.shl(i, I64(2)), F64)
    e.store(b.fadd(e.load_quad(address, F64), mine), address)
    with e.when(b.icmp_signed("!=", wanted, I64(0))):
        _scatter_virials(row, n, i, virials, pair_force)


def _scatter_virials(row: Row, n: Value, i: Value, virials: Value, pair_force: Any) -> None:
    """W[i] -= r_p (x) g_p / 2, W[j] -= r_p (x) g_p / 2."""
    e, b = row.e, row.e.builder
    quad = e.quad(F64)
    half = ir.Constant(quad, [0.5] * 4)

    def subtract(atom: Value, lines: list[Value]) -> None:
        for a, line in enumerate(lines):
            address = e.at(virials, b.add(b.mul(atom, I64(12)), I64(4 * a)), F64)
            e.store(b.fsub(e.load_quad(address, F64), line), address)

    def body(p: Value, before: list[Value]) -> list[Value]:
        g = b.fmul(half, pair_force(row, p))
        r = e.load_quad(e.at(row.pairs, b.shl(p, I64(2))))
        if e.size == 4:
            r = b.fpext(r, quad)
        lines = [b.fmul(e.shuffle(r, r, [a] * 4), g) for a in range(3)]
        subtract(sender_of(row, p), lines)
        return [b.fadd(x, y) for x, y in zip(before, lines, strict=True)]

    subtract(i, e.loop(I64(0), n, 1, [ir.Constant(quad, None)] * 3, body))
