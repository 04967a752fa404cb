"""Products of rows of floats and int8 weights: rows are put on the grid, multiplied, and scaled back, in one go.

A weight lies in blocks of 64 outputs, [blocks, inputs / 4, 64, 4], inputs and outputs padded with zeros: every
instruction that multiplies bytes takes four inputs of as many outputs as it is wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from server.native.byte_products import (
    configure_tiles,
    dot_products,
    may_use_tiles,
    release_tiles,
    scale_rows,
    tile_products,
)
from server.native.intrinsics import (
    barrier,
    bits_of,
    bytes_at,
    float_of,
    floats,
    has_features,
    integers,
    longs,
    num_threads,
    scratch,
    thread_number,
)
from server.native.routine import Routine

FIELDS = "x rows y grid largest inputs outputs width blocks weights zeros scales bias"
FIELDS += " others num_outliers outliers outlier_weights"
"""Of a product's record. ``x`` float32 [rows, inputs] and ``y`` [rows, outputs]; ``grid`` uint8 [rows and more, width]
and ``largest`` float32 [rows] are for the time of the call. ``zeros`` int32 is added to sums, ``others`` float32
[inputs] has 0 at outliers, whose indices are int64 and whose weights float32 [.., outputs]; 0 for what is not there."""

_FEW = 32
"""Rows that wait for the weights to come from memory."""
_TILE_SLAB = 7
"""Steps of 64 inputs whose weights, 28 KB, stay in the first cache while several rows use them."""
_SLAB = 64
"""Steps of four inputs whose weights, 16 KB, stay in the first cache while several rows use them."""
_CHUNK = 512
"""Rows at once at most; each chunk of a prompt reads all weights."""
_CHUNK_BYTES = 5 << 18
"""Of a chunk's bytes, which stay in the second cache while weights go by."""
_ONE, _LEVELS = np.float32(1.0), np.float32(127.0)
_MIDDLE = np.float32(128.5)
_TINY_BITS = np.float32(1e-30).view(np.int32)

_sums_memory = scratch(4 * 64 * _CHUNK)
_one_tile = tile_products(1, 4, prefetch=True)
_two_tiles, _more_tiles = tile_products(2, 2), tile_products(2, 2, add=True)


@njit(error_model="numpy")
def _put_on_grid(a: Any, row: int) -> None:
    """A row of x as bytes around 128, and its largest absolute value; outliers count as zeros."""
    x, grid = floats(a.x + 4 * row * a.inputs), bytes_at(a.grid + row * a.width)
    largest = _TINY_BITS  # floats above zero are in the order of their bits, and NaN above all
    if a.others:
        others = floats(a.others)
        for i in range(a.inputs):
            largest = max(largest, bits_of(abs(x[i] * others[i])))
    else:
        for i in range(a.inputs):
            largest = max(largest, bits_of(abs(x[i])))
    floats(a.largest)[row] = float_of(largest)
    scale = _ONE / float_of(largest) * _LEVELS  # in two steps as torch's kernels, so that bytes are theirs
    if a.others:
        others = floats(a.others)
        for i in range(a.inputs):
            grid[i] = np.uint8(np.int32(x[i] * others[i] * scale + _MIDDLE))
    else:
        for i in range(a.inputs):
            grid[i] = np.uint8(np.int32(x[i] * scale + _MIDDLE))  # half a step more, so that cutting off rounds


@njit(error_model="numpy")
def _scale_back(a: Any, row: int, count: int, output: int, sums: int) -> None:
    """Up to 64 sums of each of some rows into y."""
    if a.outputs - output >= 64:
        zeros, scales, bias = a.zeros + 4 * output, a.scales + 4 * output, a.bias + 4 * output
        y = a.y + 4 * (row * a.outputs + output)
        scale_rows(count, sums, zeros, scales, a.largest + 4 * row, bias, y, 4 * a.outputs)
    else:
        for one in range(row, row + count):
            _scale_few(a, one, output, sums + 256 * (one - row))
    if a.num_outliers:
        for one in range(row, row + count):
            _add_outliers(a, one, output)


@njit(error_model="numpy")
def _scale_few(a: Any, row: int, output: int, sums_at: int) -> None:
    """The last sums of a row, fewer than 64."""
    y, sums = floats(a.y + 4 * (row * a.outputs + output)), integers(sums_at)
    zeros, scales, bias = integers(a.zeros + 4 * output), floats(a.scales + 4 * output), floats(a.bias + 4 * output)
    for i in range(a.outputs - output):
        y[i] = np.float32(sums[i] + zeros[i]) * scales[i] * floats(a.largest)[row] + bias[i]


@njit(error_model="numpy")
def _add_outliers(a: Any, row: int, output: int) -> None:
    y, x = floats(a.y + 4 * (row * a.outputs + output)), floats(a.x + 4 * row * a.inputs)
    for one in range(a.num_outliers):
        value = x[longs(a.outliers)[one]]
        weights = floats(a.outlier_weights + 4 * (one * a.outputs + output))
        for i in range(min(64, a.outputs - output)):
            y[i] += value * weights[i]


def _by_dot_products(bits: int) -> Callable[[Any], None]:
    """x @ weights where vectors of so many bits multiply bytes."""
    one, two, four = (dot_products(rows, bits, prefetch=rows < 4) for rows in (1, 2, 4))

    def by_dot_products(a: Any) -> None:
        me, team = thread_number(), num_threads()
        for row in range(a.rows * me // team, a.rows * (me + 1) // team):
            _put_on_grid(a, row)
        barrier()
        sums = _sums_memory()
        for block in range(a.blocks * me // team, a.blocks * (me + 1) // team):
            for chunk in range(0, a.rows, _CHUNK):
                rows = min(a.rows - chunk, _CHUNK)
                for i in range(64 * rows):
                    integers(sums)[i] = 0
                for slab in range(0, a.width // 4, _SLAB):
                    steps = min(a.width // 4 - slab, _SLAB)
                    weights = a.weights + (block * a.width // 4 + slab) * 256
                    row = 0
                    while row < rows:
                        grid = a.grid + (chunk + row) * a.width + 4 * slab
                        if rows - row >= 4:
                            four(grid, a.width, steps, weights, sums + 256 * row)
                            row += 4
                        elif rows - row >= 2:
                            two(grid, a.width, steps, weights, sums + 256 * row)
                            row += 2
                        else:
                            one(grid, a.width, steps, weights, sums + 256 * row)
                            row += 1
                _scale_back(a, chunk, rows, 64 * block, sums)

    return by_dot_products


@njit(error_model="numpy")
def _chunk_size(a: Any) -> int:
    size: int = max(32, min(_CHUNK, _CHUNK_BYTES // a.width // 32 * 32))
    return size


@njit(error_model="numpy")
def _many_rows(a: Any, first: int, end: int, weights: int, sums: int) -> None:
    """Products of rows with a block, in slabs of it that stay in the first cache."""
    for slab in range(0, a.width // 64, _TILE_SLAB):
        steps = min(a.width // 64 - slab, _TILE_SLAB)
        for row in range(first, end, 32):
            grid, mine = a.grid + row * a.width + 64 * slab, sums + 256 * (row - first)
            if slab:
                _more_tiles(grid, a.width, steps, weights + 4096 * slab, mine)
            else:
                _two_tiles(grid, a.width, steps, weights, mine)


def _by_tiles() -> Callable[[Any], None]:
    """x @ weights where AMX multiplies bytes. One or two rows, which only wait for memory, leave the tiles alone."""
    few_rows = njit(error_model="numpy")(_by_dot_products(512))

    def by_tiles(a: Any) -> None:
        if a.rows <= 2:
            few_rows(a)
            return
        me, team = thread_number(), num_threads()
        for row in range(a.rows * me // team, a.rows * (me + 1) // team):
            _put_on_grid(a, row)
        barrier()
        configure_tiles()
        sums = _sums_memory()
        size = _chunk_size(a)
        for chunk in range(0, a.rows, size):
            end = min(a.rows, chunk + size)
            for block in range(a.blocks * me // team, a.blocks * (me + 1) // team):
                if a.rows <= _FEW:
                    for row in range(0, a.rows, 16):
                        _one_tile(
                            a.grid + row * a.width,
                            a.width,
                            a.width // 64,
                            a.weights + block * a.width * 64,
                            sums + 256 * row,
                        )
                else:
                    _many_rows(a, chunk, end, a.weights + block * a.width * 64, sums)
                _scale_back(a, chunk, end - chunk, 64 * block, sums)
        release_tiles()

    return by_tiles


def products() -> dict[str, Routine]:
    """Those that this CPU can run, by the instructions they use, fastest first."""
    found: dict[str, Callable[[Any], None]] = {}
    if has_features("amx-int8", "amx-tile") and may_use_tiles():
        found["AMX"] = _by_tiles()
    if has_features("avx512vnni", "avx512f"):
        found["AVX512-VNNI"] = _by_dot_products(512)
    if has_features("avxvnni"):
        found["AVX-VNNI"] = _by_dot_products(256)
    return {name: Routine(body, FIELDS) for name, body in found.items()}
