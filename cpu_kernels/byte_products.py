"""Bytes multiplied by vectors of them, VPDPBUSD of VNNI, on blocks of int8 weights; and what finishes the sums."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cpu_kernels.blocks import BLOCK, HALF, ROW_BLOCK
from cpu_kernels.intrinsics import loop, prefetch_lines, void_intrinsic
from cpu_kernels.vectors import FLOATS, NUMBERS, Vector, Vectors

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_AHEAD = 4096
"""Bytes that weights are called into the caches ahead of the products, where they come from memory; measured."""


def dot_products(rows: int, bits: int, *, prefetch: bool = False) -> Any:
    """``f(x, stride, count, weights, sums)``: sums int32 [rows, 32] += x uint8 [rows, 4 * count] @ a block of weights.

    By VPDPBUSD on vectors of so many bits. ``weights`` int8 [count, 32, 4]; ``stride`` bytes lie between rows of x.
    """
    lanes = bits // 32
    per_block = BLOCK // lanes
    num_registers = (32 if bits == 512 else 16) - 4
    at_once = min(per_block, max(1, num_registers // rows))
    while per_block % at_once:
        at_once -= 1

    def generate(builder: Any, x: Any, stride: Any, count: Any, weights: Any, sums: Any) -> None:
        for first in range(0, per_block, at_once):
            ahead = _AHEAD if prefetch else 0
            _dot_products(builder, rows, lanes, range(first, first + at_once), ahead, (x, stride, count, weights, sums))

    return void_intrinsic(5, generate)


def _dot_products(builder: Any, rows: int, lanes: int, vectors: range, ahead: int, arguments: Any) -> None:
    x, stride, count, weights, sums = arguments
    numbers, octets = ir.VectorType(_I32, lanes), ir.VectorType(_I8, 4 * lanes)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    product = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(numbers, [numbers, octets, octets]), name
    )

    def at(address: Any, offset: Any, kind: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    def sum_at(row: int, vector: int) -> Any:
        return at(sums, _I64(4 * (BLOCK * row + lanes * vector)), numbers)

    cells = [(row, vector) for row in range(rows) for vector in vectors]
    begin = {cell: builder.load(sum_at(*cell), align=4) for cell in cells}
    before, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(_I64(0), before)
    current = {cell: builder.phi(numbers) for cell in cells}
    here = builder.add(weights, builder.mul(step, _I64(4 * BLOCK)))
    loaded = {one: builder.load(at(here, _I64(4 * lanes * one), octets), align=1) for one in vectors}
    if ahead:
        prefetch_lines(
            builder, here, range(ahead + 4 * lanes * vectors[0], ahead + 4 * lanes * (vectors[-1] + 1), 64), 2
        )
    after = {}
    for row in range(rows):
        offset = builder.add(builder.mul(stride, _I64(row)), builder.mul(step, _I64(4)))
        four = builder.load(at(x, offset, _I32), align=1)
        single = builder.insert_element(ir.Constant(numbers, ir.Undefined), four, _I32(0))
        repeated = builder.bitcast(builder.shuffle_vector(single, single, ir.Constant(numbers, None)), octets)
        for one in vectors:
            after[row, one] = builder.call(product, [current[row, one], repeated, loaded[one]])
    following = builder.add(step, _I64(1))
    step.add_incoming(following, loop)
    for cell in cells:
        current[cell].add_incoming(begin[cell], before)
        current[cell].add_incoming(after[cell], loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)
    for cell in cells:
        builder.store(after[cell], sum_at(*cell), align=4)


def scale_rows(*, with_outliers: bool = False, with_deltas: bool = False) -> Any:
    """``f(count, sums, constants, largest, y, apart, stride, deltas)``: y = sums * scales * largest + bias + deltas.

    sums are int32 [count, 32]; behind 32 numbers that sums begin with, ``constants`` are the scales and the bias,
    float32. Of a row of y the second sixteen lie ``apart`` bytes behind the first; ``stride`` bytes are between rows.
    Deltas, where there are any, are float32 [2, 32, 16], those of the first sixteen outputs first. With outliers, f
    takes three more: their ``values`` float32 [count, number], by which their ``weights`` float32 [number, 32] are
    added, and the ``number``.
    """

    def generate(builder: Any, count: Any, sums: Any, *others: Any) -> None:
        constants, largest, y, apart, stride, deltas, *outliers = others
        vectors = Vectors(builder)

        def part(address: Any, number: int, half: int, kind: Any = FLOATS) -> Any:
            return vectors.load(builder.add(address, _I64(4 * (BLOCK * number + HALF * half))), kind)

        halves = [[part(constants, one, half) for one in (1, 2)] for half in range(2)]

        def row(number: Any, _: list[Any]) -> list[Any]:
            here, there = (
                builder.add(at, builder.mul(number, step)) for at, step in ((sums, _I64(4 * BLOCK)), (y, stride))
            )
            factor = vectors.repeated(builder.add(largest, builder.mul(number, _I64(4))))
            results = []
            for half, (scale, bias) in enumerate(halves):
                whole = part(here, 0, half, NUMBERS)
                scaled = builder.fmul(builder.fmul(builder.sitofp(whole, FLOATS), scale), factor)
                results.append(builder.fadd(scaled, bias))
            if with_outliers:
                results = _with_outliers(vectors, number, results, *outliers)
            if with_deltas:
                mine = builder.add(deltas, builder.mul(number, _I64(4 * HALF)))
                added = [vectors.load(builder.add(mine, _I64(4 * HALF * ROW_BLOCK * half))) for half in range(2)]
                results = [builder.fadd(result, delta) for result, delta in zip(results, added, strict=True)]
            for half, result in enumerate(results):
                place = builder.add(there, builder.mul(apart, _I64(half)))
                builder.store(result, vectors.at(place), align=4)
            return []

        loop(builder, count, [], row)

    return void_intrinsic(11 if with_outliers else 8, generate)


def _with_outliers(
    vectors: Vectors, row: Any, results: list[Vector], values: Any, weights: Any, number: Any
) -> list[Vector]:
    """A row's results with what its outliers add, one outlier after another."""
    builder = vectors.builder
    mine = builder.add(values, builder.mul(builder.mul(row, number), _I64(4)))

    def outlier(one: Any, found: list[Vector]) -> list[Vector]:
        value = vectors.repeated(builder.add(mine, builder.mul(one, _I64(4))))
        here = builder.add(weights, builder.mul(one, _I64(4 * BLOCK)))
        products = [builder.fmul(value, vectors.load(builder.add(here, _I64(4 * HALF * half)))) for half in range(2)]
        return [builder.fadd(result, product) for result, product in zip(found, products, strict=True)]

    return loop(builder, number, results, outlier)
