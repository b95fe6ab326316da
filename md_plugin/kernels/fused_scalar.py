"""Fused kernels of a scalar interaction layer.

    env[i, nu, a] = sum_p s_nu(r_p) z[j, a],    j = sender(p)                           (forward)

and from ge = dE/denv                                                                  (backward)

    w_p[a]   = sum_nu s_nu(r_p)  ge[i, nu, a]         message:     dE/dz[j, a] += w_p[a]
    w'_p[a]  = sum_nu s'_nu(r_p) ge[i, nu, a]         pair force:  g_p = (w'_p . z[j]) r_hat

In a first layer z is one-hot: env[i, nu, k] sums s_nu over neighbours of species k.

env is summed in register tiles [nu x features]; the backward pass keeps w and w' of two pairs in
registers.
"""

from __future__ import annotations

from typing import Any

from md_plugin.kernels.fused_forces import radial_forces
from md_plugin.kernels.fused_radial import N_BIN, NU_BLOCK
from md_plugin.kernels.fused_row import AHEAD, CUT, GR, SENSE, Row, each_row, sender_of
from md_plugin.kernels.fused_tiles import (
    Tile,
    each_tile,
    gaussian,
    lane_sums,
    pairs_of,
    radial,
    sense_block,
    sense_rows,
    slope,
)
from md_plugin.kernels.vector_ir import I64, Emitter, Value, microkernel

Group = list[Value]


@microkernel
def forward_rows(e: Emitter, table: Group, where: Group, space: Group, layer: Group) -> None:
    """Write env; layer: z, env, begin, first, last."""
    row = Row(e, *table, *where, *space)
    z, env, *span = layer

    def body(i: Value, at: Value, n: Value) -> None:
        radial(row, n, slopes=False)
        _env_row(row, z, e.at(env, at))

    each_row(row, span, e.builder.mul(row.n_nu, row.n_feat), body)


@microkernel
def backward_rows(
    e: Emitter, table: Group, where: Group, space: Group, target: Group, layer: Group
) -> None:
    """Add to dz and the target (see `fused_forces`); layer: z, ge, dz, begin, first, last."""
    row = Row(e, *table, *where, *space)
    z, ge, dz, *span = layer

    def body(i: Value, at: Value, n: Value) -> None:
        radial(row, e.builder.add(n, I64(1)), slopes=True)
        sense_rows(row, slopes=True)
        mine = e.at(ge, at)
        each_tile(row, lambda tile: _pairs_tile(tile, mine, z, dz, n))
        _radial_gradient(row, n)
        radial_forces(row, n, i, target)

    each_row(row, span, e.builder.mul(row.n_nu, row.n_feat), body)


@microkernel
def forward_species_rows(
    e: Emitter, table: Group, where: Group, space: Group, layer: Group
) -> None:
    """Write env of one-hot features; layer: env, begin, first, last."""
    row = Row(e, *table, *where, *space)
    env, *span = layer

    def body(i: Value, at: Value, n: Value) -> None:
        radial(row, n, slopes=False)
        _each_species(row, e.at(env, at), lambda *one: _count_sense(row, *one))

    each_row(row, span, e.builder.mul(row.n_nu, row.n_feat), body)


@microkernel
def backward_species_rows(
    e: Emitter, table: Group, where: Group, space: Group, target: Group, layer: Group
) -> None:
    """Add to the target, see `fused_forces`; layer: ge, begin, first, last."""
    row = Row(e, *table, *where, *space)
    ge, *span = layer

    def body(i: Value, at: Value, n: Value) -> None:
        radial(row, n, slopes=True)
        _clear_gradient(row, n)
        _each_species(row, e.at(ge, at), lambda *one: _count_slope(row, *one))
        radial_forces(row, n, i, target)

    each_row(row, span, e.builder.mul(row.n_nu, row.n_feat), body)


def _env_row(row: Row, z: Value, mine: Value) -> None:
    """A block of sensitivities at a time; mine: the receiver's tile of env."""
    e, b = row.e, row.e.builder
    n_block = b.sdiv(row.n_table, I64(NU_BLOCK))

    def block(k: Value, _: Any) -> Group:
        span = pairs_of(row, row.block_reach, n_block, k)
        nu0 = b.mul(k, I64(NU_BLOCK))
        sense_block(row, nu0, *span)
        each_tile(row, lambda tile: _env_tile(tile, z, mine, nu0, span))
        return []

    e.loop(I64(0), n_block, 1, [], block)


def _env_tile(tile: Tile, z: Value, mine: Value, nu0: Value, span: tuple[Value, Value]) -> None:
    row, e, b, m = tile.row, tile.row.e, tile.row.e.builder, tile.size

    def body(p: Value, sums: Group) -> Group:
        features = tile.load(tile.of(z, sender_of(row, p)))
        updated = []
        for k in range(NU_BLOCK):
            weight = e.broadcast(e.at(row.number(SENSE + k), p))
            for v in range(m):
                updated.append(e.fma(weight, features[v], sums[k * m + v]))
        return updated

    sums = e.loop(*span, 1, tile.zeros(NU_BLOCK), body)
    for k in range(NU_BLOCK):
        nu = b.add(nu0, I64(k))
        with e.when(b.icmp_signed("<", nu, row.n_nu)):
            tile.store(sums[k * m : (k + 1) * m], tile.of(mine, nu))


def _pairs_tile(tile: Tile, mine: Value, z: Value, dz: Value, n: Value) -> None:
    """w and w' of sorted pairs, two at a time: part[p] += w' * z[j] by lanes, dz[j] += w."""
    row, e, b, m = tile.row, tile.row.e, tile.row.e.builder, tile.size

    def body(p: Value, _: Any) -> Group:
        low, high = _window_of_two(row, p)
        _prefetch(tile, mine, z, dz, p)

        def inner(nu: Value, sums: Group) -> Group:
            loaded = tile.load(tile.of(mine, nu))
            at = b.add(b.mul(nu, row.capacity), p)
            weights = [
                e.broadcast(e.at(x, b.add(at, I64(k))))
                for k in range(2)
                for x in (row.number(SENSE), row.slopes)
            ]
            scaled = [(weight, t) for weight in weights for t in loaded]
            return [e.fma(weight, t, a) for (weight, t), a in zip(scaled, sums, strict=True)]

        sums = e.loop(low, high, 1, tile.zeros(4), inner)
        for k in range(2):
            at = b.add(p, I64(k))
            j = sender_of(row, at)
            w, dw = sums[2 * k * m : (2 * k + 1) * m], sums[(2 * k + 1) * m : (2 * k + 2) * m]
            tile.add_product((dw, tile.load(tile.of(z, j))), at)
            address = tile.of(dz, j)
            before = tile.load(address)
            tile.store([e.add(x, y) for x, y in zip(before, w, strict=True)], address)
        return []

    e.loop(I64(0), n, 2, [], body)


def _window_of_two(row: Row, p: Value) -> tuple[Value, Value]:
    """First sensitivity that pair p or p + 1 touches, and one past the last."""
    e, b = row.e, row.e.builder
    keys = [e.index(row.bins, b.add(p, I64(k))) for k in range(2)]
    low = [e.index(row.window, key) for key in keys]
    high = [e.index(row.window, b.add(key, I64(N_BIN + 1))) for key in keys]
    return (
        b.select(b.icmp_signed("<", *low), *low),
        b.select(b.icmp_signed(">", *high), *high),
    )


def _prefetch(tile: Tile, mine: Value, z: Value, dz: Value, p: Value) -> None:
    """Lines of the next row of ge, and of z and dz of a pair that comes soon."""
    row, e, b = tile.row, tile.row.e, tile.row.e.builder
    following = b.mul(row.n_nu, row.n_feat)
    for k in range(4):
        line = b.mul(b.add(b.shl(p, I64(1)), I64(k)), I64(e.lanes))
        e.prefetch(e.at(mine, b.add(following, line)))
    for k in range(2):
        j = sender_of(row, b.add(p, I64(AHEAD + k)))
        tile.prefetch([z, dz], j)


def _radial_gradient(row: Row, n: Value) -> None:
    """dE/dr of each pair from `part`."""
    e = row.e

    def body(p: Value, _: Any) -> Group:
        e.store(lane_sums(row, p), e.at(row.number(GR), p))
        return []

    e.loop(I64(0), n, e.lanes, [], body)


# ---- one-hot features ----------------------------------------------------------------------------


def _each_species(row: Row, mine: Value, body: Any) -> None:
    """body(nu, address in the receiver's tile, start, stop) for each sensitivity and species."""
    e, b = row.e, row.e.builder

    def each_nu(nu: Value, _: Any) -> Group:
        def each_species(k: Value, _: Any) -> Group:
            start, stop = pairs_of(row, row.reach, row.n_nu, nu, b.mul(k, I64(N_BIN)))
            body(nu, e.at(mine, b.add(b.mul(nu, row.n_feat), k)), start, stop)
            return []

        e.loop(I64(0), row.n_feat, 1, [], each_species)
        return []

    e.loop(I64(0), row.n_nu, 1, [], each_nu)


def _count_sense(row: Row, nu: Value, target: Value, start: Value, stop: Value) -> None:
    """target = sum of s_nu over a range of sorted pairs."""
    e, b = row.e, row.e.builder

    def body(p: Value, sums: Group) -> Group:
        value, _ = gaussian(row, nu, p)
        s = e.mul(value, e.load(e.at(row.number(CUT), p)))
        return [e.add(sums[0], b.select(e.head_mask(b.sub(stop, p)), s, e.const(0.0)))]

    (sums,) = e.loop(start, stop, e.lanes, [e.const(0.0)], body)
    e.store_scalar(e.total(sums), target)


def _count_slope(row: Row, nu: Value, source: Value, start: Value, stop: Value) -> None:
    """dE/dr of a range of sorted pairs += s'_nu(r_p) ge[nu, species]."""
    e, b = row.e, row.e.builder
    weight = e.broadcast(source)

    def body(p: Value, _: Any) -> Group:
        value, y = gaussian(row, nu, p)
        address = e.at(row.number(GR), p)
        gr = e.fma(weight, slope(row, nu, p, value, y), e.load(address))
        e.store(gr, address, e.head_mask(b.sub(stop, p)))
        return []

    e.loop(start, stop, e.lanes, [], body)


def _clear_gradient(row: Row, n: Value) -> None:
    e = row.e

    def body(p: Value, _: Any) -> Group:
        e.store(e.const(0.0), e.at(row.number(GR), p))
        return []

    e.loop(I64(0), n, e.lanes, [], body)
