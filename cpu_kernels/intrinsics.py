"""What the bodies of native kernels call: memory by its address, threads, vectors of LLVM. It needs Numba."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import config
from numba.core import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

_configured: str | None = getattr(config, "CPU_FEATURES", None)
_features = [f for f in (get_host_cpu_features() if _configured is None else _configured).split(",") if f]
# Before anything is compiled: LLVM halves vectors of 512 bits for CPUs of which some became slower by them.
vars(config)["CPU_FEATURES"] = ",".join([*_features, "-prefer-256-bit"])

LANES = 16
_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
NUMBERS, FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_ALL_LANES, _DOWN, _AS_SET = ir.IntType(16)(-1), _I32(1), _I32(4)
"""A mask of all lanes; rounding down, and rounding as the CPU is set to."""

Vector = Any

thread_number: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads: Any = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier: Any = types.ExternalFunction("GOMP_barrier", types.void())


def has_features(*names: str) -> bool:
    """Whether code is compiled for a CPU with these extensions, by LLVM's names.

    That is this CPU, unless ``NUMBA_CPU_FEATURES`` is set: then only what it names with a plus.
    """
    enabled = {feature[1:]: feature[0] == "+" for feature in _features}  # of two the last counts, as for LLVM
    return all(enabled.get(name) for name in names)


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(_typing: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(element)))

        return types.CPointer(element)(types.int64), generate

    return pointer


floats = _pointer_to(types.float32)
integers = _pointer_to(types.int32)
halves = _pointer_to(types.int16)
longs = _pointer_to(types.int64)
bytes_at = _pointer_to(types.uint8)


def _same_bits(source: Any, target: Any) -> Any:
    @intrinsic
    def cast(_typing: Any, _number: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return cast


bits_of = _same_bits(types.float32, types.int32)
float_of = _same_bits(types.int32, types.float32)


def scratch(num_bytes: int) -> Any:
    """A function that gives the address of so many bytes of the thread's stack."""

    @intrinsic
    def make(_typing: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
            with builder.goto_entry_block():
                array = builder.alloca(ir.ArrayType(_I8, num_bytes))
            array.align = 64
            return builder.ptrtoint(array, _I64)

        return types.int64(), generate

    return make


def void_intrinsic(num_arguments: int, generate: Callable[..., None]) -> Any:
    """A function of so many addresses and counts that ``generate`` writes with a builder."""

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        generate(builder, *arguments)
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * num_arguments)
    typings: dict[int, Callable[..., Any]] = {  # Numba reads the number of arguments off the function
        0: lambda _typing: (signature, code),
        1: lambda _typing, _a: (signature, code),
        2: lambda _typing, _a, _b: (signature, code),
        3: lambda _typing, _a, _b, _c: (signature, code),
        4: lambda _typing, _a, _b, _c, _d: (signature, code),
        5: lambda _typing, _a, _b, _c, _d, _e: (signature, code),
        6: lambda _typing, _a, _b, _c, _d, _e, _f: (signature, code),
        7: lambda _typing, _a, _b, _c, _d, _e, _f, _g: (signature, code),
        8: lambda _typing, _a, _b, _c, _d, _e, _f, _g, _h: (signature, code),
        11: lambda _typing, _a, _b, _c, _d, _e, _f, _g, _h, _i, _j, _k: (signature, code),
        14: lambda _typing, _a, _b, _c, _d, _e, _f, _g, _h, _i, _j, _k, _l, _m, _n: (signature, code),
    }
    return intrinsic(typings[num_arguments])


def _call(builder: Any, code: Any, record: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_I64])
    builder.call(builder.inttoptr(code, kind.as_pointer()), [record])


call = void_intrinsic(2, _call)
"""``f(code, record)``: call a kernel's code with the address of its record."""


def loop(builder: Any, count: Any, begin: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """``values = body(number, values)`` for number 0 to count, which is at least 1; the values after the last."""
    before, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    number = builder.phi(_I64)
    number.add_incoming(_I64(0), before)
    current = [builder.phi(value.type) for value in begin]
    after = body(number, current)
    last, following = builder.block, builder.add(number, _I64(1))
    number.add_incoming(following, last)
    for phi, first, new in zip(current, begin, after, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(new, last)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)
    return after


def llvm_function(builder: Any, name: str, kind: Any, *kinds: Any) -> Any:
    """An intrinsic function of LLVM, ``llvm.`` and its name, that gives one kind and takes others."""
    whole = f"llvm.{name}"
    known = builder.module.globals.get(whole)
    return known or ir.Function(builder.module, ir.FunctionType(kind, kinds), whole)


def call_llvm(builder: Any, name: str, kind: Any, *arguments: Any) -> Any:
    return builder.call(llvm_function(builder, name, kind, *(argument.type for argument in arguments)), arguments)


def prefetch_lines(builder: Any, here: Any, offsets: range, level: int) -> None:
    """Call lines of 64 bytes into the first cache (level 3) or the second (2)."""
    for offset in offsets:
        address = builder.inttoptr(builder.add(here, _I64(offset)), _I8.as_pointer())
        call_llvm(builder, "prefetch.p0", ir.VoidType(), address, _I32(0), _I32(level), _I32(1))


class _BFloat16(ir.Type):  # type: ignore[misc]
    """The type of LLVM that llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


class Vectors:
    """What a builder writes for them."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def number(self, value: float) -> Vector:
        """Sixteen times, as float32 has it."""
        (single,) = struct.unpack("f", struct.pack("f", value))
        return ir.Constant(FLOATS, [single] * LANES)

    def at(self, address: Any, kind: Any = FLOATS) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, address: Any, kind: Any = FLOATS) -> Vector:
        return self.builder.load(self.at(address, kind), align=4)

    def repeated(self, address: Any) -> Vector:
        """A number in memory, sixteen times."""
        return self.all_of(self.builder.load(self.builder.inttoptr(address, _F32.as_pointer()), align=4))

    def all_of(self, number: Any) -> Vector:
        """One number of 32 bits, sixteen times."""
        nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
        alone = self.builder.insert_element(nothing, number, _I32(0))
        return self.builder.shuffle_vector(alone, alone, ir.Constant(NUMBERS, None))

    def multiply_add(self, a: Vector, b: Vector, c: Vector) -> Vector:
        return self._call("fma", a, b, c)

    def greater(self, x: Vector, y: Vector) -> Vector:
        """The greater of two each, y where x is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def upper_halves(self, first: Vector, second: Vector) -> Vector:
        """Pairs of the upper sixteen bits of both."""
        builder, kind = self.builder, ir.VectorType(ir.IntType(16), 2 * LANES)
        lower = builder.bitcast(builder.lshr(first, ir.Constant(NUMBERS, [16] * LANES)), kind)
        lanes = [lane if lane % 2 == 0 else 2 * LANES + lane for lane in range(2 * LANES)]
        both = ir.Constant(ir.VectorType(_I32, 2 * LANES), lanes)
        return builder.bitcast(builder.shuffle_vector(lower, builder.bitcast(second, kind), both), NUMBERS)

    def at_least(self, x: Vector, bound: float) -> Vector:
        """The greater of x and a number; NaN stays."""
        limit = self.number(bound)
        return self.builder.select(self.builder.fcmp_ordered(">", limit, x), limit, x)

    def at_most(self, x: Vector, bound: float) -> Vector:
        """The smaller of x and a number; NaN stays."""
        limit = self.number(bound)
        return self.builder.select(self.builder.fcmp_ordered("<", limit, x), limit, x)

    def power_of_two(self, x: Vector, terms: int) -> Vector:
        """Two to the x, from -127, which gives 0, to 127, by so many terms of the series behind the first."""
        builder = self.builder
        n = self._call("rint", x)
        r = builder.fsub(x, n)
        power = self.number(math.log(2) ** terms / math.factorial(terms))
        for term in range(terms - 1, -1, -1):
            power = self.multiply_add(power, r, self.number(math.log(2) ** term / math.factorial(term)))
        exponent = builder.shl(builder.fptosi(n, NUMBERS), ir.Constant(NUMBERS, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(power, NUMBERS), exponent), FLOATS)

    def rounded(self, first: Vector, second: Vector) -> Vector:
        """bfloat16 [32] of both, as sixteen pairs of them."""
        kind = ir.VectorType(_BFloat16(), 2 * LANES)
        return self.builder.bitcast(self._x86("avx512bf16.cvtne2ps2bf16.512", kind, second, first), NUMBERS)

    def scaled(self, x: Vector, exponents: Vector) -> Vector:
        """x times two to the whole part of the exponents, which may be minus infinity."""
        return self._x86("avx512.mask.scalef.ps.512", FLOATS, x, exponents, self.number(0.0), _ALL_LANES, _AS_SET)

    def fraction(self, x: Vector) -> Vector:
        """What x is above the whole number below it; 0 of infinities."""
        return self._x86("avx512.mask.reduce.ps.512", FLOATS, x, _DOWN, self.number(0.0), _ALL_LANES, _AS_SET)

    def shuffled(self, first: Vector, second: Vector, lanes: list[int]) -> Vector:
        """Lanes of both, those of the second from 16 on."""
        return self.builder.shuffle_vector(first, second, ir.Constant(NUMBERS, lanes))

    def _x86(self, name: str, kind: Any, *arguments: Any) -> Any:
        return call_llvm(self.builder, f"x86.{name}", kind, *arguments)

    def _call(self, name: str, *arguments: Vector) -> Vector:
        return call_llvm(self.builder, f"{name}.v{LANES}f32", FLOATS, *arguments)


def dots(num: int) -> Any:
    """``f(x, rows, count, out)``: out float32 [num] = rows [num, 16 * count] @ x [16 * count]; num is 1, 4 or 16.

    Every dot is added up in the same order, however many there are.
    """

    def generate(builder: Any, x: Any, rows: Any, count: Any, out: Any) -> None:
        vectors, width = Vectors(builder), builder.mul(count, _I64(4 * LANES))
        zeros = [ir.Constant(FLOATS, None) for _ in range(num)]

        def step(number: Any, sums: list[Any]) -> list[Any]:
            offset = builder.mul(number, _I64(4 * LANES))
            here = vectors.load(builder.add(x, offset))
            places = [builder.add(offset, builder.mul(width, _I64(row))) for row in range(num)]
            return [
                vectors.multiply_add(here, vectors.load(builder.add(rows, place)), total)
                for place, total in zip(places, sums, strict=True)
            ]

        sums = loop(builder, count, zeros, step) * (LANES // num)
        distance = LANES // 2
        while distance:  # pairs of vectors add up their halves side by side
            first_lanes = [lane if not lane & distance else lane + LANES - distance for lane in range(LANES)]
            second_lanes = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
            merged = []
            for pair in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True):
                halves = (vectors.shuffled(*pair, lanes) for lanes in (first_lanes, second_lanes))
                merged.append(builder.fadd(*halves))
            sums, distance = merged, distance // 2
        kind = ir.VectorType(_F32, num)
        first = builder.shuffle_vector(sums[0], sums[0], ir.Constant(ir.VectorType(_I32, num), list(range(num))))
        builder.store(first, builder.inttoptr(out, kind.as_pointer()), align=4)

    return void_intrinsic(4, generate)


def weighted_sum(num_vectors: int, num_rows: int = LANES) -> Any:
    """``f(weights, rows, width, out)``: out float32 [16 * num_vectors] += weights [num_rows] @ rows [num_rows, width].

    Of the beginnings of these rows, one row after another.
    """

    def generate(builder: Any, weights: Any, rows: Any, width: Any, out: Any) -> None:
        vectors, stride = Vectors(builder), builder.mul(width, _I64(4))
        places = [_I64(4 * LANES * number) for number in range(num_vectors)]
        sums = [vectors.load(builder.add(out, place)) for place in places]
        for row in range(num_rows):
            weight = vectors.repeated(builder.add(weights, _I64(4 * row)))
            here = builder.add(rows, builder.mul(stride, _I64(row)))
            sums = [
                vectors.multiply_add(weight, vectors.load(builder.add(here, place)), total)
                for place, total in zip(places, sums, strict=True)
            ]
        for place, total in zip(places, sums, strict=True):
            builder.store(total, vectors.at(builder.add(out, place)), align=4)

    return void_intrinsic(4, generate)
