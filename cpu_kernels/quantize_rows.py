"""Quantization of activations, row by row: q = round(x * 127 / absmax) + 128 as uint8, absmax = max |x| of the row."""

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
_PREFETCH_DISTANCE = 4096
"""Bytes ahead that rows are prefetched: the CPU's own prefetcher stops at the end of a page; measured."""
_WITHOUT_SIGN = 0x7FFFFFFF
_ROUNDING_OFFSET = np.float32(128.5)
"""The zero point and a half: truncation of the sum then rounds to nearest."""
_ONE, _QMAX = np.float32(1.0), np.float32(127.0)
_TINY_BITS = np.float32(1e-30).view(np.int32)


def _part(vectors: Vectors, x: Any, inlier_mask: Any | None, number: Any, part: int) -> Vector:
    """Sixteen numbers of x: part ``part`` of step ``number``, times the mask if there is one."""
    builder = vectors.builder
    offset = builder.add(builder.mul(number, _I64(4 * TILE_BYTES)), _I64(4 * LANES * part))
    found = vectors.load(builder.add(x, offset))
    return found if inlier_mask is None else builder.fmul(found, vectors.load(builder.add(inlier_mask, offset)))


def _absmax_bits(*, masked: bool) -> Any:
    """``f(x, inlier_mask, count, least, out)``: out int32 = max(``least``, the bits of |x|), x float32 [64 * count].

    Floats above zero are in the order of their bits, and NaN is above all. With ``masked``, x is first multiplied by
    ``inlier_mask``.
    """

    def generate(builder: Any, x: Any, inlier_mask: Any, count: Any, least: Any, out: Any) -> None:
        vectors = Vectors(builder)
        mask = inlier_mask if masked else None
        begin = vectors.all_of(builder.trunc(least, _I32))

        def step(number: Any, found: list[Vector]) -> list[Vector]:
            after = []
            step_x = builder.add(x, builder.mul(number, _I64(4 * TILE_BYTES)))
            prefetch_lines(builder, step_x, range(_PREFETCH_DISTANCE, _PREFETCH_DISTANCE + 4 * TILE_BYTES, 64), 2)
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
    """``f(x, inlier_mask, count, scale, target, step_stride)``: uint8 x [64 * count] * scale + 128.

    ``scale`` is the address of a float32, ``step_stride`` the bytes from one 64 bytes of the result to the next.
    """

    def generate(builder: Any, x: Any, inlier_mask: Any, count: Any, scale: Any, target: Any, step_stride: Any) -> None:
        vectors = Vectors(builder)
        factor, rounding_offset = vectors.repeated(scale), vectors.number(float(_ROUNDING_OFFSET))
        kind = ir.VectorType(_I8, LANES)

        def step(number: Any, _: list[Vector]) -> list[Vector]:
            step_target = builder.add(target, builder.mul(number, step_stride))
            for part in range(_PARTS):
                found = _part(vectors, x, inlier_mask if masked else None, number, part)
                whole = builder.fptosi(builder.fadd(builder.fmul(found, factor), rounding_offset), NUMBERS)
                place = vectors.at(builder.add(step_target, _I64(LANES * part)), kind)
                builder.store(builder.trunc(whole, kind), place, align=1)
            return []

        loop(builder, count, [], step)

    return void_intrinsic(6, generate)


_absmax, _absmax_of_inliers = _absmax_bits(masked=False), _absmax_bits(masked=True)
_put, _put_inliers, _scale_memory = _put_bytes(masked=False), _put_bytes(masked=True), scratch(4)


@njit(error_model="numpy")
def quantize_row(a: Any, row: int, target: int, step_stride: int) -> None:
    """Quantize a row of x to ``target``, and store its absmax and its outliers; outliers count as zeros in both.

    ``step_stride``: bytes from one 64 bytes of the result to the next.
    """
    x, absmax_address, whole = a.x + 4 * row * a.inputs, a.absmax + 4 * row, a.inputs // TILE_BYTES
    integers(absmax_address)[0] = _TINY_BITS
    if whole and a.inlier_mask:
        _absmax_of_inliers(x, a.inlier_mask, whole, _TINY_BITS, absmax_address)
    elif whole:
        _absmax(x, 0, whole, _TINY_BITS, absmax_address)
    for i in range(TILE_BYTES * whole, a.inputs):
        number = floats(x)[i] * floats(a.inlier_mask)[i] if a.inlier_mask else floats(x)[i]
        integers(absmax_address)[0] = max(integers(absmax_address)[0], bits_of(abs(number)))
    for i in range(a.num_outliers):
        floats(a.outlier_inputs)[row * a.num_outliers + i] = floats(x)[longs(a.outlier_indices)[i]]
    memory = _scale_memory()
    scale = _ONE / floats(absmax_address)[0] * _QMAX  # in two steps as torch's kernels, so that the bytes are equal
    floats(memory)[0] = scale
    if whole and a.inlier_mask:
        _put_inliers(x, a.inlier_mask, whole, memory, target, step_stride)
    elif whole:
        _put(x, 0, whole, memory, target, step_stride)
    for i in range(TILE_BYTES * whole, a.inputs):
        number = floats(x)[i] * floats(a.inlier_mask)[i] if a.inlier_mask else floats(x)[i]
        quantized = np.uint8(np.int32(number * scale + _ROUNDING_OFFSET))
        bytes_at(target + whole * step_stride)[i - TILE_BYTES * whole] = quantized
