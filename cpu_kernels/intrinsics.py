"""Building blocks of native kernels: memory by address, OpenMP threads, LLVM vectors. It needs Numba."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit
from numba.core import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

_configured: str | None = getattr(config, "CPU_FEATURES", None)
_features = [f for f in (get_host_cpu_features() if _configured is None else _configured).split(",") if f]
# Set before anything is compiled: by default LLVM halves vectors of 512 bits for some CPUs.
vars(config)["CPU_FEATURES"] = ",".join([*_features, "-prefer-256-bit"])

LANES = 16
_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
NUMBERS, FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_ALL_LANES, _DOWN, _AS_SET = ir.IntType(16)(-1), _I32(1), _I32(4)
"""Immediates of AVX-512: a mask of all lanes, rounding down, and rounding as the CPU is set to (MXCSR)."""

Vector = Any

thread_number: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads: Any = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier: Any = types.ExternalFunction("GOMP_barrier", types.void())


def has_features(*names: str) -> bool:
    """Whether code is compiled for a CPU with these extensions, by LLVM's names.

    The CPU is this one; where ``NUMBA_CPU_FEATURES`` is set, it has only the extensions named there with a plus.
    """
    enabled = {
        feature[1:]: feature[0] == "+" for feature in _features
    }  # of a name given twice the last counts, as for LLVM
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
    """A function that returns the address of ``num_bytes`` bytes on the thread's stack, aligned to 64."""

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
    """A function for kernel bodies with ``num_arguments`` int64 arguments, whose LLVM code ``generate`` emits."""

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


def loop(builder: Any, count: Any, begin: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """Emit ``values = body(number, values)`` for number in 0 to count - 1, count >= 1; returns the last values."""
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
    """LLVM's intrinsic ``llvm.NAME``, which returns the type ``kind`` and takes ``kinds``."""
    full_name = f"llvm.{name}"
    declared = builder.module.globals.get(full_name)
    return declared or ir.Function(builder.module, ir.FunctionType(kind, kinds), full_name)


def call_llvm(builder: Any, name: str, kind: Any, *arguments: Any) -> Any:
    return builder.call(llvm_function(builder, name, kind, *(argument.type for argument in arguments)), arguments)


def prefetch_lines(builder: Any, base: Any, offsets: range, locality: int) -> None:
    """Prefetch the cache lines at ``base`` + offsets: into L1 by locality 3, into L2 by 2 (LLVM's ``prefetch``)."""
    for offset in offsets:
        address = builder.inttoptr(builder.add(base, _I64(offset)), _I8.as_pointer())
        call_llvm(builder, "prefetch.p0", ir.VoidType(), address, _I32(0), _I32(locality), _I32(1))


class _BFloat16(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


class Vectors:
    """Emits operations on vectors of 16 lanes."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def number(self, value: float) -> Vector:
        """A constant in all lanes, rounded to float32."""
        (single,) = struct.unpack("f", struct.pack("f", value))
        return ir.Constant(FLOATS, [single] * LANES)

    def at(self, address: Any, kind: Any = FLOATS) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, address: Any, kind: Any = FLOATS) -> Vector:
        return self.builder.load(self.at(address, kind), align=4)

    def repeated(self, address: Any) -> Vector:
        """A float32 in memory, in all lanes."""
        return self.all_of(self.builder.load(self.builder.inttoptr(address, _F32.as_pointer()), align=4))

    def all_of(self, number: Any) -> Vector:
        """A number of 32 bits, in all lanes."""
        undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
        first_lane = self.builder.insert_element(undefined, number, _I32(0))
        return self.builder.shuffle_vector(first_lane, first_lane, ir.Constant(NUMBERS, None))

    def multiply_add(self, a: Vector, b: Vector, c: Vector) -> Vector:
        return self._call("fma", a, b, c)

    def greater(self, x: Vector, y: Vector) -> Vector:
        """The lane-wise maximum; y where x is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def upper_halves(self, first: Vector, second: Vector) -> Vector:
        """The upper sixteen bits of each lane of both, as pairs (first, second)."""
        builder, kind = self.builder, ir.VectorType(ir.IntType(16), 2 * LANES)
        lower = builder.bitcast(builder.lshr(first, ir.Constant(NUMBERS, [16] * LANES)), kind)
        lanes = [lane if lane % 2 == 0 else 2 * LANES + lane for lane in range(2 * LANES)]
        both = ir.Constant(ir.VectorType(_I32, 2 * LANES), lanes)
        return builder.bitcast(builder.shuffle_vector(lower, builder.bitcast(second, kind), both), NUMBERS)

    def at_least(self, x: Vector, bound: float) -> Vector:
        """max(x, bound); NaN stays NaN."""
        limit = self.number(bound)
        return self.builder.select(self.builder.fcmp_ordered(">", limit, x), limit, x)

    def at_most(self, x: Vector, bound: float) -> Vector:
        """min(x, bound); NaN stays NaN."""
        limit = self.number(bound)
        return self.builder.select(self.builder.fcmp_ordered("<", limit, x), limit, x)

    def power_of_two(self, x: Vector, terms: int) -> Vector:
        """Two to the x for -127 (gives 0) <= x <= 127, by a Taylor polynomial of degree ``terms``."""
        builder = self.builder
        n = self._call("rint", x)
        r = builder.fsub(x, n)
        power = self.number(math.log(2) ** terms / math.factorial(terms))
        for term in range(terms - 1, -1, -1):
            power = self.multiply_add(power, r, self.number(math.log(2) ** term / math.factorial(term)))
        exponent = builder.shl(builder.fptosi(n, NUMBERS), ir.Constant(NUMBERS, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(power, NUMBERS), exponent), FLOATS)

    def rounded(self, first: Vector, second: Vector) -> Vector:
        """bfloat16 [32] of first, then second (VCVTNE2PS2BF16), as sixteen lanes of pairs."""
        kind = ir.VectorType(_BFloat16(), 2 * LANES)
        return self.builder.bitcast(self._x86("avx512bf16.cvtne2ps2bf16.512", kind, second, first), NUMBERS)

    def scaled(self, x: Vector, exponents: Vector) -> Vector:
        """x * 2**floor(exponents) (VSCALEFPS); exponents may be minus infinity."""
        return self._x86("avx512.mask.scalef.ps.512", FLOATS, x, exponents, self.number(0.0), _ALL_LANES, _AS_SET)

    def fraction(self, x: Vector) -> Vector:
        """x - floor(x) (VREDUCEPS); 0 for infinities."""
        return self._x86("avx512.mask.reduce.ps.512", FLOATS, x, _DOWN, self.number(0.0), _ALL_LANES, _AS_SET)

    def shuffled(self, first: Vector, second: Vector, lanes: list[int]) -> Vector:
        """The chosen lanes: 0 to 15 are those of ``first``, 16 to 31 those of ``second``."""
        return self.builder.shuffle_vector(first, second, ir.Constant(NUMBERS, lanes))

    def _x86(self, name: str, kind: Any, *arguments: Any) -> Any:
        return call_llvm(self.builder, f"x86.{name}", kind, *arguments)

    def _call(self, name: str, *arguments: Vector) -> Vector:
        return call_llvm(self.builder, f"{name}.v{LANES}f32", FLOATS, *arguments)


def dots(num: int) -> Any:
    """``f(x, rows, count, out)``: out float32 [num] = rows [num, 16 * count] @ x [16 * count]; num is 1, 4 or 16.

    Every dot product is summed in the same order, whatever ``num`` is.
    """

    def generate(builder: Any, x: Any, rows: Any, count: Any, out: Any) -> None:
        vectors, width = Vectors(builder), builder.mul(count, _I64(4 * LANES))
        zeros = [ir.Constant(FLOATS, None) for _ in range(num)]

        def step(number: Any, sums: list[Any]) -> list[Any]:
            offset = builder.mul(number, _I64(4 * LANES))
            x_vector = vectors.load(builder.add(x, offset))
            offsets = [builder.add(offset, builder.mul(width, _I64(row))) for row in range(num)]
            return [
                vectors.multiply_add(x_vector, vectors.load(builder.add(rows, row_offset)), total)
                for row_offset, total in zip(offsets, sums, strict=True)
            ]

        sums = loop(builder, count, zeros, step) * (LANES // num)
        distance = LANES // 2
        while distance:  # each round merges pairs of vectors, adding their halves
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

    Only the first 16 * num_vectors columns of the rows are read; rows are added one after another.
    """

    def generate(builder: Any, weights: Any, rows: Any, width: Any, out: Any) -> None:
        vectors, stride = Vectors(builder), builder.mul(width, _I64(4))
        offsets = [_I64(4 * LANES * number) for number in range(num_vectors)]
        sums = [vectors.load(builder.add(out, offset)) for offset in offsets]
        for row in range(num_rows):
            weight = vectors.repeated(builder.add(weights, _I64(4 * row)))
            address = builder.add(rows, builder.mul(stride, _I64(row)))
            sums = [
                vectors.multiply_add(weight, vectors.load(builder.add(address, offset)), total)
                for offset, total in zip(offsets, sums, strict=True)
            ]
        for offset, total in zip(offsets, sums, strict=True):
            builder.store(total, vectors.at(builder.add(out, offset)), align=4)

    return void_intrinsic(4, generate)


_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SMALLEST, _LARGEST = np.float32(-88.0), np.float32(89.0)
"""Arguments beyond these give 0 and infinity: exponents with all bits clear, and all set."""
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(n)) for n in (2, 3, 4, 5, 6))
_QUIET_NAN, _INFINITY = np.int32(0x7FC0), np.int32(0x7F800000)


@njit(error_model="numpy", fastmath={"contract"})  # explicit: the default is the flags of the first caller
def exponential(x: Any) -> Any:
    """e to the x in float32, to three units in the last place; LLVM vectorizes it in loops.

    0 below -87.6, infinity above 88.3. Range reduction by ln 2 in two parts, then the Taylor polynomial of degree 6.
    """
    x = min(max(x, _SMALLEST), _LARGEST)
    n = np.floor(x * _LOG2E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    power = np.float32(1.0) + r * (np.float32(1.0) + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    return power * float_of((np.int32(n) + 127) << 23)


@njit(error_model="numpy")
def to_bfloat16(number: Any) -> Any:
    """Round to nearest, ties to even; the upper 16 bits of the float32."""
    bits = bits_of(number)
    if (bits & 0x7FFFFFFF) > _INFINITY:
        return _QUIET_NAN
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
