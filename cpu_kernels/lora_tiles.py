"""Low-rank deltas of many adapters inside of a product, by tiles of AMX in bfloat16 with sums in float32.

``low = x @ A`` is put into tiles before the product, and ``low @ B`` is added where a panel's sums become floats.
Rows are alone in all of it: one that has no adapter, or another, gets nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from cpu_kernels.blocks import FEW, HALF, ROW_BLOCK, STEP, TILE_ROWS
from cpu_kernels.intrinsics import (
    NUMBERS,
    Vectors,
    float_of,
    floats,
    halves,
    longs,
    loop,
    num_threads,
    prefetch_lines,
    scratch,
    thread_number,
    void_intrinsic,
)
from cpu_kernels.lora_deltas import ENTRY, HEAD, RUN
from cpu_kernels.native_ops import to_bfloat16
from cpu_kernels.tiles import B_TILES, LOW_TILE, tile_function

LISTED = 6
"""Of a run in a list: first row, end, where its tiles would begin for row 0, where B would for output 0, B's bytes of
sixteen outputs, steps of 32 ranks."""
PART = 3
"""Of a linear in a product, int64: where the address of its table stands, its first sixteen outputs, and their end."""
TILE = 1024
"""Bytes of a tile: 16 rows of 64."""
_SLAB = 8
"""Steps whose inputs are put into tiles before they are multiplied."""
_AHEAD = 8
"""Sixteens of outputs that B is called into the caches ahead, where it comes from memory."""
_I8, _I64 = ir.IntType(8), ir.IntType(64)

_slab_memory, _sums_memory = scratch(_SLAB * TILE), scratch(4 * TILE)


def _as_bfloat16(builder: Any, x: Any, stride: Any, rows: Any, count: Any, target: Any) -> None:
    vectors = Vectors(builder)

    def row(number: Any, _: list[Any]) -> list[Any]:
        mine, there = builder.add(x, builder.mul(number, stride)), builder.add(target, builder.mul(number, _I64(64)))

        def step(one: Any, _: list[Any]) -> list[Any]:
            here = builder.add(mine, builder.mul(one, _I64(4 * STEP)))
            pair = [vectors.load(builder.add(here, _I64(64 * half))) for half in range(2)]
            place = vectors.at(builder.add(there, builder.mul(one, _I64(TILE))), NUMBERS)
            builder.store(vectors.rounded(*pair), place, align=4)
            return []

        loop(builder, count, [], step)
        return []

    loop(builder, rows, [], row)


def _tile_pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I8.as_pointer())


def _multiply_into(sums: Sequence[int], inputs: Sequence[int], weights: int) -> Any:
    """``f(x, apart, count, weights, step, stride)``: tiles ``sums`` += x @ weights, by steps of 32 numbers.

    Tiles of x are one behind the other, those of other rows ``apart`` bytes; weights' ``step``, and their rows
    ``stride``. ``inputs`` and ``weights`` are the tiles that they are loaded to.
    """

    def generate(builder: Any, x: Any, apart: Any, count: Any, source: Any, step: Any, stride: Any) -> None:
        load = tile_function(builder, "tileloadd64", _I8, _I8.as_pointer(), _I64)
        product = tile_function(builder, "tdpbf16ps", _I8, _I8, _I8)

        def one(number: Any, _: list[Any]) -> list[Any]:
            here = builder.add(x, builder.mul(number, _I64(TILE)))
            there = builder.add(source, builder.mul(number, step))
            builder.call(load, [_I8(weights), _tile_pointer(builder, there), stride])
            for place, (tile, loaded) in enumerate(zip(sums, inputs, strict=True)):
                rows = builder.add(here, builder.mul(apart, _I64(place)))
                builder.call(load, [_I8(loaded), _tile_pointer(builder, rows), _I64(64)])
                builder.call(product, [_I8(tile), _I8(loaded), _I8(weights)])
            return []

        loop(builder, count, [], one)

    return void_intrinsic(6, generate)


def _store(tiles: int) -> Any:
    """``f(address)``: sums of so many tiles, float32 [16, 16] each: those of a half one behind the other, 2 KB."""

    def generate(builder: Any, address: Any) -> None:
        function = tile_function(builder, "tilestored64", _I8, _I8.as_pointer(), _I64)
        for tile in range(tiles):
            place = builder.add(address, _I64(TILE * (tile // 2 + 2 * (tile % 2))))
            builder.call(function, [_I8(tile), _tile_pointer(builder, place), _I64(64)])

    return void_intrinsic(1, generate)


def _clear(tiles: int) -> Any:
    def generate(builder: Any) -> None:
        for tile in range(tiles):
            builder.call(tile_function(builder, "tilezero", _I8), [_I8(tile)])

    return void_intrinsic(0, generate)


def _call_into_caches(builder: Any, address: Any, num_lines: Any) -> None:
    def line(number: Any, _: list[Any]) -> list[Any]:
        prefetch_lines(builder, builder.add(address, builder.mul(number, _I64(64))), range(1), 2)
        return []

    loop(builder, num_lines, [], line)


_call_lines = void_intrinsic(2, _call_into_caches)
_put_on_tiles = void_intrinsic(5, _as_bfloat16)
# tiles 0 and 1 are the first rows' sums for both halves of outputs, 2 and 3 the second rows'
_into_first, _into_second = _multiply_into([0], [4], 6), _multiply_into([1], [4], 7)
_few_into_first, _few_into_second = (_multiply_into([half], [LOW_TILE], B_TILES[half]) for half in range(2))
_both_into_first, _both_into_second = _multiply_into([0, 2], [4, 5], 6), _multiply_into([1, 3], [4, 5], 7)
_clear_two, _clear_four, _store_two, _store_four = _clear(2), _clear(4), _store(2), _store(4)


@njit(error_model="numpy")
def _entry(a: Any, part: int, adapter: int) -> Any:
    """The address of what an adapter has for a linear; 0 if nothing."""
    table = longs(longs(a.parts + 8 * (1 + PART * part))[0])[0]
    entry = table + 8 * ENTRY * adapter
    return entry if table and longs(entry)[3] else 0


@njit(error_model="numpy")
def pairs_of(a: Any) -> Any:
    """Pairs of ranks in a tile that the adapters of this step need."""
    return min(STEP, max(8, (longs(a.runs)[2] + 7) // 8 * 8)) // 2


@njit(error_model="numpy")
def _low_at(a: Any, run: Any, tile: int, part: int) -> Any:
    """Where the tiles of 16 rows of a run are for a linear; runs have tiles for all rows of their panels."""
    head = longs(a.runs)
    return head[3] + ((run[5] + tile - run[0] // ROW_BLOCK * 2) * longs(a.parts)[0] + part) * head[4]


@njit(error_model="numpy")
def _list_at(a: Any, part: int) -> Any:
    """Where the list of a linear's runs is."""
    head = longs(a.runs)
    return head[5] + 8 * part * (1 + LISTED * head[0])


@njit(error_model="numpy")
def list_runs(a: Any) -> None:
    """For each linear the runs that change it, so that blocks of outputs need not look them up."""
    for part in range(longs(a.parts)[0]):
        mine, first = longs(_list_at(a, part)), longs(a.parts + 8 * (1 + PART * part))[1]
        mine[0] = 0
        for number in range(longs(a.runs)[0]):
            run = longs(a.runs + 8 * (HEAD + RUN * number))
            entry = _entry(a, part, run[2])
            if entry:
                rank, place = longs(entry)[3], 1 + LISTED * mine[0]
                mine[place], mine[place + 1] = run[0], run[1]
                mine[place + 2] = _low_at(a, run, 0, part)
                mine[place + 3] = longs(entry)[2] - first * 2 * HALF * rank
                mine[place + 4] = 2 * HALF * rank
                mine[place + 5] = (rank + STEP - 1) // STEP
                mine[0] += 1


@njit(error_model="numpy")
def _put_low_of_tile(a: Any, run: Any, tile: int, entry: Any, target: int) -> None:
    """x @ A of a run's rows in 16, times the factor, as bfloat16; all other rows and ranks are zeros."""
    first, end = max(run[0], TILE_ROWS * tile), min(run[1], TILE_ROWS * (tile + 1))
    slab, sums, steps, rank = _slab_memory(), _sums_memory(), a.inputs // STEP, entry[3]
    stride = 4 * rank
    for i in range((rank + STEP - 1) // STEP * TILE // 8):
        longs(target)[i] = 0
    if end <= first:
        return
    for pair in range(0, rank, STEP):
        _clear_two()
        for step in range(0, steps, _SLAB):
            count = min(_SLAB, steps - step)
            x = a.x + 4 * (first * a.inputs + step * STEP)
            _put_on_tiles(x, 4 * a.inputs, end - first, count, slab)
            weights = entry[0] + step * 16 * stride + 4 * pair
            _into_first(slab, 0, count, weights, 16 * stride, stride)
            if rank - pair > HALF:
                _into_second(slab, 0, count, weights + 4 * HALF, 16 * stride, stride)
        _store_two(sums)
        for row in range(end - first):
            low = halves(target + TILE * (pair // STEP) + 64 * (first - TILE_ROWS * tile + row))
            for half in range(2):
                mine = floats(sums + 2 * TILE * half + 64 * row)
                for i in range(min(HALF, rank - pair - HALF * half)):
                    low[HALF * half + i] = np.int16(to_bfloat16(mine[i] * float_of(run[3])))


@njit(error_model="numpy")
def put_low(a: Any) -> None:
    """This thread's part of x @ A of all runs, linear by linear: of a few rows."""
    me, team, task = thread_number(), num_threads(), 0
    for number in range(longs(a.runs)[0]):
        run = longs(a.runs + 8 * (HEAD + RUN * number))
        for part in range(longs(a.parts)[0]):
            entry = _entry(a, part, run[2])
            if entry:
                if task % team == me:
                    _call_lines(longs(entry)[0], a.inputs * longs(entry)[3] // 32)
                    for tile in range((a.rows + TILE_ROWS - 1) // TILE_ROWS):
                        _put_low_of_tile(a, run, tile, longs(entry), _low_at(a, run, tile, part))
                task += 1


@njit(error_model="numpy")
def put_low_of_rows(a: Any, tile: int) -> None:
    """x @ A of a tile's rows, of all runs that have some in its panel."""
    panel = tile // 2 * ROW_BLOCK
    for number in range(longs(a.runs)[0]):
        run = longs(a.runs + 8 * (HEAD + RUN * number))
        if run[0] < panel + ROW_BLOCK and run[1] > panel:
            for part in range(longs(a.parts)[0]):
                entry = _entry(a, part, run[2])
                if entry:
                    _put_low_of_tile(a, run, tile, longs(entry), _low_at(a, run, tile, part))


@njit(error_model="numpy")
def touches(a: Any, row: int, count: int) -> bool:
    """Whether any of these rows has an adapter."""
    for number in range(longs(a.runs)[0]):
        run = longs(a.runs + 8 * (HEAD + RUN * number))
        if run[0] < row + count and run[1] > row:
            return True
    return False


@njit(error_model="numpy")
def _part_of(a: Any, group: int) -> int:
    """The linear that has these sixteen outputs; -1 if none."""
    for part in range(longs(a.parts)[0]):
        mine = longs(a.parts + 8 * (1 + PART * part))
        if mine[1] <= group < mine[2]:
            return part
    return -1


@njit(error_model="numpy")
def low_by_b(a: Any, row: int, count: int, block: int, deltas: int) -> None:
    """``low @ B`` of a panel's rows for a block's outputs, float32 [2, 32, 16], one half after another.

    Rows of no adapter get zeros; up to 16 rows, only those of the first tile are written.
    """
    if count > TILE_ROWS:
        _clear_four()
    else:
        _clear_two()
    tile_at = row // TILE_ROWS * longs(a.parts)[0] * longs(a.runs)[4]
    for half in range(2):
        group = block + half * a.blocks
        part = _part_of(a, group)
        if part >= 0:
            listed = longs(_list_at(a, part))
            for number in range(listed[0]):
                place = 1 + LISTED * number
                if listed[place] < row + count and listed[place + 1] > row:
                    weights = listed[place + 3] + group * listed[place + 4]
                    _add_product(a, count, half, listed[place + 2] + tile_at, listed[place + 5], weights)
                    if a.rows <= FEW:
                        _call_lines(weights + _AHEAD * listed[place + 4], listed[place + 4] // 64)
    if count > TILE_ROWS:
        _store_four(deltas)
    else:
        _store_two(deltas)


@njit(error_model="numpy")
def _add_product(a: Any, count: int, half: int, low: int, steps: int, weights: int) -> None:
    if count > TILE_ROWS:
        apart = longs(a.parts)[0] * longs(a.runs)[4]
        if half:
            _both_into_second(low, apart, steps, weights, TILE, 64)
        else:
            _both_into_first(low, apart, steps, weights, TILE, 64)
    elif half:
        _few_into_second(low, 0, steps, weights, TILE, 64)
    else:
        _few_into_first(low, 0, steps, weights, TILE, 64)
