"""Rows of floats put on the grid: bytes around 128, so that a row's largest absolute value is 127 away."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cpu_kernels.blocks import TILE_BYTES
from cpu_kernels.intrinsics import loop, prefetch_lines, void_intrinsic
from cpu_kernels.vectors import LANES, NUMBERS, Vector, Vectors

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_PARTS = TILE_BYTES // LANES
_AHEAD = 4096
"""Bytes that rows are called into the caches ahead, which the CPU itself does not across pages; measured."""
_WITHOUT_SIGN, MIDDLE = 0x7FFFFFFF, 128.5
"""Half a step more than the middle, so that cutting off rounds."""


def _part(vectors: Vectors, x: Any, others: Any | None, number: Any, part: int) -> Vector:
    """Sixteen numbers, those of outliers as zeros."""
    builder = vectors.builder
    offset = builder.add(builder.mul(number, _I64(4 * TILE_BYTES)), _I64(4 * LANES * part))
    found = vectors.load(builder.add(x, offset))
    return found if others is None else builder.fmul(found, vectors.load(builder.add(others, offset)))


def largest_bits(*, masked: bool) -> Any:
    """``f(x, others, count, least, out)``: out int32 = the greatest of ``least`` and the bits of |x|, x [64 * count].

    Floats above zero are in the order of their bits, and NaN above all. With ``masked``, x is multiplied by others.
    """

    def generate(builder: Any, x: Any, others: Any, count: Any, least: Any, out: Any) -> None:
        vectors = Vectors(builder)
        mask = others if masked else None
        begin = vectors.all_of(builder.trunc(least, _I32))

        def step(number: Any, found: list[Vector]) -> list[Vector]:
            after = []
            here = builder.add(x, builder.mul(number, _I64(4 * TILE_BYTES)))
            prefetch_lines(builder, here, range(_AHEAD, _AHEAD + 4 * TILE_BYTES, 64), 2)
            for part, most in enumerate(found):
                bits = builder.bitcast(_part(vectors, x, mask, number, part), NUMBERS)
                bits = builder.and_(bits, ir.Constant(NUMBERS, [_WITHOUT_SIGN] * LANES))
                after.append(builder.select(builder.icmp_signed(">", bits, most), bits, most))
            return after

        found = loop(builder, count, [begin] * _PARTS, step)
        name, kind = f"llvm.vector.reduce.smax.v{LANES}i32", ir.FunctionType(_I32, [NUMBERS])
        reduce = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        while len(found) > 1:
            first, second, *rest = found
            found = [*rest, builder.select(builder.icmp_signed(">", first, second), first, second)]
        builder.store(builder.call(reduce, found), builder.inttoptr(out, _I32.as_pointer()))

    return void_intrinsic(5, generate)


def put_bytes(*, masked: bool) -> Any:
    """``f(x, others, count, scale, target, apart)``: x [64 * count] times the float32 at ``scale`` as bytes around 128.

    Sixty-four are one behind the other, and ``apart`` bytes between these.
    """

    def generate(builder: Any, x: Any, others: Any, count: Any, scale: Any, target: Any, apart: Any) -> None:
        vectors = Vectors(builder)
        factor, middle = vectors.repeated(scale), vectors.number(MIDDLE)
        kind = ir.VectorType(_I8, LANES)

        def step(number: Any, _: list[Vector]) -> list[Vector]:
            there = builder.add(target, builder.mul(number, apart))
            for part in range(_PARTS):
                found = _part(vectors, x, others if masked else None, number, part)
                whole = builder.fptosi(builder.fadd(builder.fmul(found, factor), middle), NUMBERS)
                place = vectors.at(builder.add(there, _I64(LANES * part)), kind)
                builder.store(builder.trunc(whole, kind), place, align=1)
            return []

        loop(builder, count, [], step)

    return void_intrinsic(6, generate)
