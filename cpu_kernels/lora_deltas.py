"""LoRA deltas (Hu et al. 2021) of many adapters on the rows of one linear, in one call: y += factor * x @ A @ B."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from cpu_kernels.intrinsics import (
    barrier,
    dots,
    float_of,
    floats,
    longs,
    num_threads,
    scratch,
    thread_number,
    weighted_sum,
)
from cpu_kernels.native_kernel import Launcher, NativeKernel

FIELDS = "x y y_stride inputs outputs tasks adapters"
"""``x`` float32 [rows, inputs]; ``y`` float32 [rows, outputs], ``y_stride`` numbers from row to row.

``tasks`` is the step's task table, int64: a header, then the tasks. The header: number of tasks; address of float32
memory for x @ A, its numbers a row; address of memory for x @ A as tiles, its bytes for 16 rows of a linear; address of
memory for the lists of tasks (``lora_tiles.py``). A task is a run of rows that use one adapter: first row, end,
adapter, bits of the float32 factor, rows of the tasks before, tiles of the tasks before (a task has the tiles of whole
panels).
``adapters`` is the address of the address of the linear's adapter table, int64 [adapters, ADAPTER_ENTRY_SIZE]: address
of A float32 [rank, inputs], numbers from row to row of A, address of B float32 [rank, outputs], rank; 0 where an
adapter does not change this linear. For tiles, A and B are laid out as ``server/lora/native.py`` describes.
"""
TASK_HEADER_SIZE, TASK_SIZE, ADAPTER_ENTRY_SIZE = 6, 6, 4
_OUTPUTS_PER_PIECE = 512
"""Outputs whose B, at usual ranks, stays in the L1 cache while rows use it."""
_OUTPUTS_PER_SHARE = 64
"""Threads share the outputs in multiples of so many."""
_ZERO = np.float32(0.0)
_one_dot, _four_dots, _sixteen_dots = dots(1), dots(4), dots(16)
_eight_columns, _one_column = weighted_sum(4, 8), weighted_sum(4, 1)
_memory = scratch(4 * 16)


@njit(error_model="numpy")
def _multiply_rows(a: Any, task: Any, entry: Any, row: int, low: Any, stride: int) -> None:
    """Sixteen rows of x @ A, times the factor. Each has the same bits as alone."""
    results, x, low_row = _memory(), a.x + 4 * row * a.inputs, task[4] + row - task[0]
    for column in range(entry[3]):
        _sixteen_dots(entry[0] + 4 * column * entry[1], x, a.inputs // 16, results)
        for i in range(16):
            low[(low_row + i) * stride + column] = floats(results)[i] * float_of(task[3])


@njit(error_model="numpy")
def _multiply_columns(a: Any, task: Any, entry: Any, row: int, column: int, low: Any, stride: int) -> int:
    """Columns of one row's x @ A, times the factor: four from ``column`` on, or one. Returns how many."""
    results, x, weights = _memory(), a.x + 4 * row * a.inputs, entry[0] + 4 * column * entry[1]
    even = a.inputs // 16 * 16
    count = 4 if entry[3] - column >= 4 and even == a.inputs == entry[1] else 1
    floats(results)[0] = _ZERO
    if count == 4:
        _four_dots(x, weights, even // 16, results)
    elif even:
        _one_dot(x, weights, even // 16, results)
    for i in range(even, a.inputs):
        floats(results)[0] += floats(x)[i] * floats(weights)[i]
    for i in range(count):
        low[(task[4] + row - task[0]) * stride + column + i] = floats(results)[i] * float_of(task[3])
    return count


@njit(error_model="numpy")
def _multiply_task(a: Any, task: Any, entry: Any, low: Any, stride: int, thread: int, team_size: int) -> None:
    """This thread's share of a task's x @ A."""
    blocks = (task[1] - task[0]) // 16 if a.inputs % 16 == 0 else 0
    for block in range(blocks * thread // team_size, blocks * (thread + 1) // team_size):
        _multiply_rows(a, task, entry, task[0] + 16 * block, low, stride)
    turn = thread
    for row in range(task[0] + 16 * blocks, task[1]):
        column = 0
        while column < entry[3]:
            if turn % team_size == 0:
                column += _multiply_columns(a, task, entry, row, column, low, stride)
            else:
                column += 4 if entry[3] - column >= 4 and a.inputs % 16 == 0 and a.inputs == entry[1] else 1
            turn += 1


@njit(error_model="numpy")
def _add_b(a: Any, entry: Any, low: int, y: int, first: int, end: int) -> None:
    """Outputs ``first`` to ``end`` of a row += low @ B, one column of low after another."""
    column, output = 0, first
    while column < entry[3]:
        count = 8 if entry[3] - column >= 8 else 1
        weights, b = low + 4 * column, entry[2] + 4 * column * a.outputs
        output = first
        while end - output >= 64:
            if count == 8:
                _eight_columns(weights, b + 4 * output, a.outputs, y + 4 * output)
            else:
                _one_column(weights, b + 4 * output, a.outputs, y + 4 * output)
            output += 64
        column += count
    for column in range(entry[3]):
        weight, b = floats(low)[column], floats(entry[2] + 4 * column * a.outputs)
        for i in range(output, end):
            floats(y)[i] += weight * b[i]


def _add_deltas(a: Any) -> None:
    header = longs(a.tasks)
    if header[0] == 0:
        return
    thread, team_size = thread_number(), num_threads()
    table, low, stride = longs(a.adapters)[0], floats(header[1]), header[2]
    for number in range(header[0]):
        task = longs(a.tasks + 8 * (TASK_HEADER_SIZE + TASK_SIZE * number))
        _multiply_task(a, task, longs(table + 8 * ADAPTER_ENTRY_SIZE * task[2]), low, stride, thread, team_size)
    barrier()
    blocks = (a.outputs + _OUTPUTS_PER_SHARE - 1) // _OUTPUTS_PER_SHARE
    first = blocks * thread // team_size * _OUTPUTS_PER_SHARE
    last = min(a.outputs, blocks * (thread + 1) // team_size * _OUTPUTS_PER_SHARE)
    for number in range(header[0]):
        task = longs(a.tasks + 8 * (TASK_HEADER_SIZE + TASK_SIZE * number))
        entry = longs(table + 8 * ADAPTER_ENTRY_SIZE * task[2])
        for piece in range(first, last, _OUTPUTS_PER_PIECE):
            for row in range(task[0], task[1]):
                low_row = header[1] + 4 * (task[4] + row - task[0]) * stride
                _add_b(a, entry, low_row, a.y + 4 * row * a.y_stride, piece, min(last, piece + _OUTPUTS_PER_PIECE))


ADD_DELTAS = NativeKernel(_add_deltas, FIELDS, reorder=True)


class AddDeltas:
    """Adds the LoRA deltas of a step's rows to one linear's output, for any mixture of adapters and ranks."""

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    def __call__(self, x: torch.Tensor, y: torch.Tensor, tasks: int, adapters: int) -> None:
        """``y += factor * x @ A @ B`` on the rows of each adapter.

        x is float32 [..., rows, in], y float32 [..., rows, out] whose rows are contiguous. ``tasks`` and
        ``adapters`` are addresses as ``FIELDS`` describes them. A row's delta is the same to the bit in any batch.
        """
        x = x if x.is_contiguous() else x.contiguous()
        self._launch(
            ADD_DELTAS, torch.get_num_threads(), x.data_ptr(), y.data_ptr(), y.stride(-2), x.shape[-1], y.shape[-1],
            tasks, adapters,
        )  # fmt: skip
