"""Fused kernels of a tensor interaction layer, of order 0 to 3: weights first, then the sum.

    q[j, nu, b] = sum_a V[nu, a, b] z[j, a]                                  a product of the caller
    m[i, c, b]  = sum_p t_c(p) u_p[b],    u_p[b] = sum_nu s_nu(r_p) q[j, nu, b]           (forward)

    t = 1;  r_hat;  r_hat r_hat^T - 1/3 as xx, xy, xz, yy, yz;
        r_hat r_hat r_hat without its traces as xxx, xxy, xxz, xyy, xyz, yyy, yyz

and from g = dE/dm, with y_p[b] = sum_c t_c(p) g[i, c, b]                                (backward)

    dE/dq[j, nu, b] += s_nu(r_p) y_p[b]
    dE/dr_p = sum_nu s'_nu q[j, nu] . y_p           dE/dt_c = u_p . g[i, c]
    pair force = dE/dr r_hat + (dE/dt - (dE/dt . r_hat) r_hat) / r

Contracting with V before the sum over neighbours makes that product as cheap as in a scalar layer,
and a pair touches its window of sensitivities only. In a first layer q belongs to the species of
the sender, and has no gradient.
"""

from __future__ import annotations

from typing import Any

from md_plugin.kernels.fused_forces import tensor_forces
from md_plugin.kernels.fused_radial import N_BIN
from md_plugin.kernels.fused_row import SENSE, Q, Row, each_row, sender_of, unpack
from md_plugin.kernels.fused_tiles import Tile, each_tile, radial, sense_rows
from md_plugin.kernels.vector_ir import I64, Emitter, Value, microkernel

Group = list[Value]


@microkernel
def tensor_forward_rows(
    e: Emitter, table: Group, where: Group, space: Group, n_comp: int, layer: Group
) -> None:
    """Write m; layer: q, m, whether q is of species, begin, first, last."""
    row = Row(e, *table, *where, *space)
    q, mixed, shared, *span = layer
    # Sums of all components must stay in registers.
    wide = {1: e.wide, 4: e.wide, 9: e.wide // 2, 16: 1}[n_comp]

    def body(i: Value, at: Value, n: Value) -> None:
        radial(row, n, slopes=False)
        sense_rows(row, slopes=False)
        _owners(row, n, shared)
        _components(row, n, n_comp)
        each_tile(row, lambda tile: _mixed_tile(tile, q, e.at(mixed, at), n, n_comp), wide)

    each_row(row, span, e.builder.mul(row.n_feat, I64(n_comp)), body)


@microkernel
def tensor_backward_rows(
    e: Emitter, table: Group, where: Group, space: Group, n_comp: int, layer: Group
) -> None:
    """Add to the target and dq; layer: target (see `fused_forces`), q, g, dq, begin, first, last.

    Without dq, q is of species.
    """
    row = Row(e, *table, *where, *space)
    target, (q, g, *dq) = layer[:4], layer[4:-3]

    def body(i: Value, at: Value, n: Value) -> None:
        radial(row, n, slopes=True)
        sense_rows(row, slopes=True)
        _owners(row, n, I64(0 if dq else 1))
        _components(row, n, n_comp)
        mine = e.at(g, at)
        each_tile(row, lambda tile: _gradient_tile(tile, mine, [q, *dq], n, n_comp))
        tensor_forces(row, n, i, target, n_comp)

    each_row(row, layer[-3:], e.builder.mul(row.n_feat, I64(n_comp)), body)


def _owners(row: Row, n: Value, shared: Value) -> None:
    """keys[p] = the row of q of sorted pair p: of the sender, or of its species where shared."""
    e, b = row.e, row.e.builder

    def body(p: Value, by_species: bool) -> Group:
        j = sender_of(row, p)
        e.store_index(e.index(row.species, j) if by_species else j, row.keys, p)
        return []

    with b.if_else(b.icmp_signed("!=", shared, I64(0))) as (then, otherwise):
        with then:
            e.loop(I64(0), n, 1, [], lambda p, _: body(p, True))
        with otherwise:
            e.loop(I64(0), n, 1, [], lambda p, _: body(p, False))


def _component(row: Row, c: int) -> Value:
    """Pointer to t_c of the sorted pairs, c > 0: behind s and its slopes."""
    e, b = row.e, row.e.builder
    number = b.add(b.shl(row.n_nu, I64(1)), I64(SENSE + c - 1))
    return e.at(row.floats, b.mul(row.capacity, number))


def _components(row: Row, n: Value, n_comp: int) -> None:
    e = row.e

    def body(p: Value, _: Any) -> Group:
        inverse = e.load(e.at(row.number(Q), p))
        x, y, z = (e.mul(inverse, d) for d in unpack(e, row.pairs, p)[:3])
        values = [x, y, z]
        if n_comp > 4:
            third = e.const(-1.0 / 3.0)
            products = e.mul(x, y), e.mul(x, z), e.fma(y, y, third), e.mul(y, z)
            values += [e.fma(x, x, third), *products]
        if n_comp > 9:
            # Traces of r r r: 1/5 for each pair of equal indices.
            xx, yy = (e.sub(e.mul(d, d), e.const(0.2)) for d in (x, y))
            most = (e.sub(square, e.const(0.4)) for square in (xx, yy))
            xxx, yyy = (e.mul(d, rest) for d, rest in zip((x, y), most, strict=True))
            mixed = e.mul(x, yy), e.mul(e.mul(x, y), z)
            values += [xxx, e.mul(xx, y), e.mul(xx, z), *mixed, yyy, e.mul(yy, z)]
        for c, value in enumerate(values, start=1):
            e.store(value, e.at(_component(row, c), p))
        return []

    if n_comp > 1:
        e.loop(I64(0), n, e.lanes, [], body)


def _window(row: Row, p: Value) -> tuple[Value, Value]:
    """First sensitivity that pair p touches, and one past the last."""
    e = row.e
    key = e.index(row.bins, p)
    return e.index(row.window, key), e.index(row.window, e.builder.add(key, I64(N_BIN + 1)))


def _mixed_tile(tile: Tile, q: Value, mine: Value, n: Value, n_comp: int) -> None:
    """The sums over pairs stay in registers; mine: the receiver's tile of m."""
    row, e, b, m = tile.row, tile.row.e, tile.row.e.builder, tile.size

    def body(p: Value, sums: Group) -> Group:
        first = b.mul(e.index(row.keys, p), row.n_nu)

        def inner(nu: Value, u: Group) -> Group:
            loaded = tile.load(tile.of(q, b.add(first, nu)))
            at = b.add(b.mul(nu, row.capacity), p)
            weight = e.broadcast(e.at(row.number(SENSE), at))
            return [e.fma(weight, t, x) for t, x in zip(loaded, u, strict=True)]

        u = e.loop(*_window(row, p), 1, tile.zeros(1), inner)
        updated = [e.add(x, y) for x, y in zip(sums[:m], u, strict=True)]
        for c in range(1, n_comp):
            t = e.broadcast(e.at(_component(row, c), p))
            before = sums[c * m : (c + 1) * m]
            updated += [e.fma(t, x, y) for x, y in zip(u, before, strict=True)]
        return updated

    sums = e.loop(I64(0), n, 1, tile.zeros(n_comp), body)
    for c in range(n_comp):
        tile.store(sums[c * m : (c + 1) * m], tile.of(mine, I64(c)))


def _gradient_tile(tile: Tile, mine: Value, sent: Group, n: Value, n_comp: int) -> None:
    """dq[j, nu] += s_nu y; part[0, p] += s' q . y; part[c, p] += s q . g_c, by lanes.

    sent: q and, where it is wanted, dq.
    """
    row, e, b, m = tile.row, tile.row.e, tile.row.e.builder, tile.size

    def body(p: Value, _: Any) -> Group:
        first = b.mul(e.index(row.keys, p), row.n_nu)
        soon = b.mul(e.index(row.keys, b.add(p, I64(2))), row.n_nu)
        y = _along_components(tile, mine, p, n_comp)

        def inner(nu: Value, sums: Group) -> Group:
            at = b.add(b.mul(nu, row.capacity), p)
            s, ds = (e.broadcast(e.at(x, at)) for x in (row.number(SENSE), row.slopes))
            number = b.add(first, nu)
            loaded = tile.load(tile.of(sent[0], number))
            for dq in sent[1:]:
                # A pair that comes soon has about the same window.
                tile.prefetch(sent, b.add(soon, nu))
                address = tile.of(dq, number)
                before = tile.load(address)
                tile.store([e.fma(s, a, x) for a, x in zip(y, before, strict=True)], address)
            u = [e.fma(s, x, a) for x, a in zip(loaded, sums[:m], strict=True)]
            du = [e.fma(ds, x, a) for x, a in zip(loaded, sums[m:], strict=True)]
            return u + du

        sums = e.loop(*_window(row, p), 1, tile.zeros(2), inner)
        tile.add_product((sums[m:], y), p)
        for c in range(1, n_comp):
            tile.add_product((sums[:m], tile.load(tile.of(mine, I64(c)))), p, c)
        return []

    e.loop(I64(0), n, 1, [], body)


def _along_components(tile: Tile, mine: Value, p: Value, n_comp: int) -> Group:
    """y = sum over c of t_c g[i, c]; mine: the receiver's tile of g."""
    row, e = tile.row, tile.row.e
    y = tile.load(tile.of(mine, I64(0)))
    for c in range(1, n_comp):
        t = e.broadcast(e.at(_component(row, c), p))
        loaded = tile.load(tile.of(mine, I64(c)))
        y = [e.fma(t, x, a) for x, a in zip(loaded, y, strict=True)]
    return y
