"""Rows laid out as AMX's tiles want them, and results back: sixteen by sixteen numbers of 32 bits, in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cpu_kernels.blocks import BLOCK, TILE_BYTES, TILE_ROWS
from cpu_kernels.intrinsics import loop, void_intrinsic
from cpu_kernels.vectors import FLOATS, LANES, NUMBERS, Vector, Vectors

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_HALVES = ir.VectorType(ir.IntType(16), 2 * LANES)


def transposed(builder: Any, rows: list[Vector]) -> list[Vector]:
    """Sixteen vectors of sixteen numbers of 32 bits; pairs of them swap ever smaller parts."""
    distance = LANES // 2
    while distance:
        low = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
        high = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
        swapped = list(rows)
        for row in range(LANES):
            if not row & distance:
                pair = rows[row], rows[row + distance]
                swapped[row] = builder.shuffle_vector(*pair, ir.Constant(NUMBERS, low))
                swapped[row + distance] = builder.shuffle_vector(*pair, ir.Constant(NUMBERS, high))
        rows, distance = swapped, distance // 2
    return rows


def _row(builder: Any, rows: Any, stride: Any, last: Any, number: int) -> Any:
    """The address of a row, that of the last for those behind it."""
    there = builder.select(builder.icmp_signed("<", last, _I64(number)), last, _I64(number))
    return builder.add(rows, builder.mul(stride, there))


def _pack_queries(builder: Any, rows: Any, stride: Any, last: Any, tiles: Any, steps: Any) -> None:
    vectors = Vectors(builder)
    places = [_row(builder, rows, stride, last, row) for row in range(2 * LANES)]

    def step(number: Any, _: list[Any]) -> list[Any]:
        offset = builder.mul(number, _I64(2 * TILE_BYTES))
        tile = builder.add(tiles, builder.mul(number, _I64(2 * TILE_ROWS * TILE_BYTES)))
        for half in range(2):
            pairs = []
            for place in places[LANES * half : LANES * (half + 1)]:
                here = builder.add(place, offset)
                pairs.append(vectors.rounded(vectors.load(here), vectors.load(builder.add(here, _I64(TILE_BYTES)))))
            for pair, lanes in enumerate(transposed(builder, pairs)):
                there = builder.add(tile, _I64(2 * TILE_BYTES * pair + TILE_BYTES * half))
                builder.store(lanes, vectors.at(there, NUMBERS), align=4)
        return []

    loop(builder, steps, [], step)


def _pack_values(builder: Any, rows: Any, stride: Any, last: Any, tiles: Any, apart: Any) -> None:
    vectors, halves = Vectors(builder), []
    for half in range(2):
        pairs = []
        for row in range(LANES * half, LANES * (half + 1)):
            pair = vectors.load(_row(builder, rows, stride, last, row), NUMBERS)
            there = builder.icmp_signed("<=", _I64(row), last)
            pairs.append(builder.select(there, pair, ir.Constant(NUMBERS, None)))
        halves.append([builder.bitcast(one, _HALVES) for one in transposed(builder, pairs)])
    for pair, (first, second) in enumerate(zip(*halves, strict=True)):
        for odd in range(2):
            lanes = ir.Constant(ir.VectorType(_I32, 2 * LANES), list(range(odd, 4 * LANES, 2)))
            dim = 2 * pair + odd
            tile = builder.add(tiles, builder.mul(apart, _I64(dim // TILE_ROWS)))
            there = vectors.at(builder.add(tile, _I64(dim % TILE_ROWS * TILE_BYTES)), _HALVES)
            builder.store(builder.shuffle_vector(first, second, lanes), there, align=4)


def _unpack_sums(builder: Any, sums: Any, factors: Any, rows: Any, stride: Any, last: Any, steps: Any) -> None:
    vectors = Vectors(builder)
    places = [_row(builder, rows, stride, last, row) for row in range(2 * LANES)]

    def step(number: Any, _: list[Any]) -> list[Any]:
        offset = builder.mul(number, _I64(4 * LANES))
        here = builder.add(sums, builder.mul(number, _I64(4 * BLOCK * LANES)))
        for half in range(2):
            factor = vectors.load(builder.add(factors, _I64(4 * LANES * half)))
            lanes = []
            for dim in range(LANES):
                one = vectors.load(builder.add(here, _I64(4 * BLOCK * dim + 4 * LANES * half)))
                lanes.append(builder.fmul(one, factor))
            for place, row in zip(places[LANES * half :], transposed(builder, lanes), strict=False):
                builder.store(row, vectors.at(builder.add(place, offset), FLOATS), align=4)
        return []

    loop(builder, steps, [], step)


pack_queries = void_intrinsic(5, _pack_queries)
"""``f(rows, stride, last, tiles, steps)``: float32 [32, 32 * steps] -> bfloat16 [steps, 16, 32 rows, 2].

In these three, ``stride`` bytes lie between rows, and rows behind the last are taken for it."""
pack_values = void_intrinsic(5, _pack_values)
"""``f(rows, stride, last, tiles, apart)``: bfloat16 [32, 32] -> two tiles [16, 32 rows], ``apart`` bytes apart.

Rows behind the last are zeros."""
unpack_sums = void_intrinsic(6, _unpack_sums)
"""``f(sums, factors, rows, stride, last, steps)``: float32 [16 * steps, 32] times factors [32] -> [32, 16 * steps]."""
