"""What gates units, silu(gate) * up or gelu(gate) * up, sixteen at a time in registers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from cpu_kernels.blocks import BLOCK, HALF, ROW_BLOCK
from cpu_kernels.intrinsics import FLOATS, NUMBERS, Vector, Vectors, loop, void_intrinsic
from cpu_kernels.tiles import multiply_tiles

_LANES = HALF
_I64 = ir.IntType(64)
_LOG2E = 1.4426950408889634
_MOST = 125.0
"""Of an exponent of two, so that the power is a normal number."""
_GELU_1, _GELU_3 = (2 * math.sqrt(2 / math.pi) * factor for factor in (1.0, 0.044715))
_SHUT = 2.0**125
"""One plus a power of e from which on a gate is shut; its reciprocal would leave the range of float32."""
_RECIPROCAL = 0x7EF311C7
"""Minus the bits of a number: those of its reciprocal to one part in eight. Three steps of Newton's make it exact."""


class _Gates(Vectors):
    """What opens and shuts."""

    def power(self, x: Vector) -> Vector:
        """Two to the x, at most 2**125 and at least 2**-125."""
        return self.power_of_two(self.at_most(self.at_least(x, -_MOST), _MOST), 6)

    def over(self, x: Vector, power: Vector) -> Vector:
        """x / (1 + power), without a division, which takes as long as all the rest."""
        builder = self.builder
        d = builder.fadd(power, self.number(1.0))
        bits = builder.sub(ir.Constant(NUMBERS, [_RECIPROCAL] * _LANES), builder.bitcast(d, NUMBERS))
        r = builder.bitcast(bits, FLOATS)
        negative = builder.fsub(self.number(-0.0), d)
        for _ in range(3):
            r = builder.fmul(r, self.multiply_add(negative, r, self.number(2.0)))
        open_ = builder.fcmp_ordered("<", d, self.number(_SHUT))
        return builder.fmul(x, builder.select(open_, r, self.number(0.0)))

    def silu(self, x: Vector) -> Vector:
        """x times the logistic function of x (Elfwing et al. 2018)."""
        return self.over(x, self.power(self.builder.fmul(x, self.number(-_LOG2E))))

    def gelu(self, x: Vector) -> Vector:
        """GELU's approximation with tanh (Hendrycks and Gimpel 2016), written with a power of e."""
        inner = self.multiply_add(self.builder.fmul(x, x), self.number(-_GELU_3), self.number(-_GELU_1))
        return self.over(x, self.power(self.builder.fmul(self.builder.fmul(x, inner), self.number(_LOG2E))))


Gate = Callable[[_Gates, Vector], Vector]


def _gate_vectors(gate: Gate) -> Any:
    """``f(gate, up, y, count)``: of float32 [16 * count] each."""

    def generate(builder: Any, gates: Any, ups: Any, y: Any, count: Any) -> None:
        vectors = _Gates(builder)

        def one(number: Any, _: list[Any]) -> list[Any]:
            offset = builder.mul(number, _I64(4 * _LANES))
            first, second = (vectors.load(builder.add(address, offset)) for address in (gates, ups))
            builder.store(builder.fmul(gate(vectors, first), second), vectors.at(builder.add(y, offset)), align=4)
            return []

        loop(builder, count, [], one)

    return void_intrinsic(4, generate)


class GatedRow:
    """Code for rows of a block's sums, int32 [.., 32], that become units, float32 [.., 16]: as ``scale_rows`` does.

    ``addresses`` are sums, constants, largest, y, the bytes between its rows, and deltas float32 [2, 32, 16], which are
    added before.
    """

    def __init__(self, gate: Gate, builder: Any, addresses: Sequence[Any], *, with_deltas: bool) -> None:
        self._gate, self._vectors, self._with_deltas = gate, _Gates(builder), with_deltas
        self._sums, constants, self._largest, self._y, self._stride, self._deltas = addresses
        self._halves = [[self._constant(constants, number, half) for number in (1, 2)] for half in range(2)]

    def compute(self, number: Any) -> None:
        vectors, builder = self._vectors, self._vectors.builder
        factor = vectors.repeated(builder.add(self._largest, builder.mul(number, _I64(4))))
        here = builder.add(self._sums, builder.mul(number, _I64(4 * BLOCK)))
        found = []
        for half, (scales, bias) in enumerate(self._halves):
            integers = vectors.load(builder.add(here, _I64(4 * HALF * half)), NUMBERS)
            scaled = builder.fmul(builder.sitofp(integers, FLOATS), scales)
            whole = builder.fadd(builder.fmul(scaled, factor), bias)
            if self._with_deltas:
                place = builder.add(self._deltas, builder.mul(number, _I64(4 * HALF)))
                whole = builder.fadd(whole, vectors.load(builder.add(place, _I64(4 * HALF * ROW_BLOCK * half))))
            found.append(whole)
        units = builder.fmul(self._gate(vectors, found[0]), found[1])
        builder.store(units, vectors.at(builder.add(self._y, builder.mul(number, self._stride))), align=4)

    def _constant(self, constants: Any, number: int, half: int) -> Vector:
        builder = self._vectors.builder
        return self._vectors.load(builder.add(constants, _I64(4 * (BLOCK * number + HALF * half))))


def gated_sums(gate: Gate, *, with_deltas: bool) -> Any:
    """``f(count, sums, constants, largest, y, stride, deltas)``: so many rows, one after another."""

    def generate(builder: Any, count: Any, *addresses: Any) -> None:
        row = GatedRow(gate, builder, addresses, with_deltas=with_deltas)

        def one(number: Any, _: list[Any]) -> list[Any]:
            row.compute(number)
            return []

        loop(builder, count, [], one)

    return void_intrinsic(7, generate)


def gated_beside_products(gate: Gate, *, with_deltas: bool) -> Any:
    """Products of two row tiles, as ``tile_products``, and beside each of their steps two rows of sums made before.

    ``f(x, apart, count, weights, sums, stride, begin, last, sums, constants, largest, y, stride, deltas)``: the first
    seven are the products'; ``last`` is the last row of those sums, which rows beyond are taken for. Tiles and vectors
    are multiplied at the same time, where one after the other takes as long as both.
    """

    def generate(builder: Any, *arguments: Any) -> None:
        last, *addresses = arguments[7:]
        row = GatedRow(gate, builder, addresses, with_deltas=with_deltas)

        def rows(step: Any) -> None:
            for one in range(BESIDE):
                number = builder.add(builder.mul(step, _I64(BESIDE)), _I64(one))
                row.compute(builder.select(builder.icmp_signed("<", number, last), number, last))

        multiply_tiles(builder, 2, arguments[:7], beside=rows)

    return void_intrinsic(14, generate)


BESIDE = 2
"""Rows that are gated beside a step of the products."""
SILU, GELU = _Gates.silu, _Gates.gelu
silu_vectors, gelu_vectors = _gate_vectors(SILU), _gate_vectors(GELU)
