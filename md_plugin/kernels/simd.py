"""Vector instructions inside code that numba compiles: a writer of LLVM's intermediate language.

`Code` writes loads, stores, splats, multiply-adds, loops whose sums stay in registers, and the sum
or transpose over lanes, for vectors of L lanes: what one register of this CPU holds. `Arrays` hands
it the arrays and integers of a call. `tiles` builds the inner loops of the three sums from them.

Arrays are C-contiguous, all of one dtype, float32 or float64, aligned to their elements only.
Indices count elements, in 64 bits; nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import JITCPUCodegen
from numba.extending import intrinsic

I32, I64 = ir.IntType(32), ir.IntType(64)
# What is used of numba and llvmlite beyond their documented interfaces; there from numba 0.60 on.
INTERNALS = {
    cgutils: ("alloca_once", "get_or_insert_function", "unpack_tuple"),
    JITCPUCodegen: ("magic_tuple",),
    ir.IRBuilder: ("ctlz", "phi", "shuffle_vector"),
}
FLUSH = 0x8040  # MXCSR: denormal results are zero, denormal operands are zero
Values = list[Any]


def check_internals() -> None:
    """Raise where numba or llvmlite lack something that the CPU sums are written with.

    Raises:
        ImportError: names what is missing, and in which versions.
    """
    for owner, names in INTERNALS.items():
        for name in names:
            if not hasattr(owner, name):
                raise ImportError(
                    f"numba {numba.__version__} with llvmlite {llvmlite.__version__} has no "
                    f"{owner.__name__}.{name}, which the CPU sums need; use a release of numba "
                    "between 0.60 and 0.68, or backend='torch'"
                )


check_internals()


class Registers(NamedTuple):
    """What the vector registers of a CPU hold.

    Attributes:
        lanes: numbers in one register.
        wide: registers of one row in a tile that spans several.
        pairs: pairs of a tile that holds 4 sums for each.
    """

    lanes: int
    wide: int
    pairs: int


def registers(context: Any, dtype: Any) -> Registers:
    """Of the CPU for which numba generates code: that is a part of the key of its disk cache."""
    triple, _, features = context.codegen().magic_tuple()
    has = {name for name in features.split(",") if name.startswith("+")}
    n_bit = 512 if "+avx512f" in has else 256 if "+avx" in has else 128
    # 32 registers with AVX-512 and on 64-bit ARM, else 16: sums, one row and one factor must fit.
    many = n_bit == 512 or triple.startswith(("aarch64", "arm64"))
    return Registers(n_bit // dtype.bitwidth, 4 if many else 2, 4 if many else 2)


class Code:
    """Writes vector instructions on the arrays of one dtype."""

    def __init__(self, context: Any, builder: Any, dtype: Any) -> None:
        self.b = builder
        self.lanes, self.wide, self.pairs = registers(context, dtype)
        self.element = ir.FloatType() if dtype.bitwidth == 32 else ir.DoubleType()
        self.bits, self.size = f"f{dtype.bitwidth}", dtype.bitwidth // 8
        self.vector = ir.VectorType(self.element, self.lanes)
        self.zero = ir.Constant(self.vector, None)

    def at(self, *terms: Any) -> Any:
        """Index: products of tuples and single values, summed; in 64 bits."""
        total: Any = I64(0)
        for term in terms:
            factors = term if isinstance(term, tuple) else (term,)
            product = factors[0]
            for factor in factors[1:]:
                product = self.b.mul(product, factor)
            total = self.b.add(total, product)
        return total

    def least(self, x: Any, y: Any) -> Any:
        """The smaller of two indices."""
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def _pointer(self, base: Any, index: Any, kind: Any) -> Any:
        return self.b.bitcast(self.b.gep(base, [index]), kind.as_pointer())

    def scalar(self, base: Any, index: Any) -> Any:
        """base[index]."""
        return self.b.load(self.b.gep(base, [index]), align=self.size)

    def index(self, base: Any, index: Any) -> Any:
        """base[index] of 32-bit integers, in 64 bits."""
        return self.b.sext(self.b.load(self.b.gep(base, [index])), I64)

    def mask(self, count: Any) -> Any:
        """The first `count` lanes."""
        lane = ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes)))
        return self.b.icmp_signed("<", lane, self.splat(count))

    def is_full(self, first: Any, count: Any) -> Any:
        """Whether `count` numbers hold L of them from `first` on."""
        return self.b.icmp_signed("<=", self.at(first, I64(self.lanes)), count)

    def load(self, base: Any, index: Any, mask: Any = None) -> Any:
        """L numbers from base[index] on; where masked, zeros are put and nothing is read."""
        pointer = self._pointer(base, index, self.vector)
        if mask is None:
            return self.b.load(pointer, align=self.size)
        kinds = (pointer.type, I32, mask.type, self.vector)
        function = self._masked("load", self.vector, kinds)
        return self.b.call(function, [pointer, I32(self.size), mask, self.zero])

    def store(self, value: Any, base: Any, index: Any, mask: Any = None) -> None:
        """The lanes of `value` to base[index] on; where masked, nothing is written."""
        pointer = self._pointer(base, index, value.type)
        if mask is None:
            self.b.store(value, pointer, align=self.size)
            return
        kinds = (self.vector, pointer.type, I32, mask.type)
        function = self._masked("store", ir.VoidType(), kinds)
        self.b.call(function, [value, pointer, I32(self.size), mask])

    def _masked(self, what: str, result: Any, kinds: Any) -> Any:
        kind = f"v{self.lanes}{self.bits}"
        # Typed pointers name their target, opaque ones do not; LLVM takes the old name for both.
        name = f"llvm.masked.{what}.{kind}.p0{kind}"
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, kinds), name)

    def splat(self, scalar: Any) -> Any:
        """The same number in all lanes."""
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I64(0))
        lanes = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(one, one, lanes)

    def part(self, vector: Any, first: int, count: int) -> Any:
        """Lanes first .. first + count - 1; one lane as a scalar."""
        if count == 1:
            return self.b.extract_element(vector, I64(first))
        lanes = ir.Constant(ir.VectorType(I32, count), list(range(first, first + count)))
        return self.b.shuffle_vector(vector, vector, lanes)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z; in one instruction where the CPU has it."""
        name = f"llvm.fmuladd.v{self.lanes}{self.bits}"
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), [x, y, z])

    def loop(
        self, span: tuple[Any, Any, int], start: Values, body: Callable[[Any, Values], Values]
    ) -> Values:
        """values = body(k, values) for k in range(*span); the values stay in registers."""
        b, (first, stop, step) = self.b, span
        before = b.block
        head, inside, after = (b.append_basic_block(n) for n in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        phis = [b.phi(value.type) for value in (first, *start)]
        b.cbranch(b.icmp_signed("<", phis[0], stop), inside, after)
        b.position_at_end(inside)
        new = [b.add(phis[0], I64(step)), *body(phis[0], phis[1:])]
        for phi, old, value in zip(phis, (first, *start), new, strict=True):
            phi.add_incoming(old, before)
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return phis[1:]

    def turn(self, rows: Values) -> Values:
        """L vectors -> the L columns of the square that they make."""
        bit, n = 1, self.lanes
        kind = ir.VectorType(I32, n)
        while bit < n:
            upper = ir.Constant(kind, [(l ^ bit) + n if l & bit else l for l in range(n)])
            lower = ir.Constant(kind, [l + n if l & bit else l ^ bit for l in range(n)])
            for l in (l for l in range(n) if not l & bit):
                pair = rows[l], rows[l + bit]
                rows[l] = self.b.shuffle_vector(*pair, upper)
                rows[l + bit] = self.b.shuffle_vector(*pair, lower)
            bit *= 2
        return rows

    def lane_sums(self, vectors: Values) -> Any:
        """L vectors -> one, whose lane l is the sum of vector l: log2(L) rounds of halving."""
        bit, n = 1, self.lanes
        while bit < n:
            low = [(l & ~bit) + (n if l & bit else 0) for l in range(n)]
            pick = [ir.Constant(ir.VectorType(I32, n), low)]
            pick.append(ir.Constant(pick[0].type, [l + bit for l in low]))
            for l in range(0, n, 2 * bit):
                halves = [self.b.shuffle_vector(vectors[l], vectors[l + bit], p) for p in pick]
                vectors[l] = self.b.fadd(*halves)
            bit *= 2
        return vectors[0]


class Arrays:
    """Data pointers, shapes and integers of a call tile((array, ...), (integer, ...))."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        kinds = [tuple(kind) for kind in signature.args]
        values = [cgutils.unpack_tuple(builder, arg) for arg in args]
        views = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(kinds[0], values[0], strict=True)
        ]
        self.data = [view.data for view in views]
        self.shapes = [cgutils.unpack_tuple(builder, view.shape) for view in views]
        self.integers = [
            context.cast(builder, value, kind, types.int64)
            for kind, value in zip(kinds[1], values[1], strict=True)
        ]
        self.code = Code(context, builder, kinds[0][0].dtype)


@intrinsic  # type: ignore[untyped-decorator]
def flush_denormals(typing_context: Any) -> Any:
    """flush_denormals() -> the state before, for `restore_denormals`; of the calling thread.

    On x86 each operation on a denormal number (float32: below 1e-38) costs 150 cycles. Gaussians
    under a cutoff that goes to zero make them. ARM is as fast with them as without.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not context.codegen().magic_tuple()[0].startswith("x86_64"):
            return I32(0)
        state = cgutils.alloca_once(builder, I32)
        _control(builder, "st", state)
        before = builder.load(state)
        builder.store(builder.or_(before, I32(FLUSH)), state)
        _control(builder, "ld", state)
        return before

    return types.int32(), generate


@intrinsic  # type: ignore[untyped-decorator]
def restore_denormals(typing_context: Any, before: Any) -> Any:
    """Undo `flush_denormals`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if context.codegen().magic_tuple()[0].startswith("x86_64"):
            state = cgutils.alloca_once(builder, I32)
            builder.store(args[0], state)
            _control(builder, "ld", state)
        return context.get_dummy_value()

    return types.void(types.int32), generate


def _control(builder: Any, what: str, state: Any) -> None:
    """Load or store the control register of SSE and AVX."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{what}mxcsr")
    builder.call(function, [builder.bitcast(state, byte)])
