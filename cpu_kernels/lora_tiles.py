"""LoRA deltas of many adapters inside a GEMM, by AMX tiles in bfloat16 with sums in float32.

``low = x @ A`` is put into tiles before the GEMM, and ``low @ B`` is added where a panel's sums become floats.
A row without an adapter gets zeros, and no row depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from cpu_kernels.blocks import BF16_STEP, FEW_ROWS, HALF_BLOCK, PANEL_ROWS, TILE_ROWS
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
    to_bfloat16,
    void_intrinsic,
)
from cpu_kernels.lora_deltas import ADAPTER_ENTRY_SIZE, LISTED_TASK_SIZE, TASK_HEADER_SIZE, TASK_SIZE, TILE
from cpu_kernels.tiles import B_TILES, LOW_TILE, tile_function

LINEAR_ENTRY_SIZE = 3
"""Numbers of a linear in ``linears``, int64: the address of the address of its adapter table, and its first group of
sixteen outputs and their end."""
_SLAB = 8
"""Steps of 32 inputs that are converted to tiles before they are multiplied."""
_PREFETCH_GROUPS = 8
"""Groups of sixteen outputs ahead that B is prefetched, where it comes from memory."""
_I8, _I64 = ir.IntType(8), ir.IntType(64)

_slab_memory, _sums_memory = scratch(_SLAB * TILE), scratch(4 * TILE)


def _as_bfloat16(builder: Any, x: Any, stride: Any, rows: Any, count: Any, target: Any) -> None:
    vectors = Vectors(builder)

    def row(number: Any, _: list[Any]) -> list[Any]:
        source_row = builder.add(x, builder.mul(number, stride))
        target_row = builder.add(target, builder.mul(number, _I64(64)))

        def step(tile: Any, _: list[Any]) -> list[Any]:
            source = builder.add(source_row, builder.mul(tile, _I64(4 * BF16_STEP)))
            halves_of_step = [vectors.load(builder.add(source, _I64(64 * half))) for half in range(2)]
            address = vectors.at(builder.add(target_row, builder.mul(tile, _I64(TILE))), NUMBERS)
            builder.store(vectors.rounded(*halves_of_step), address, align=4)
            return []

        loop(builder, count, [], step)
        return []

    loop(builder, rows, [], row)


def _tile_pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I8.as_pointer())


def _multiply_into(sums: Sequence[int], inputs: Sequence[int], weights: int) -> Any:
    """``f(x, tile_stride, count, weights, step, stride)``: tiles ``sums`` += x @ weights, in steps of 32 numbers.

    In bytes: x's tiles of the same rows are contiguous, those of the next rows ``tile_stride`` further; weights of the
    next step are ``step`` further, and rows of weights ``stride``. ``inputs`` and ``weights`` are the numbers of the
    tile registers that x and the weights are loaded to.
    """

    def generate(builder: Any, x: Any, tile_stride: Any, count: Any, source: Any, step: Any, stride: Any) -> None:
        load = tile_function(builder, "tileloadd64", _I8, _I8.as_pointer(), _I64)
        product = tile_function(builder, "tdpbf16ps", _I8, _I8, _I8)

        def multiply_step(number: Any, _: list[Any]) -> list[Any]:
            step_x = builder.add(x, builder.mul(number, _I64(TILE)))
            step_weights = builder.add(source, builder.mul(number, step))
            builder.call(load, [_I8(weights), _tile_pointer(builder, step_weights), stride])
            for row_tile, (tile, loaded) in enumerate(zip(sums, inputs, strict=True)):
                rows = builder.add(step_x, builder.mul(tile_stride, _I64(row_tile)))
                builder.call(load, [_I8(loaded), _tile_pointer(builder, rows), _I64(64)])
                builder.call(product, [_I8(tile), _I8(loaded), _I8(weights)])
            return []

        loop(builder, count, [], multiply_step)

    return void_intrinsic(6, generate)


def _store(tiles: int) -> Any:
    """``f(address)``: store the sums of tiles 0 to ``tiles`` as float32 [2 halves of outputs, row tiles, 16, 16]."""

    def generate(builder: Any, address: Any) -> None:
        function = tile_function(builder, "tilestored64", _I8, _I8.as_pointer(), _I64)
        for tile in range(tiles):
            target = builder.add(address, _I64(TILE * (tile // 2 + 2 * (tile % 2))))
            builder.call(function, [_I8(tile), _tile_pointer(builder, target), _I64(64)])

    return void_intrinsic(1, generate)


def _clear(tiles: int) -> Any:
    def generate(builder: Any) -> None:
        for tile in range(tiles):
            builder.call(tile_function(builder, "tilezero", _I8), [_I8(tile)])

    return void_intrinsic(0, generate)


def _prefetch(builder: Any, address: Any, num_lines: Any) -> None:
    def line(number: Any, _: list[Any]) -> list[Any]:
        prefetch_lines(builder, builder.add(address, builder.mul(number, _I64(64))), range(1), 2)
        return []

    loop(builder, num_lines, [], line)


_prefetch_lines = void_intrinsic(2, _prefetch)
_convert_to_tiles = void_intrinsic(5, _as_bfloat16)
# tile registers 0 and 1 are the sums of the first 16 rows for both halves of outputs, 2 and 3 those of the next 16
_into_first, _into_second = _multiply_into([0], [4], 6), _multiply_into([1], [4], 7)
_few_into_first, _few_into_second = (_multiply_into([half], [LOW_TILE], B_TILES[half]) for half in range(2))
_both_into_first, _both_into_second = _multiply_into([0, 2], [4, 5], 6), _multiply_into([1, 3], [4, 5], 7)
_clear_two, _clear_four, _store_two, _store_four = _clear(2), _clear(4), _store(2), _store(4)


@njit(error_model="numpy")
def _entry(a: Any, linear: int, adapter: int) -> Any:
    """The address of an adapter's entry in the table of linear number ``linear``; 0 where it does not change it."""
    table = longs(longs(a.linears + 8 * (1 + LINEAR_ENTRY_SIZE * linear))[0])[0]
    entry = table + 8 * ADAPTER_ENTRY_SIZE * adapter
    return entry if table and longs(entry)[3] else 0


@njit(error_model="numpy")
def rank_pairs(a: Any) -> Any:
    """Pairs of ranks in a tile, as many as the largest rank of this step needs: 4 to 16."""
    return min(BF16_STEP, max(8, (longs(a.tasks)[2] + 7) // 8 * 8)) // 2


@njit(error_model="numpy")
def _low_at(a: Any, task: Any, tile: int, linear: int) -> Any:
    """The address of a task's tiles of x @ A for 16 rows and a linear; a task has tiles for whole panels."""
    header = longs(a.tasks)
    return header[3] + ((task[5] + tile - task[0] // PANEL_ROWS * 2) * longs(a.linears)[0] + linear) * header[4]


@njit(error_model="numpy")
def _list_at(a: Any, linear: int) -> Any:
    """The address of the list of tasks of a linear."""
    header = longs(a.tasks)
    return header[5] + 8 * linear * (1 + LISTED_TASK_SIZE * header[0])


@njit(error_model="numpy")
def list_tasks(a: Any) -> None:
    """List the tasks that change each linear, so that blocks of outputs need not look them up."""
    for linear in range(longs(a.linears)[0]):
        listed, first = longs(_list_at(a, linear)), longs(a.linears + 8 * (1 + LINEAR_ENTRY_SIZE * linear))[1]
        listed[0] = 0
        for number in range(longs(a.tasks)[0]):
            task = longs(a.tasks + 8 * (TASK_HEADER_SIZE + TASK_SIZE * number))
            entry = _entry(a, linear, task[2])
            if entry:
                rank, at = longs(entry)[3], 1 + LISTED_TASK_SIZE * listed[0]
                listed[at], listed[at + 1] = task[0], task[1]
                listed[at + 2] = _low_at(a, task, 0, linear)
                listed[at + 3] = longs(entry)[2] - first * 2 * HALF_BLOCK * rank
                listed[at + 4] = 2 * HALF_BLOCK * rank
                listed[at + 5] = (rank + BF16_STEP - 1) // BF16_STEP
                listed[0] += 1


@njit(error_model="numpy")
def _multiply_a(a: Any, task: Any, tile: int, entry: Any, target: int) -> None:
    """x @ A of a task's rows in a row tile, times the factor, as bfloat16; all other rows and ranks are zeros."""
    first, end = max(task[0], TILE_ROWS * tile), min(task[1], TILE_ROWS * (tile + 1))
    slab, sums, steps, rank = _slab_memory(), _sums_memory(), a.inputs // BF16_STEP, entry[3]
    stride = 4 * rank
    for i in range((rank + BF16_STEP - 1) // BF16_STEP * TILE // 8):
        longs(target)[i] = 0
    if end <= first:
        return
    for first_rank in range(0, rank, BF16_STEP):
        _clear_two()
        for step in range(0, steps, _SLAB):
            count = min(_SLAB, steps - step)
            x = a.x + 4 * (first * a.inputs + step * BF16_STEP)
            _convert_to_tiles(x, 4 * a.inputs, end - first, count, slab)
            weights = entry[0] + step * 16 * stride + 4 * first_rank
            _into_first(slab, 0, count, weights, 16 * stride, stride)
            if rank - first_rank > HALF_BLOCK:
                _into_second(slab, 0, count, weights + 4 * HALF_BLOCK, 16 * stride, stride)
        _store_two(sums)
        for row in range(end - first):
            low = halves(target + TILE * (first_rank // BF16_STEP) + 64 * (first - TILE_ROWS * tile + row))
            for half in range(2):
                row_sums = floats(sums + 2 * TILE * half + 64 * row)
                for i in range(min(HALF_BLOCK, rank - first_rank - HALF_BLOCK * half)):
                    low[HALF_BLOCK * half + i] = np.int16(to_bfloat16(row_sums[i] * float_of(task[3])))


@njit(error_model="numpy")
def multiply_a_few_rows(a: Any) -> None:
    """This thread's share of x @ A of all tasks, linear by linear, for few rows."""
    thread, team_size, turn = thread_number(), num_threads(), 0
    for number in range(longs(a.tasks)[0]):
        task = longs(a.tasks + 8 * (TASK_HEADER_SIZE + TASK_SIZE * number))
        for linear in range(longs(a.linears)[0]):
            entry = _entry(a, linear, task[2])
            if entry:
                if turn % team_size == thread:
                    _prefetch_lines(longs(entry)[0], a.inputs * longs(entry)[3] // 32)
                    for tile in range((a.rows + TILE_ROWS - 1) // TILE_ROWS):
                        _multiply_a(a, task, tile, longs(entry), _low_at(a, task, tile, linear))
                turn += 1


@njit(error_model="numpy")
def multiply_a_row_tile(a: Any, tile: int) -> None:
    """x @ A of a row tile, for all tasks that have rows in its panel."""
    panel = tile // 2 * PANEL_ROWS
    for number in range(longs(a.tasks)[0]):
        task = longs(a.tasks + 8 * (TASK_HEADER_SIZE + TASK_SIZE * number))
        if task[0] < panel + PANEL_ROWS and task[1] > panel:
            for linear in range(longs(a.linears)[0]):
                entry = _entry(a, linear, task[2])
                if entry:
                    _multiply_a(a, task, tile, longs(entry), _low_at(a, task, tile, linear))


@njit(error_model="numpy")
def any_row_has_adapter(a: Any, row: int, count: int) -> bool:
    """Whether any of these rows has an adapter."""
    for number in range(longs(a.tasks)[0]):
        task = longs(a.tasks + 8 * (TASK_HEADER_SIZE + TASK_SIZE * number))
        if task[0] < row + count and task[1] > row:
            return True
    return False


@njit(error_model="numpy")
def _linear_of(a: Any, group: int) -> int:
    """The number of the linear that has this group of sixteen outputs; -1 where none has."""
    for linear in range(longs(a.linears)[0]):
        entry = longs(a.linears + 8 * (1 + LINEAR_ENTRY_SIZE * linear))
        if entry[1] <= group < entry[2]:
            return linear
    return -1


@njit(error_model="numpy")
def multiply_b(a: Any, row: int, count: int, block: int, deltas: int) -> None:
    """``low @ B`` of a panel's rows for a block's outputs, float32 [2, 32, 16], one half after another.

    Rows of no adapter get zeros; up to 16 rows, only those of the first tile are written.
    """
    if count > TILE_ROWS:
        _clear_four()
    else:
        _clear_two()
    tile_at = row // TILE_ROWS * longs(a.linears)[0] * longs(a.tasks)[4]
    for half in range(2):
        group = block + half * a.blocks
        linear = _linear_of(a, group)
        if linear >= 0:
            listed = longs(_list_at(a, linear))
            for number in range(listed[0]):
                at = 1 + LISTED_TASK_SIZE * number
                if listed[at] < row + count and listed[at + 1] > row:
                    weights = listed[at + 3] + group * listed[at + 4]
                    _add_low_by_b(a, count, half, listed[at + 2] + tile_at, listed[at + 5], weights)
                    if a.rows <= FEW_ROWS:
                        _prefetch_lines(weights + _PREFETCH_GROUPS * listed[at + 4], listed[at + 4] // 64)
    if count > TILE_ROWS:
        _store_four(deltas)
    else:
        _store_two(deltas)


@njit(error_model="numpy")
def _add_low_by_b(a: Any, count: int, half: int, low: int, steps: int, weights: int) -> None:
    if count > TILE_ROWS:
        tile_stride = longs(a.linears)[0] * longs(a.tasks)[4]
        if half:
            _both_into_second(low, tile_stride, steps, weights, TILE, 64)
        else:
            _both_into_first(low, tile_stride, steps, weights, TILE, 64)
    elif half:
        _few_into_second(low, 0, steps, weights, TILE, 64)
    else:
        _few_into_first(low, 0, steps, weights, TILE, 64)
