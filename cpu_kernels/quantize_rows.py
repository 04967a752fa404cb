"""Rows of floats quantized: bytes around 128, so that a row's largest absolute value is 127 away."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from cpu_kernels.blocks import TILE_BYTES
from cpu_kernels.intrinsics import (
    LANES,
    NUMBERS,
    Vector,
    Vectors,
    bits_of,
    bytes_at,
    call_llvm,
    floats,
    integers,
    longs,
    loop,
    prefetch_lines,
    scratch,
    void_intrinsic,
)

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_PARTS = TILE_BYTES // LANES
_AHEAD = 4096
"""Bytes that rows are called into the caches ahead, which the CPU itself does not across pages; measured."""
_WITHOUT_SIGN = 0x7FFFFFFF
_MIDDLE = np.float32(128.5)
"""Half a step more than the middle, so that cutting off rounds."""
_ONE, _QMAX = np.float32(1.0), np.float32(127.0)
_TINY_BITS = np.float32(1e-30).view(np.int32)


def _part(vectors: Vectors, x: Any, others: Any | None, number: Any, part: int) -> Vector:
    """Sixteen numbers, those of outliers as zeros."""
    builder = vectors.builder
    offset = builder.add(builder.mul(number, _I64(4 * TILE_BYTES)), _I64(4 * LANES * part))
    found = vectors.load(builder.add(x, offset))
    return found if others is None else builder.fmul(found, vectors.load(builder.add(others, offset)))


def _largest_bits(*, masked: bool) -> Any:
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
        while len(found) > 1:
            first, second, *rest = found
            found = [*rest, builder.select(builder.icmp_signed(">", first, second), first, second)]
        largest = call_llvm(builder, f"vector.reduce.smax.v{LANES}i32", _I32, *found)
        builder.store(largest, builder.inttoptr(out, _I32.as_pointer()))

    return void_intrinsic(5, generate)


def _put_bytes(*, masked: bool) -> Any:
    """``f(x, others, count, scale, target, apart)``: x [64 * count] times the float32 at ``scale`` as bytes around 128.

    Sixty-four are one behind the other, and ``apart`` bytes between these.
    """

    def generate(builder: Any, x: Any, others: Any, count: Any, scale: Any, target: Any, apart: Any) -> None:
        vectors = Vectors(builder)
        factor, middle = vectors.repeated(scale), vectors.number(float(_MIDDLE))
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


_largest, _largest_of_others = _largest_bits(masked=False), _largest_bits(masked=True)
_put, _put_others, _scale_memory = _put_bytes(masked=False), _put_bytes(masked=True), scratch(4)


@njit(error_model="numpy")
def quantize_row(a: Any, row: int, target: int, apart: int) -> None:
    """A row of x as bytes around 128, and its largest absolute value; outliers count as zeros.

    ``apart`` bytes lie between the beginnings of each 64 bytes and the next.
    """
    x, largest_at, whole = a.x + 4 * row * a.inputs, a.largest + 4 * row, a.inputs // TILE_BYTES
    integers(largest_at)[0] = _TINY_BITS
    if whole and a.others:
        _largest_of_others(x, a.others, whole, _TINY_BITS, largest_at)
    elif whole:
        _largest(x, 0, whole, _TINY_BITS, largest_at)
    for i in range(TILE_BYTES * whole, a.inputs):
        number = floats(x)[i] * floats(a.others)[i] if a.others else floats(x)[i]
        integers(largest_at)[0] = max(integers(largest_at)[0], bits_of(abs(number)))
    for one in range(a.num_outliers):
        floats(a.apart)[row * a.num_outliers + one] = floats(x)[longs(a.outliers)[one]]
    memory = _scale_memory()
    scale = _ONE / floats(largest_at)[0] * _QMAX  # in two steps as torch's kernels, so that bytes are theirs
    floats(memory)[0] = scale
    if whole and a.others:
        _put_others(x, a.others, whole, memory, target, apart)
    elif whole:
        _put(x, 0, whole, memory, target, apart)
    for i in range(TILE_BYTES * whole, a.inputs):
        number = floats(x)[i] * floats(a.others)[i] if a.others else floats(x)[i]
        bytes_at(target + whole * apart)[i - TILE_BYTES * whole] = np.uint8(np.int32(number * scale + _MIDDLE))
