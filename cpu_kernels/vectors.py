"""Arithmetic of sixteen float32 in registers, and what is made of it for AMX's products."""

from __future__ import annotations

import math
import struct
from typing import Any

from llvmlite import ir

LANES = 16
_I32, _F32 = ir.IntType(32), ir.FloatType()
NUMBERS, FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)

_ALL, _DOWN, _AS_SET = ir.IntType(16)(-1), _I32(1), _I32(4)
"""All lanes; rounding down; and rounding as the CPU is set to."""

Vector = Any


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
        """A pointer to a vector."""
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, address: Any, kind: Any = FLOATS) -> Vector:
        """Sixteen numbers."""
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
        """a * b + c, rounded once."""
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
        return self._x86("avx512.mask.scalef.ps.512", FLOATS, x, exponents, self.number(0.0), _ALL, _AS_SET)

    def fraction(self, x: Vector) -> Vector:
        """What x is above the whole number below it; 0 of infinities."""
        return self._x86("avx512.mask.reduce.ps.512", FLOATS, x, _DOWN, self.number(0.0), _ALL, _AS_SET)

    def _x86(self, name: str, kind: Any, *arguments: Any) -> Any:
        whole, kinds = f"llvm.x86.{name}", [argument.type for argument in arguments]
        known = self.builder.module.globals.get(whole)
        known = known or ir.Function(self.builder.module, ir.FunctionType(kind, kinds), whole)
        return self.builder.call(known, arguments)

    def _call(self, name: str, *arguments: Vector) -> Vector:
        whole = f"llvm.{name}.v{LANES}f32"
        known = self.builder.module.globals.get(whole)
        kind = ir.FunctionType(FLOATS, [FLOATS] * len(arguments))
        return self.builder.call(known or ir.Function(self.builder.module, kind, whole), arguments)
