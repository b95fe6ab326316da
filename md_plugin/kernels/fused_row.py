"""One row of pairs in a fused kernel: its vectors, in float64 until subtracted, sorted by r^2.

What is here emits IR. A histogram of r^2 sorts the pairs: a bin of it fixes the window of
sensitivities that a pair can touch, |sigma (1/r - 1/mu)| < reach, and each sensitivity owns a
contiguous range of the sorted pairs. Pairs beyond rcut drop out in the same pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llvmlite import ir

from md_plugin.kernels.fused_radial import N_BIN
from md_plugin.kernels.vector_ir import F64, I16, I32, I64, Emitter, Value

_HERE = Path(__file__).parent
# of all that writes code for a fused kernel, see `compiled`
FILES = sorted(_HERE.glob("fused_*.py")) + sorted(_HERE.glob("vector_*.py")) + [_HERE / "simd.py"]

AHEAD = 8  # pairs between the prefetch of features and their use
PAD = 16  # at least one vector of any type

# Rows of the float work space, `capacity` numbers each: 1/r, the cutoff function, its derivative,
# cutoff / r^2, dE/dr; then s of each sensitivity, then ds/dr of each.
Q, CUT, DCUT, CUTQ2, GR, SENSE = 0, 1, 2, 3, 4, 5


@dataclass(frozen=True, eq=False)
class Row:
    """Pointers to arrays, and sizes as 64-bit integers, of the thread at work."""

    e: Emitter
    # Tables: see RadialTable; n_table is the padded n_nu.
    gaussian: Value
    constants: Value
    window: Value
    reach: Value
    block_reach: Value
    # See fused_cpu.Geometry; shifted and by_species are flags.
    x: Value
    row_ptr: Value
    sender: Value
    translation: Value
    translations: Value
    species: Value
    # Work space of one row.
    floats: Value
    integers: Value
    records: Value
    starts: Value
    part: Value
    n_table: Value
    n_nu: Value
    n_feat: Value
    n_key: Value
    capacity: Value
    shifted: Value
    by_species: Value

    def number(self, k: int) -> Value:
        """Pointer to row k of the float work space: see Q, CUT, ..."""
        return self.e.at(self.floats, self.e.builder.mul(self.capacity, I64(k)))

    @property
    def keys(self) -> Value:
        """Keys of the pairs of the list; free once they are sorted."""
        return self.integers

    @property
    def bins(self) -> Value:
        """Keys of the sorted pairs."""
        return self.e.at(self.integers, self.capacity, I32)

    @property
    def pairs(self) -> Value:
        """The sorted records."""
        return self.e.at(self.records, self.e.builder.shl(self.capacity, I64(2)))

    @property
    def slopes(self) -> Value:
        """ds/dr, behind s in the float work space."""
        rows = self.e.builder.add(self.n_nu, I64(SENSE))
        return self.e.at(self.floats, self.e.builder.mul(rows, self.capacity))


def each_row(row: Row, span: Any, size: Value, body: Any) -> None:
    """body(i, element of i in arrays of `size` per atom, pairs within the cutoff).

    span: begin, the receiver of the arrays' first element; first and last + 1 of the rows.
    """
    begin, first, last = span
    b = row.e.builder

    def each(i: Value, _: Any) -> list[Value]:
        body(i, b.mul(b.sub(i, begin), size), _collect(row, i))
        return []

    row.e.loop(first, last, 1, [], each)


def _collect(row: Row, i: Value) -> Value:
    """Vectors of row i, sorted by key, into row.pairs; how many lie within the cutoff.

    A record is (x[j] - x[i], j), rounded, the index as raw bits. Its key is the bin of r^2, plus
    N_BIN times the species of the sender in a one-hot layer; pairs from rcut on have a key of
    their own, the last. starts[k] becomes the first pair of key k.
    """
    e, b = row.e, row.e.builder
    first = e.index(row.row_ptr, i)
    n = b.sub(e.index(row.row_ptr, b.add(i, I64(1))), first)
    with b.if_else(b.icmp_signed("!=", row.shifted, I64(0))) as (then, otherwise):
        with then:
            _vectors(row, i, first, n, True)
        with otherwise:
            _vectors(row, i, first, n, False)
    _keys(row, n)
    with e.when(b.icmp_signed("!=", row.by_species, I64(0))):
        _add_species(row, first, n)
    _count_keys(row, n)
    _sort(row, n)
    n = e.index(row.starts, row.n_key)
    _end(row, n)
    return n


def _vectors(row: Row, i: Value, first: Value, n: Value, shifted: bool) -> None:
    """records[k] = (x[j] - x[i] + translation, j) of list entry first + k."""
    e, b = row.e, row.e.builder
    mine = e.load_quad(e.at(row.x, b.shl(i, I64(2)), F64), F64)

    def body(k: Value, _: Any) -> list[Value]:
        p = b.add(first, k)
        j = e.index(row.sender, p)
        d = b.fsub(e.load_quad(e.at(row.x, b.shl(j, I64(2)), F64), F64), mine)
        if shifted:
            which = b.shl(e.index(row.translation, p, I16), I64(2))
            d = b.fadd(d, e.load_quad(e.at(row.translations, which, F64), F64))
        if e.size == 4:
            d = b.fptrunc(d, e.quad())
        bits = b.trunc(j, I32) if e.size == 4 else j
        record = b.insert_element(d, b.bitcast(bits, e.scalar), I32(3))
        e.store(record, e.at(row.records, b.shl(k, I64(2))))
        return []

    e.loop(I64(0), n, 1, [], body)


def _keys(row: Row, n: Value) -> None:
    """keys[k] = bin of r^2, n_key from rcut on; NaN is not outside, it lands in bin 0."""
    e, b = row.e, row.e.builder
    outside = e.splat(b.trunc(row.n_key, I32))
    per_bin = e.broadcast(e.at(row.constants, I64(2)))

    def body(k: Value, _: Any) -> list[Value]:
        position = e.mul(unpack(e, row.records, k)[3], per_bin)
        far = b.fcmp_ordered(">=", position, e.const(N_BIN))
        number = b.fcmp_ordered("<", position, e.const(N_BIN))
        key = b.fptosi(b.select(number, position, e.const(0.0)), outside.type)
        address = b.bitcast(e.at(row.keys, k, I32), outside.type.as_pointer())
        b.store(b.select(far, outside, key), address, align=4)
        return []

    e.loop(I64(0), n, e.lanes, [], body)


def unpack(e: Emitter, records: Value, k: Value) -> tuple[Value, Value, Value, Value]:
    """dx, dy, dz and r^2 of the records from k on."""
    dx, dy, dz, _ = e.load_records(e.at(records, e.builder.shl(k, I64(2))))
    return dx, dy, dz, e.fma(dx, dx, e.fma(dy, dy, e.mul(dz, dz)))


def sender_of(row: Row, p: Value) -> Value:
    """The sender of sorted pair p."""
    e, b = row.e, row.e.builder
    kind = e.integer
    j = e.load_scalar(e.at(row.pairs, b.add(b.shl(p, I64(2)), I64(3)), kind), kind)
    return b.sext(j, I64) if e.size == 4 else j


def _add_species(row: Row, first: Value, n: Value) -> None:
    e, b = row.e, row.e.builder

    def body(k: Value, _: Any) -> list[Value]:
        key = e.index(row.keys, k)
        kind = e.index(row.species, e.index(row.sender, b.add(first, k)))
        moved = b.add(key, b.mul(kind, I64(N_BIN)))
        e.store_index(b.select(b.icmp_signed("<", key, I64(N_BIN)), moved, key), row.keys, k)
        return []

    e.loop(I64(0), n, 1, [], body)


def _count_keys(row: Row, n: Value) -> None:
    """starts[k + 1] = how many pairs have a key below k."""
    e, b = row.e, row.e.builder

    def clear(k: Value, _: Any) -> list[Value]:
        e.store_index(I64(0), row.starts, k)
        return []

    def count(k: Value, _: Any) -> list[Value]:
        at = b.add(e.index(row.keys, k), I64(2))
        e.store_index(b.add(e.index(row.starts, at), I64(1)), row.starts, at)
        return []

    def add_up(k: Value, total: list[Value]) -> list[Value]:
        sum_ = b.add(total[0], e.index(row.starts, k))
        e.store_index(sum_, row.starts, k)
        return [sum_]

    e.loop(I64(0), b.add(row.n_key, I64(3)), 1, [], clear)
    e.loop(I64(0), n, 1, [], count)
    e.loop(I64(0), b.add(row.n_key, I64(2)), 1, [I64(0)], add_up)


def _sort(row: Row, n: Value) -> None:
    """Move the records to their places; starts[k + 1] moves on to the end of key k."""
    e, b = row.e, row.e.builder

    def body(k: Value, _: Any) -> list[Value]:
        key = e.index(row.keys, k)
        cursor = b.add(key, I64(1))
        to = e.index(row.starts, cursor)
        e.store_index(b.add(to, I64(1)), row.starts, cursor)
        e.store_index(key, row.bins, to)
        record = e.load_quad(e.at(row.records, b.shl(k, I64(2))))
        e.store(record, e.at(row.pairs, b.shl(to, I64(2))))
        return []

    e.loop(I64(0), n, 1, [], body)


def _end(row: Row, n: Value) -> None:
    """One vector of pairs and one more at (2 rcut, 0, 0) end the row.

    Their sensitivities and slopes are zero and all that is computed of them is finite, whatever an
    earlier row has left there; so the last vector of a row may be used as a whole, and kernels may
    take two pairs at a time.
    """
    e, b = row.e, row.e.builder
    beyond = e.load_scalar(e.at(row.constants, I64(3)))
    nothing = ir.Constant(e.quad(), None)
    quad = b.insert_element(nothing, beyond, I32(0))
    vector = e.shuffle(quad, nothing, [0, 1, 2, 3] * e.lanes)
    address = e.at(row.pairs, b.shl(n, I64(2)))
    e.store(vector, address)
    e.store(quad, e.at(address, I64(4 * e.lanes)))
    e.store_index(row.n_key, row.bins, n)
