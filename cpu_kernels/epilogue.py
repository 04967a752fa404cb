"""The epilogue of a GEMM: scale the sums back, add LoRA deltas, gate, and write."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit

from cpu_kernels.blocks import BLOCK_OUTPUTS, BY_GELU, BY_SILU, CHUNK_ROWS, HALF_BLOCK, NO_GATING, PANEL_ROWS
from cpu_kernels.gating import GELU, SILU, gated_sums, gelu_vectors, silu_vectors
from cpu_kernels.intrinsics import FLOATS, NUMBERS, Vector, Vectors, floats, longs, loop, scratch, void_intrinsic
from cpu_kernels.lora_tiles import any_row_has_adapter, multiply_b

_I64 = ir.IntType(64)


def _scale_by_rows(*, with_outliers: bool = False, with_deltas: bool = False) -> Any:
    """``f(count, sums, constants, absmax, y, half_stride, stride, deltas)``: y = sums scaled back + bias + deltas.

    ``sums`` int32 [count, 32]; ``constants`` [3, 32]: initial sums (not used here), float32 scales and bias; ``absmax``
    float32 [count]. In y, bytes: from the first sixteen outputs of a row to the second ``half_stride``, from row to row
    ``stride``. ``deltas`` float32 [2 halves of outputs, 32 rows, 16], only ``with_deltas``. ``with_outliers`` f takes
    three more and adds ``inputs @ weights``: ``inputs`` float32 [count, number], ``weights`` float32 [number, 32], and
    ``number``.
    """

    def generate(
        builder: Any,
        count: Any,
        sums: Any,
        constants: Any,
        absmax: Any,
        y: Any,
        half_stride: Any,
        stride: Any,
        deltas: Any,
        *outliers: Any,
    ) -> None:
        vectors = Vectors(builder)

        def part(address: Any, number: int, half: int, kind: Any = FLOATS) -> Any:
            return vectors.load(builder.add(address, _I64(4 * (BLOCK_OUTPUTS * number + HALF_BLOCK * half))), kind)

        halves = [(part(constants, 1, half), part(constants, 2, half)) for half in range(2)]  # scales, bias

        def row(number: Any, _: list[Any]) -> list[Any]:
            row_sums = builder.add(sums, builder.mul(number, _I64(4 * BLOCK_OUTPUTS)))
            row_y = builder.add(y, builder.mul(number, stride))
            factor = vectors.repeated(builder.add(absmax, builder.mul(number, _I64(4))))
            results = []
            for half, (scale, bias) in enumerate(halves):
                integers = part(row_sums, 0, half, NUMBERS)
                scaled = builder.fmul(builder.fmul(builder.sitofp(integers, FLOATS), scale), factor)
                results.append(builder.fadd(scaled, bias))
            if with_outliers:
                results = _with_outliers(vectors, number, results, *outliers)
            if with_deltas:
                row_deltas = builder.add(deltas, builder.mul(number, _I64(4 * HALF_BLOCK)))
                added = [
                    vectors.load(builder.add(row_deltas, _I64(4 * HALF_BLOCK * PANEL_ROWS * half))) for half in range(2)
                ]
                results = [builder.fadd(result, delta) for result, delta in zip(results, added, strict=True)]
            for half, result in enumerate(results):
                target = builder.add(row_y, builder.mul(half_stride, _I64(half)))
                builder.store(result, vectors.at(target), align=4)
            return []

        loop(builder, count, [], row)

    return void_intrinsic(11 if with_outliers else 8, generate)


def _with_outliers(
    vectors: Vectors, row: Any, results: list[Vector], inputs: Any, weights: Any, number: Any
) -> list[Vector]:
    """A row's results plus the products of its outliers, one outlier after another."""
    builder = vectors.builder
    row_inputs = builder.add(inputs, builder.mul(builder.mul(row, number), _I64(4)))

    def outlier(index: Any, sums: list[Vector]) -> list[Vector]:
        value = vectors.repeated(builder.add(row_inputs, builder.mul(index, _I64(4))))
        address = builder.add(weights, builder.mul(index, _I64(4 * BLOCK_OUTPUTS)))
        halves = [vectors.load(builder.add(address, _I64(4 * HALF_BLOCK * half))) for half in range(2)]
        products = [builder.fmul(value, half) for half in halves]
        return [builder.fadd(total, product) for total, product in zip(sums, products, strict=True)]

    return loop(builder, number, results, outlier)


_scale_rows, _scale_with_outliers = _scale_by_rows(), _scale_by_rows(with_outliers=True)
_scale_with_deltas = _scale_by_rows(with_deltas=True)
_scale_with_both = _scale_by_rows(with_outliers=True, with_deltas=True)
_silu, _gelu = (gated_sums(gate, with_deltas=False) for gate in (SILU, GELU))
_silu_with_deltas, _gelu_with_deltas = (gated_sums(gate, with_deltas=True) for gate in (SILU, GELU))
_values_memory, _deltas_memory = scratch(4 * BLOCK_OUTPUTS * CHUNK_ROWS), scratch(4 * BLOCK_OUTPUTS * PANEL_ROWS)


@njit(error_model="numpy")
def _scale(
    a: Any, row: int, count: int, block: int, sums: int, y: int, half_stride: int, stride: int, deltas: int
) -> None:
    """y = a block's sums of ``count`` rows from ``row`` on, scaled back, + outliers' products + deltas (0: none)."""
    constants, absmax = a.constants + 12 * BLOCK_OUTPUTS * block, a.absmax + 4 * row
    if a.num_outliers:
        inputs = a.outlier_inputs + 4 * row * a.num_outliers
        weights = a.outlier_weights + 4 * BLOCK_OUTPUTS * a.num_outliers * block
        if deltas:
            _scale_with_both(
                count, sums, constants, absmax, y, half_stride, stride, deltas, inputs, weights, a.num_outliers
            )
        else:
            _scale_with_outliers(
                count, sums, constants, absmax, y, half_stride, stride, 0, inputs, weights, a.num_outliers
            )
    elif deltas:
        _scale_with_deltas(count, sums, constants, absmax, y, half_stride, stride, deltas)
    else:
        _scale_rows(count, sums, constants, absmax, y, half_stride, stride, 0)


@njit(error_model="numpy")
def _gate(a: Any, row: int, count: int, block: int, sums: int, deltas: int) -> None:
    """As ``_scale`` into the record's y, gated; only where there are no outliers."""
    constants, absmax, stride = a.constants + 12 * BLOCK_OUTPUTS * block, a.absmax + 4 * row, 4 * HALF_BLOCK * a.blocks
    y = a.y + row * stride + 4 * HALF_BLOCK * block
    if a.gating == BY_SILU:
        if deltas:
            _silu_with_deltas(count, sums, constants, absmax, y, stride, deltas)
        else:
            _silu(count, sums, constants, absmax, y, stride, 0)
    elif deltas:
        _gelu_with_deltas(count, sums, constants, absmax, y, stride, deltas)
    else:
        _gelu(count, sums, constants, absmax, y, stride, 0)


@njit(error_model="numpy")
def finish(a: Any, row: int, count: int, block: int, sums: int, deltas: int) -> None:
    """A block's sums of ``count`` rows from ``row`` on, scaled back and gated, into y; ``deltas``: an address, or 0."""
    half, output = HALF_BLOCK * a.blocks, HALF_BLOCK * block
    if a.gating == NO_GATING and half + output + HALF_BLOCK <= a.outputs:
        y = a.y + 4 * (row * a.outputs + output)
        _scale(a, row, count, block, sums, y, 4 * half, 4 * a.outputs, deltas)
    elif a.gating != NO_GATING and not a.num_outliers:
        _gate(a, row, count, block, sums, deltas)
    else:
        values, half_stride = _values_memory(), 4 * HALF_BLOCK * count  # one half behind the other
        _scale(a, row, count, block, sums, values, half_stride, 4 * HALF_BLOCK, deltas)
        _put_values(a, row, count, block, values, half_stride)


@njit(error_model="numpy")
def _put_values(a: Any, row: int, count: int, block: int, values: int, half_stride: int) -> None:
    """A block's values, float32 [2 halves, count, 16], gated, into y; also where y ends within the block."""
    half, output = HALF_BLOCK * a.blocks, HALF_BLOCK * block
    first, second = floats(values), floats(values + half_stride)
    if a.gating == BY_SILU:
        silu_vectors(values, values + half_stride, values, count)
    elif a.gating == BY_GELU:
        gelu_vectors(values, values + half_stride, values, count)
    width = a.outputs if a.gating == NO_GATING else half
    for number in range(count):
        y = floats(a.y + 4 * ((row + number) * width + output))
        for i in range(min(HALF_BLOCK, width - output)):
            y[i] = first[HALF_BLOCK * number + i]
        for i in range(min(HALF_BLOCK, width - output - half)):
            y[half + i] = second[HALF_BLOCK * number + i]


@njit(error_model="numpy")
def no_deltas(a: Any, block: int, count: int, deltas: int) -> int:
    """As ``deltas_of_blocks`` on CPUs where ``lora_deltas.ADD_DELTAS`` adds the deltas: 0."""
    return 0


@njit(error_model="numpy")
def deltas_of_blocks(a: Any, block: int, count: int, deltas: int) -> int:
    """Write the LoRA deltas of a few rows for ``count`` blocks, float32 [count, 2, 32, 16], by tiles.

    Returns their address, 0 if no row has an adapter. Of several blocks at once, since tiles that have been idle for a
    microsecond take 0.2 us to start.
    """
    if a.tasks == 0 or longs(a.tasks)[0] == 0:
        return 0
    for i in range(count):
        multiply_b(a, 0, a.rows, block + i, deltas + 4 * BLOCK_OUTPUTS * PANEL_ROWS * i)
    return deltas


@njit(error_model="numpy")
def finish_with_deltas(a: Any, row: int, count: int, block: int, sums: int) -> None:
    """As ``finish`` for up to a panel of rows, which begins at ``row``, with these rows' LoRA deltas."""
    deltas = 0
    if a.tasks != 0 and any_row_has_adapter(a, row, count):
        deltas = _deltas_memory()
        multiply_b(a, row, count, block, deltas)
    finish(a, row, count, block, sums, deltas)
