"""What is done with the sums of a product: they are scaled back, changed by adapters and gated, and written."""

from __future__ import annotations

from typing import Any

from numba import njit

from server.native.blocks import BLOCK, BY_GELU, BY_SILU, CHUNK, HALF, NO_GATING, ROW_BLOCK
from server.native.byte_products import scale_rows
from server.native.gating import GELU, SILU, gated_sums, gelu_vectors, silu_vectors
from server.native.intrinsics import floats, scratch
from server.native.low_rank_tiles import low_by_b, touches

_scale_rows, _scale_with_outliers = scale_rows(), scale_rows(with_outliers=True)
_silu, _gelu = (gated_sums(gate, with_deltas=False) for gate in (SILU, GELU))
_silu_and_deltas, _gelu_and_deltas = (gated_sums(gate, with_deltas=True) for gate in (SILU, GELU))
_values_memory, _deltas_memory = scratch(4 * BLOCK * CHUNK), scratch(4 * BLOCK * ROW_BLOCK)


@njit(error_model="numpy")
def _scale(a: Any, row: int, count: int, block: int, sums: int, y: int, apart: int, stride: int) -> None:
    """A block's sums of some rows, scaled back, with what outliers add."""
    constants, largest = a.constants + 12 * BLOCK * block, a.largest + 4 * row
    if a.num_outliers:
        values, weights = a.apart + 4 * row * a.num_outliers, a.outlier_weights + 4 * BLOCK * a.num_outliers * block
        _scale_with_outliers(count, sums, constants, largest, y, apart, stride, values, weights, a.num_outliers)
    else:
        _scale_rows(count, sums, constants, largest, y, apart, stride)


@njit(error_model="numpy")
def finish(a: Any, row: int, count: int, block: int, sums: int) -> None:
    """A block's sums of some rows, scaled back, into y."""
    constants, largest = a.constants + 12 * BLOCK * block, a.largest + 4 * row
    half, output = HALF * a.blocks, HALF * block
    if a.gating == NO_GATING and half + output + HALF <= a.outputs:
        y = a.y + 4 * (row * a.outputs + output)
        _scale(a, row, count, block, sums, y, 4 * half, 4 * a.outputs)
        return
    if a.gating != NO_GATING and not a.num_outliers:
        y = a.y + 4 * (row * half + output)
        if a.gating == BY_SILU:
            _silu(count, sums, constants, largest, y, 4 * half, 0)
        else:
            _gelu(count, sums, constants, largest, y, 4 * half, 0)
        return
    values, apart = _values_memory(), 4 * HALF * count  # one half behind the other
    _scale(a, row, count, block, sums, values, apart, 4 * HALF)
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
def _add(count: int, stride: int, y: int, deltas: int) -> None:
    for one in range(count):
        mine, added = floats(y + one * stride), floats(deltas + 4 * HALF * one)
        for i in range(HALF):
            mine[i] += added[i]


@njit(error_model="numpy")
def finish_with_deltas(a: Any, row: int, count: int, block: int, sums: int) -> None:
    """As ``finish``, with what adapters of these rows add; no more than a panel of rows, whole tiles of which are."""
    if a.runs == 0 or not touches(a, row, count):
        finish(a, row, count, block, sums)
        return
    deltas, half = _deltas_memory(), HALF * a.blocks
    low_by_b(a, row, count, block, deltas)
    second = deltas + 4 * HALF * ROW_BLOCK
    if a.gating == NO_GATING:
        finish(a, row, count, block, sums)
        y = a.y + 4 * (row * a.outputs + HALF * block)
        _add(count, 4 * a.outputs, y, deltas)
        if half + HALF * block < a.outputs:
            _add(count, 4 * a.outputs, y + 4 * half, second)
    elif a.num_outliers:
        values, apart = _values_memory(), 4 * HALF * count
        _scale(a, row, count, block, sums, values, apart, 4 * HALF)
        _add(count, 4 * HALF, values, deltas)
        _add(count, 4 * HALF, values + apart, second)
        _put_values(a, row, count, block, values, apart)
    else:
        constants, largest = a.constants + 12 * BLOCK * block, a.largest + 4 * row
        y = a.y + 4 * (row * half + HALF * block)
        if a.gating == BY_SILU:
            _silu_and_deltas(count, sums, constants, largest, y, 4 * half, deltas)
        else:
            _gelu_and_deltas(count, sums, constants, largest, y, 4 * half, deltas)
