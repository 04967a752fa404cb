"""The epilogue of a GEMM: its sums are scaled back, changed by adapters, gated, and written."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit

from cpu_kernels.blocks import BLOCK, BY_GELU, BY_SILU, CHUNK, HALF, NO_GATING, ROW_BLOCK
from cpu_kernels.gating import GELU, SILU, gated_sums, gelu_vectors, silu_vectors
from cpu_kernels.intrinsics import FLOATS, NUMBERS, Vector, Vectors, floats, longs, loop, scratch, void_intrinsic
from cpu_kernels.lora_tiles import low_by_b, touches

_I64 = ir.IntType(64)


def _scale_by_rows(*, with_outliers: bool = False, with_deltas: bool = False) -> Any:
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


_scale_rows, _scale_with_outliers = _scale_by_rows(), _scale_by_rows(with_outliers=True)
_scale_with_deltas, _scale_with_both = (
    _scale_by_rows(with_deltas=True),
    _scale_by_rows(with_outliers=True, with_deltas=True),
)
_silu, _gelu = (gated_sums(gate, with_deltas=False) for gate in (SILU, GELU))
_silu_with_deltas, _gelu_with_deltas = (gated_sums(gate, with_deltas=True) for gate in (SILU, GELU))
_values_memory, _deltas_memory = scratch(4 * BLOCK * CHUNK), scratch(4 * BLOCK * ROW_BLOCK)


@njit(error_model="numpy")
def _scale(a: Any, row: int, count: int, block: int, sums: int, y: int, apart: int, stride: int, deltas: int) -> None:
    """A block's sums of some rows, scaled back, with what outliers and, where there are any, deltas add."""
    constants, largest = a.constants + 12 * BLOCK * block, a.largest + 4 * row
    if a.num_outliers:
        values, weights = a.apart + 4 * row * a.num_outliers, a.outlier_weights + 4 * BLOCK * a.num_outliers * block
        if deltas:
            _scale_with_both(count, sums, constants, largest, y, apart, stride, deltas, values, weights, a.num_outliers)
        else:
            _scale_with_outliers(count, sums, constants, largest, y, apart, stride, 0, values, weights, a.num_outliers)
    elif deltas:
        _scale_with_deltas(count, sums, constants, largest, y, apart, stride, deltas)
    else:
        _scale_rows(count, sums, constants, largest, y, apart, stride, 0)


@njit(error_model="numpy")
def _gate(a: Any, row: int, count: int, block: int, sums: int, deltas: int) -> None:
    """As ``_scale``, where there are no outliers, and gated, into y."""
    constants, largest, stride = a.constants + 12 * BLOCK * block, a.largest + 4 * row, 4 * HALF * a.blocks
    y = a.y + row * stride + 4 * HALF * block
    if a.gating == BY_SILU:
        if deltas:
            _silu_with_deltas(count, sums, constants, largest, y, stride, deltas)
        else:
            _silu(count, sums, constants, largest, y, stride, 0)
    elif deltas:
        _gelu_with_deltas(count, sums, constants, largest, y, stride, deltas)
    else:
        _gelu(count, sums, constants, largest, y, stride, 0)


@njit(error_model="numpy")
def finish(a: Any, row: int, count: int, block: int, sums: int, deltas: int) -> None:
    """A block's sums of some rows, scaled back, into y; with ``deltas``, 0 or those of a panel of rows."""
    half, output = HALF * a.blocks, HALF * block
    if a.gating == NO_GATING and half + output + HALF <= a.outputs:
        y = a.y + 4 * (row * a.outputs + output)
        _scale(a, row, count, block, sums, y, 4 * half, 4 * a.outputs, deltas)
    elif a.gating != NO_GATING and not a.num_outliers:
        _gate(a, row, count, block, sums, deltas)
    else:
        values, apart = _values_memory(), 4 * HALF * count  # one half behind the other
        _scale(a, row, count, block, sums, values, apart, 4 * HALF, deltas)
        _put_values(a, row, count, block, values, apart)


@njit(error_model="numpy")
def _put_values(a: Any, row: int, count: int, block: int, values: int, apart: int) -> None:
    """A block's values of some rows, float32 [count, 16] of each half, into y."""
    half, output = HALF * a.blocks, HALF * block
    first, second = floats(values), floats(values + apart)
    if a.gating == BY_SILU:
        silu_vectors(values, values + apart, values, count)
    elif a.gating == BY_GELU:
        gelu_vectors(values, values + apart, values, count)
    width = a.outputs if a.gating == NO_GATING else half
    for one in range(count):
        y = floats(a.y + 4 * ((row + one) * width + output))
        for i in range(min(HALF, width - output)):
            y[i] = first[HALF * one + i]
        for i in range(min(HALF, width - output - half)):
            y[half + i] = second[HALF * one + i]


@njit(error_model="numpy")
def no_deltas(a: Any, block: int, count: int, deltas: int) -> int:
    """Where those of a few rows for so many blocks are: on CPUs where another kernel adds deltas, nowhere."""
    return 0


@njit(error_model="numpy")
def deltas_of_blocks(a: Any, block: int, count: int, deltas: int) -> int:
    """The same by tiles, float32 [count, 2, 32, 16]; 0 if no row has an adapter.

    Of several blocks at once, as tiles that have not multiplied for a microsecond take a fifth of one to begin.
    """
    if a.runs == 0 or longs(a.runs)[0] == 0:
        return 0
    for one in range(count):
        low_by_b(a, 0, a.rows, block + one, deltas + 4 * BLOCK * ROW_BLOCK * one)
    return deltas


@njit(error_model="numpy")
def finish_with_deltas(a: Any, row: int, count: int, block: int, sums: int) -> None:
    """As ``finish``, with what adapters of these rows add; no more than a panel of rows, which ``row`` begins."""
    deltas = 0
    if a.runs != 0 and touches(a, row, count):
        deltas = _deltas_memory()
        low_by_b(a, row, count, block, deltas)
    finish(a, row, count, block, sums, deltas)
