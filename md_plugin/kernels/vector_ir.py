"""Whole CPU kernels as explicit LLVM vectors, for code that numba compiles.

`Emitter` wraps an IR builder with a floating type and the lane count of the CPU: splats, loads and
stores (masked for the last, partial vector of a row), fused multiply-add, and counted loops whose
accumulators are SSA values and so stay in registers. `microkernel` turns a Python function that
emits IR into a function that njit code calls.

`simd` does the same for the short tiles of the drop-in sums; here a kernel is a whole loop over
rows. Everything is generic IR: LLVM makes zmm, ymm, xmm or NEON code of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from md_plugin.kernels.simd import registers

Value = Any  # of LLVM's intermediate language

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F64 = ir.DoubleType()


class Emitter:
    """Emits vector IR of one floating type at the position of a builder.

    Attributes:
        lanes: numbers in one vector.
        wide: vectors of one row in a register tile.
    """

    def __init__(self, context: Any, builder: Any, floating: Any):
        self.builder = builder
        self.size = floating.bitwidth // 8
        self.lanes, self.wide, _ = registers(context, floating)
        self.scalar = ir.FloatType() if self.size == 4 else F64
        self.integer = ir.IntType(8 * self.size)
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.integers = ir.VectorType(self.integer, self.lanes)
        self.mask_type = ir.VectorType(I1, self.lanes)
        self._mangled = f"v{self.lanes}f{8 * self.size}"

    # ---- values ----------------------------------------------------------------------------------
    def const(self, value: float) -> Value:
        """A number in every lane."""
        return ir.Constant(self.vector, [ir.Constant(self.scalar, value)] * self.lanes)

    def const_int(self, value: int) -> Value:
        """An integer of the size of the floating type in every lane."""
        return ir.Constant(self.integers, [ir.Constant(self.integer, value)] * self.lanes)

    def splat(self, value: Value) -> Value:
        """A scalar in every lane."""
        vector = ir.VectorType(value.type, self.lanes)
        undef = ir.Constant(vector, ir.Undefined)
        one = self.builder.insert_element(undef, value, I32(0))
        return self.shuffle(one, undef, [0] * self.lanes)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """The named lanes of a, followed by b."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), [I32(lane) for lane in lanes])
        return self.builder.shuffle_vector(a, b, mask)

    def head_mask(self, count: Value) -> Value:
        """Lanes below `count` (i64)."""
        iota = ir.Constant(ir.VectorType(I32, self.lanes), [I32(k) for k in range(self.lanes)])
        limit = self.splat(self.builder.trunc(count, I32))
        return self.builder.icmp_signed("<", iota, limit)

    # ---- memory ----------------------------------------------------------------------------------
    def at(self, base: Value, index: Value, type_: Any = None) -> Value:
        """Address of element `index` (i64) behind a pointer."""
        return self.builder.gep(self._to(base, type_ or self.scalar), [index])

    def _to(self, address: Value, type_: Any) -> Value:
        """The address as a pointer to some type; llvmlite's are typed up to some release."""
        return self.builder.bitcast(address, type_.as_pointer())

    def load(self, address: Value, mask: Value | None = None) -> Value:
        """A vector from any address; lanes outside the mask are zero and are not touched."""
        if mask is None:
            return self.builder.load(self._to(address, self.vector), align=self.size)
        address = self._to(address, self.vector)
        name = f"llvm.masked.load.{self._mangled}.p0{self._mangled}"
        signature = (self.vector, [address.type, I32, self.mask_type, self.vector])
        return self._call(name, signature, [address, I32(self.size), mask, self.const(0.0)])

    def load_scalar(self, address: Value, type_: Any = None) -> Value:
        """One number."""
        return self.builder.load(self._to(address, type_ or self.scalar))

    def store_scalar(self, value: Value, address: Value) -> None:
        """One number, of the type that it has."""
        self.builder.store(value, self._to(address, value.type))

    def index(self, base: Value, at: Value, type_: Any = I32) -> Value:
        """Element of an int32 array, or of another one, as i64."""
        return self.builder.sext(self.load_scalar(self.at(base, at, type_), type_), I64)

    def store_index(self, value: Value, base: Value, at: Value) -> None:
        """An i64 into an int32 array."""
        self.store_scalar(self.builder.trunc(value, I32), self.at(base, at, I32))

    def broadcast(self, address: Value) -> Value:
        """One number from memory in every lane."""
        return self.splat(self.load_scalar(address))

    def store(self, value: Value, address: Value, mask: Value | None = None) -> None:
        """A vector (or several in one) to any address; lanes outside the mask are not touched."""
        address = self._to(address, value.type)
        if mask is None:
            self.builder.store(value, address, align=self.size)
            return
        name = f"llvm.masked.store.{self._mangled}.p0{self._mangled}"
        signature = (ir.VoidType(), [self.vector, address.type, I32, self.mask_type])
        self._call(name, signature, [value, address, I32(self.size), mask])

    def prefetch(self, address: Value) -> None:
        """Fetch a cache line that is written soon; any address may be given."""
        address = self._to(address, I8)
        signature = (ir.VoidType(), [address.type, I32, I32, I32])
        self._call("llvm.prefetch.p0i8", signature, [address, I32(1), I32(3), I32(1)])

    # ---- records of four -------------------------------------------------------------------------
    def quad(self, scalar: Any = None) -> Any:
        """The type of four numbers."""
        return ir.VectorType(scalar or self.scalar, 4)

    def load_quad(self, address: Value, scalar: Any = None) -> Value:
        """Four numbers (of another type, where given) from any address."""
        return self.builder.load(self._to(address, self.quad(scalar)), align=self.size)

    def load_records(self, address: Value) -> list[Value]:
        """`lanes` records of four numbers in a row -> one vector for each of the four."""
        step = 4 * self.lanes
        wide = ir.VectorType(self.scalar, step)
        records = self.builder.load(self._to(address, wide), align=self.size)
        undef = ir.Constant(wide, ir.Undefined)
        return [self.shuffle(records, undef, range(k, step, 4)) for k in range(4)]

    # ---- arithmetic ------------------------------------------------------------------------------
    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        return self.builder.fadd(a, b)

    def sub(self, a: Value, b: Value) -> Value:
        """a - b."""
        return self.builder.fsub(a, b)

    def mul(self, a: Value, b: Value) -> Value:
        """a b."""
        return self.builder.fmul(a, b)

    def neg(self, a: Value) -> Value:
        """-a."""
        return self.builder.fneg(a)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c; in one instruction where the CPU has it."""
        signature = (self.vector, [self.vector] * 3)
        return self._call(f"llvm.fmuladd.{self._mangled}", signature, [a, b, c])

    def reciprocal(self, a: Value) -> Value:
        """1 / a."""
        return self.builder.fdiv(self.const(1.0), a)

    def sqrt(self, a: Value) -> Value:
        """Square root."""
        return self._call(f"llvm.sqrt.{self._mangled}", (self.vector, [self.vector]), [a])

    def at_least(self, a: Value, low: float) -> Value:
        """max(a, low), but NaN stays NaN."""
        bound = self.const(low)
        return self.builder.select(self.builder.fcmp_ordered("<", a, bound), bound, a)

    def lesser(self, a: Value, b: Value) -> Value:
        """min(a, b) of vectors or scalars, b where a is NaN."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def total(self, a: Value) -> Value:
        """Sum of the lanes, pairwise."""
        name = f"llvm.vector.reduce.fadd.{self._mangled}"
        signature = (self.scalar, [self.scalar, self.vector])
        return self._call(name, signature, [ir.Constant(self.scalar, -0.0), a], ("reassoc",))

    def least(self, a: Value) -> Value:
        """Smallest of the lanes."""
        name = f"llvm.vector.reduce.fmin.{self._mangled}"
        return self._call(name, (self.scalar, [self.vector]), [a])

    def widen(self, a: Value) -> Value:
        """A scalar as float64."""
        return self.builder.fpext(a, F64) if self.size == 4 else a

    def add_neighbours(self, a: Value, b: Value) -> Value:
        """a0 + a1, a2 + a3, ..., b0 + b1, b2 + b3, ..."""
        even, odd = (self.shuffle(a, b, range(k, 2 * self.lanes, 2)) for k in (0, 1))
        return self.add(even, odd)

    # ---- control ---------------------------------------------------------------------------------
    def loop(
        self,
        start: Value,
        stop: Value,
        step: int,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """for index in range(start, stop, step): carried = body(index, carried)."""
        builder = self.builder
        entry = builder.block
        head, inner, end = (builder.append_basic_block(name) for name in ("loop", "body", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        index.add_incoming(start, entry)
        phis = [builder.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, entry)
        builder.cbranch(builder.icmp_signed("<", index, stop), inner, end)
        builder.position_at_end(inner)
        updated = body(index, list(phis))
        following = builder.add(index, I64(step))
        for phi, value in zip(phis, updated, strict=True):
            phi.add_incoming(value, builder.block)
        index.add_incoming(following, builder.block)
        builder.branch(head).set_metadata("llvm.loop", self._never_unroll())
        builder.position_at_end(end)
        return list(phis)

    def _never_unroll(self) -> Any:
        """A loop's own metadata node: rows are short, an unrolled loop is mostly its remainder."""
        module = self.builder.module
        flag = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
        node = module.add_metadata([flag, ir.Constant(I64, len(module.metadata))])
        node.operands = (node, flag)  # refers to itself, as LLVM wants
        return node

    def when(self, condition: Value) -> Any:
        """Context manager: what is emitted inside runs only where the condition holds."""
        return self.builder.if_then(condition)

    def _call(
        self, name: str, signature: Any, arguments: list[Value], flags: Sequence[str] = ()
    ) -> Value:
        kind = ir.FunctionType(*signature)
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments, fastmath=flags)


def microkernel(emit: Callable[..., None]) -> Callable[..., None]:
    """Decorator: `emit(e, *groups)` emits IR; njit code calls the result with tuples.

    A tuple of C-contiguous arrays and integers becomes a list of pointers and of 64-bit integers;
    a tuple of booleans becomes its length, known when code is made. The floating type is that of
    the first array of floating-point numbers. Nothing is returned.
    """

    def typing(typing_context: Any, *groups: Any) -> Any:
        arrays = [kind for group in groups for kind in group if isinstance(kind, types.Array)]
        if any(kind.layout != "C" for kind in arrays):
            raise TypingError(f"{emit.__name__}: every array must be C-contiguous")
        floating = next(kind.dtype for kind in arrays if isinstance(kind.dtype, types.Float))

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds, values = signature.args[0], cgutils.unpack_tuple(builder, args[0])
            plain = [_plain(context, builder, *both) for both in zip(kinds, values, strict=True)]
            emit(Emitter(context, builder, floating), *plain)
            return context.get_dummy_value()

        return types.void(types.StarArgTuple(groups)), generate

    typing.__name__ = typing.__qualname__ = emit.__name__
    typing.__doc__, typing.__module__ = emit.__doc__, emit.__module__
    made: Callable[..., None] = intrinsic(typing)
    return made


def _plain(context: Any, builder: Any, kind: Any, value: Value) -> Any:
    kinds = tuple(kind)
    if all(isinstance(one, types.Boolean) for one in kinds):
        return len(kinds)
    return [
        context.make_array(one)(context, builder, item).data
        if isinstance(one, types.Array)
        else context.cast(builder, item, one, types.int64)
        for one, item in zip(kinds, cgutils.unpack_tuple(builder, value), strict=True)
    ]
