"""Gating of MLP units, silu(gate) * up or gelu(gate) * up, sixteen at a time in registers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from cpu_kernels.blocks import BLOCK_OUTPUTS, HALF_BLOCK, PANEL_ROWS
from cpu_kernels.intrinsics import FLOATS, NUMBERS, Vector, Vectors, loop, void_intrinsic
from cpu_kernels.tiles import multiply_tiles

_LANES = HALF_BLOCK
_I64 = ir.IntType(64)
_LOG2E = 1.4426950408889634
_MAX_EXPONENT = 125.0
"""The largest exponent of two, so that the power and its reciprocal are normal numbers."""
_GELU_1, _GELU_3 = (2 * math.sqrt(2 / math.pi) * factor for factor in (1.0, 0.044715))
_MAX_DENOMINATOR = 2.0**125
"""From this denominator 1 + exp(-x) on a gate is 0; its reciprocal would leave the range of float32."""
_RECIPROCAL_BITS = 0x7EF311C7
"""This minus a float32's bits: the bits of its reciprocal to one part in eight; three Newton steps make it exact."""


class _Gates(Vectors):
    """Vectors with the activation functions of gates."""

    def power(self, x: Vector) -> Vector:
        """Two to the x, at most 2**125 and at least 2**-125."""
        return self.power_of_two(self.at_most(self.at_least(x, -_MAX_EXPONENT), _MAX_EXPONENT), 6)

    def over(self, x: Vector, power: Vector) -> Vector:
        """x / (1 + power) without a division, which would take as long as all other instructions of a gate."""
        builder = self.builder
        d = builder.fadd(power, self.number(1.0))
        bits = builder.sub(ir.Constant(NUMBERS, [_RECIPROCAL_BITS] * _LANES), builder.bitcast(d, NUMBERS))
        r = builder.bitcast(bits, FLOATS)
        negative = builder.fsub(self.number(-0.0), d)
        for _ in range(3):
            r = builder.fmul(r, self.multiply_add(negative, r, self.number(2.0)))
        in_range = builder.fcmp_ordered("<", d, self.number(_MAX_DENOMINATOR))
        return builder.fmul(x, builder.select(in_range, r, self.number(0.0)))

    def silu(self, x: Vector) -> Vector:
        """x times the logistic function of x (Elfwing et al. 2018)."""
        return self.over(x, self.power(self.builder.fmul(x, self.number(-_LOG2E))))

    def gelu(self, x: Vector) -> Vector:
        """GELU's approximation with tanh (Hendrycks and Gimpel 2016), written with a power of e."""
        inner = self.multiply_add(self.builder.fmul(x, x), self.number(-_GELU_3), self.number(-_GELU_1))
        return self.over(x, self.power(self.builder.fmul(self.builder.fmul(x, inner), self.number(_LOG2E))))


Gate = Callable[[_Gates, Vector], Vector]


def _gate_vectors(gate: Gate) -> Any:
    """``f(gate, up, y, count)``: y = gate's activation * up, float32 [16 * count] each."""

    def generate(builder: Any, gates: Any, ups: Any, y: Any, count: Any) -> None:
        vectors = _Gates(builder)

        def gate_vector(number: Any, _: list[Any]) -> list[Any]:
            offset = builder.mul(number, _I64(4 * _LANES))
            gate_value, up = (vectors.load(builder.add(address, offset)) for address in (gates, ups))
            builder.store(builder.fmul(gate(vectors, gate_value), up), vectors.at(builder.add(y, offset)), align=4)
            return []

        loop(builder, count, [], gate_vector)

    return void_intrinsic(4, generate)


class GatedRow:
    """Code for rows of a block's sums, int32 [rows, 32], that become units, float32 [rows, 16].

    The sums are scaled back as in ``epilogue.py``. ``addresses`` are sums, constants, absmax, y, the bytes from row to
    row of y, and deltas float32 [2, 32, 16], which are added before the gate.
    """

    def __init__(self, gate: Gate, builder: Any, addresses: Sequence[Any], *, with_deltas: bool) -> None:
        self._gate, self._vectors, self._with_deltas = gate, _Gates(builder), with_deltas
        self._sums, constants, self._largest, self._y, self._stride, self._deltas = addresses
        self._halves = [[self._constant(constants, number, half) for number in (1, 2)] for half in range(2)]

    def compute(self, number: Any) -> None:
        vectors, builder = self._vectors, self._vectors.builder
        factor = vectors.repeated(builder.add(self._largest, builder.mul(number, _I64(4))))
        row_sums = builder.add(self._sums, builder.mul(number, _I64(4 * BLOCK_OUTPUTS)))
        values = []
        for half, (scales, bias) in enumerate(self._halves):
            integers = vectors.load(builder.add(row_sums, _I64(4 * HALF_BLOCK * half)), NUMBERS)
            scaled = builder.fmul(builder.sitofp(integers, FLOATS), scales)
            value = builder.fadd(builder.fmul(scaled, factor), bias)
            if self._with_deltas:
                row_deltas = builder.add(self._deltas, builder.mul(number, _I64(4 * HALF_BLOCK)))
                value = builder.fadd(
                    value, vectors.load(builder.add(row_deltas, _I64(4 * HALF_BLOCK * PANEL_ROWS * half)))
                )
            values.append(value)
        units = builder.fmul(self._gate(vectors, values[0]), values[1])
        builder.store(units, vectors.at(builder.add(self._y, builder.mul(number, self._stride))), align=4)

    def _constant(self, constants: Any, number: int, half: int) -> Vector:
        builder = self._vectors.builder
        return self._vectors.load(builder.add(constants, _I64(4 * (BLOCK_OUTPUTS * number + HALF_BLOCK * half))))


def gated_sums(gate: Gate, *, with_deltas: bool) -> Any:
    """``f(count, sums, constants, absmax, y, stride, deltas)``: scale and gate ``count`` rows, as ``GatedRow``."""

    def generate(builder: Any, count: Any, *addresses: Any) -> None:
        row = GatedRow(gate, builder, addresses, with_deltas=with_deltas)

        def gate_row(number: Any, _: list[Any]) -> list[Any]:
            row.compute(number)
            return []

        loop(builder, count, [], gate_row)

    return void_intrinsic(7, generate)


def gated_beside_products(gate: Gate, *, with_deltas: bool) -> Any:
    """The products of two row tiles as ``tile_products``; each step also gates two rows of sums computed before.

    ``f(x, tile_stride, count, weights, sums, stride, initial, last, sums, constants, absmax, y, stride, deltas)``: the
    first seven are those of ``tile_products``, the last six those of ``gated_sums``, whose rows are 0 to ``last``
    (later steps repeat row ``last``). Tile and vector units work at the same time, which hides the gating.
    """

    def generate(builder: Any, *arguments: Any) -> None:
        last, *addresses = arguments[7:]
        row = GatedRow(gate, builder, addresses, with_deltas=with_deltas)

        def rows(step: Any) -> None:
            for i in range(BESIDE):
                number = builder.add(builder.mul(step, _I64(BESIDE)), _I64(i))
                row.compute(builder.select(builder.icmp_signed("<", number, last), number, last))

        multiply_tiles(builder, 2, arguments[:7], beside=rows)

    return void_intrinsic(14, generate)


BESIDE = 2
"""Rows that are gated in each step of the products."""
SILU, GELU = _Gates.silu, _Gates.gelu
silu_vectors, gelu_vectors = _gate_vectors(SILU), _gate_vectors(GELU)
