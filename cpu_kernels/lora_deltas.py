"""Low-rank deltas of many adapters on the rows of one linear, in one call."""

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

FIELDS = "x y y_stride inputs outputs runs table"
"""``x`` float32 [rows, inputs], ``y`` float32 [rows, outputs] whose rows lie a stride apart. ``runs`` int64: how many,
the address of float32 memory for x @ A, its numbers a row, the address of memory for its tiles, their bytes for 16 rows
of a linear, the address of memory for lists of them, then ``RUN`` numbers each: first row, end, adapter, the bits of a
float32 factor, rows of the runs before, and tiles, which are those of whole panels. ``table`` is where the address of
the linear's table stands, which is int64 [adapters, ENTRY]: address of A float32 [rank, inputs], numbers between its
rows, address of B float32 [rank, outputs], rank; 0 where an adapter leaves this linear as it is. For tiles, A and B are
as ``server/lora/native.py`` lays them out."""
HEAD, RUN, ENTRY = 6, 6, 4
_PIECE = 512
"""Outputs whose B, at usual ranks, stays in the first cache while rows use it."""
_BLOCK = 64
_ZERO = np.float32(0.0)
_one_dot, _four_dots, _sixteen_dots = dots(1), dots(4), dots(16)
_eight_columns, _one_column = weighted_sum(4, 8), weighted_sum(4, 1)
_memory = scratch(4 * 16)


@njit(error_model="numpy")
def _multiply_rows(a: Any, run: Any, entry: Any, row: int, low: Any, stride: int) -> None:
    """Sixteen rows of x @ A, times the factor. Each is the same as alone."""
    results, x, first = _memory(), a.x + 4 * row * a.inputs, run[4] + row - run[0]
    for number in range(entry[3]):
        _sixteen_dots(entry[0] + 4 * number * entry[1], x, a.inputs // 16, results)
        for one in range(16):
            low[(first + one) * stride + number] = floats(results)[one] * float_of(run[3])


@njit(error_model="numpy")
def _multiply_columns(a: Any, run: Any, entry: Any, row: int, number: int, low: Any, stride: int) -> int:
    """From column ``number`` on four of a row's x @ A, times the factor, or one; how many."""
    results, x, weights = _memory(), a.x + 4 * row * a.inputs, entry[0] + 4 * number * entry[1]
    even = a.inputs // 16 * 16
    some = 4 if entry[3] - number >= 4 and even == a.inputs == entry[1] else 1
    floats(results)[0] = _ZERO
    if some == 4:
        _four_dots(x, weights, even // 16, results)
    elif even:
        _one_dot(x, weights, even // 16, results)
    for i in range(even, a.inputs):
        floats(results)[0] += floats(x)[i] * floats(weights)[i]
    for one in range(some):
        low[(run[4] + row - run[0]) * stride + number + one] = floats(results)[one] * float_of(run[3])
    return some


@njit(error_model="numpy")
def _multiply_run(a: Any, run: Any, entry: Any, low: Any, stride: int, me: int, team: int) -> None:
    """This thread's part of a run's x @ A."""
    blocks = (run[1] - run[0]) // 16 if a.inputs % 16 == 0 else 0
    for block in range(blocks * me // team, blocks * (me + 1) // team):
        _multiply_rows(a, run, entry, run[0] + 16 * block, low, stride)
    task = me
    for row in range(run[0] + 16 * blocks, run[1]):
        number = 0
        while number < entry[3]:
            if task % team == 0:
                number += _multiply_columns(a, run, entry, row, number, low, stride)
            else:
                number += 4 if entry[3] - number >= 4 and a.inputs % 16 == 0 and a.inputs == entry[1] else 1
            task += 1


@njit(error_model="numpy")
def _add_b(a: Any, entry: Any, low: int, y: int, first: int, end: int) -> None:
    """Outputs ``first`` to ``end`` of a row += low @ B, one column of low after another."""
    number, output = 0, first
    while number < entry[3]:
        some = 8 if entry[3] - number >= 8 else 1
        weights, b = low + 4 * number, entry[2] + 4 * number * a.outputs
        output = first
        while end - output >= 64:
            if some == 8:
                _eight_columns(weights, b + 4 * output, a.outputs, y + 4 * output)
            else:
                _one_column(weights, b + 4 * output, a.outputs, y + 4 * output)
            output += 64
        number += some
    for number in range(entry[3]):
        weight, b = floats(low)[number], floats(entry[2] + 4 * number * a.outputs)
        for i in range(output, end):
            floats(y)[i] += weight * b[i]


def _add_deltas(a: Any) -> None:
    head = longs(a.runs)
    if head[0] == 0:
        return
    me, team = thread_number(), num_threads()
    table, low, stride = longs(a.table)[0], floats(head[1]), head[2]
    for number in range(head[0]):
        run = longs(a.runs + 8 * (HEAD + RUN * number))
        _multiply_run(a, run, longs(table + 8 * ENTRY * run[2]), low, stride, me, team)
    barrier()
    blocks = (a.outputs + _BLOCK - 1) // _BLOCK
    first, last = blocks * me // team * _BLOCK, min(a.outputs, blocks * (me + 1) // team * _BLOCK)
    for number in range(head[0]):
        run = longs(a.runs + 8 * (HEAD + RUN * number))
        entry = longs(table + 8 * ENTRY * run[2])
        for piece in range(first, last, _PIECE):
            for row in range(run[0], run[1]):
                mine = head[1] + 4 * (run[4] + row - run[0]) * stride
                _add_b(a, entry, mine, a.y + 4 * row * a.y_stride, piece, min(last, piece + _PIECE))


ADD_DELTAS = NativeKernel(_add_deltas, FIELDS, reorder=True)


class AddDeltas:
    """Adds what the adapters of a step's rows change in one linear, whatever mixture of adapters and ranks they are."""

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    def __call__(self, x: torch.Tensor, y: torch.Tensor, runs: int, table: int) -> None:
        """``y += x @ A @ B`` on the rows of each adapter.

        x is float32 [..., rows, in], y float32 [..., rows, out] whose rows are contiguous. ``runs`` and ``table`` are
        addresses of int64 tensors as ``FIELDS`` describes them. A row's delta is the same to the bit in any batch.
        """
        x = x if x.is_contiguous() else x.contiguous()
        self._launch(
            ADD_DELTAS, torch.get_num_threads(), x.data_ptr(), y.data_ptr(), y.stride(-2), x.shape[-1], y.shape[-1],
            runs, table,
        )  # fmt: skip
