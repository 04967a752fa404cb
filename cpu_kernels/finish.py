"""What is done with the sums of a product: they are scaled back, changed by adapters and gated, and written."""

from __future__ import annotations

from typing import Any

from numba import njit

from cpu_kernels.blocks import BLOCK, BY_GELU, BY_SILU, CHUNK, HALF, NO_GATING, ROW_BLOCK
from cpu_kernels.byte_products import scale_rows
from cpu_kernels.gating import GELU, SILU, gated_sums, gelu_vectors, silu_vectors
from cpu_kernels.intrinsics import floats, longs, scratch
from cpu_kernels.lora_tiles import low_by_b, touches

_scale_rows, _scale_with_outliers = scale_rows(), scale_rows(with_outliers=True)
_scale_with_deltas, _scale_with_both = scale_rows(with_deltas=True), scale_rows(with_outliers=True, with_deltas=True)
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
    """Where those of a few rows for so many blocks are: on CPUs where another routine adds deltas, nowhere."""
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
