"""Arithmetic of sixteen float32 in registers, and what is made of it for AMX's products."""

from __future__ import annotations

import math
import struct
from typing import Any

from llvmlite import ir

from server.native.intrinsics import loop, void_intrinsic

LANES = 16
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
NUMBERS, FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)

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
        number = self.builder.load(self.builder.inttoptr(address, _F32.as_pointer()), align=4)
        alone = self.builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, _I32(0))
        return self.builder.shuffle_vector(alone, alone, ir.Constant(NUMBERS, None))

    def multiply_add(self, a: Vector, b: Vector, c: Vector) -> Vector:
        """a * b + c, rounded once."""
        return self._call("fma", a, b, c)

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

    def as_bfloat16(self, first: Vector, second: Vector) -> Any:
        """Both, one behind the other, rounded to bfloat16, as sixteen numbers of 32 bits."""
        kind, name = ir.VectorType(_BFloat16(), 2 * LANES), "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        known = self.builder.module.globals.get(name)
        both = known or ir.Function(self.builder.module, ir.FunctionType(kind, [FLOATS, FLOATS]), name)
        return self.builder.bitcast(self.builder.call(both, [second, first]), NUMBERS)

    def _call(self, name: str, *arguments: Vector) -> Vector:
        whole = f"llvm.{name}.v{LANES}f32"
        known = self.builder.module.globals.get(whole)
        kind = ir.FunctionType(FLOATS, [FLOATS] * len(arguments))
        return self.builder.call(known or ir.Function(self.builder.module, kind, whole), arguments)


_TERMS = 4
"""Which are exact to 4e-5; the powers are rounded to 4e-3."""


def _powers_of_two(builder: Any, scores: Any, tile: Any, steps: Any, numbers: Any, total: Any) -> None:
    vectors = Vectors(builder)
    factor, offset = vectors.repeated(numbers), vectors.repeated(builder.add(numbers, _I64(4)))

    def step(number: Any, sums: list[Any]) -> list[Any]:
        here, powers = builder.add(scores, builder.mul(number, _I64(8 * LANES))), []
        for half in range(2):
            score = vectors.load(builder.add(here, _I64(4 * LANES * half)))
            x = vectors.at_least(vectors.multiply_add(score, factor, offset), -127.0)
            powers.append(vectors.power_of_two(x, _TERMS))
        builder.store(
            vectors.as_bfloat16(*powers),
            vectors.at(builder.add(tile, builder.mul(number, _I64(1024))), NUMBERS),
            align=4,
        )
        return [builder.fadd(one, power) for one, power in zip(sums, powers, strict=True)]

    first, second = loop(builder, steps, [vectors.number(0.0)] * 2, step)
    whole, distance = builder.fadd(first, second), LANES // 2
    while distance:
        lanes = ir.Constant(NUMBERS, [(lane + distance) % LANES for lane in range(LANES)])
        whole, distance = builder.fadd(whole, builder.shuffle_vector(whole, whole, lanes)), distance // 2
    builder.store(builder.extract_element(whole, _I32(0)), builder.inttoptr(total, _F32.as_pointer()))


powers_of_two = void_intrinsic(5, _powers_of_two)
"""``f(scores, tile, steps, numbers, total)``: two to the power of scores float32 [32 * steps] times the first number
plus the second, of which none is above 0, as bfloat16 into a row of tiles, [steps] 1,024 bytes apart; and their sum."""
