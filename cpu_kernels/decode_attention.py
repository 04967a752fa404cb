"""Decode attention: writes rows' keys and values into the KV cache, and attends with single rows of sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit

from cpu_kernels.intrinsics import (
    barrier,
    dots,
    exponential,
    floats,
    halves,
    integers,
    longs,
    num_threads,
    thread_number,
    to_bfloat16,
    weighted_sum,
)
from cpu_kernels.native_kernel import Launcher, NativeKernel

_FIELDS = "q k v keys values out scores scores_size slots positions singles num_singles rows kv_heads group dim"
_FIELDS += " value_dim q_row q_head k_row k_head v_row v_head key_slot key_head value_slot value_head"
_LOWEST = np.float32(-np.inf)
_ZERO = np.float32(0.0)
_sixteen_dots = dots(16)
_one_vector, _four_vectors = weighted_sum(1), weighted_sum(4)


@njit(error_model="numpy")
def _store_bfloat16(source: int, target: int, size: int) -> None:
    x, y = floats(source), halves(target)
    for i in range(size):
        y[i] = np.int16(to_bfloat16(x[i]))


@njit(error_model="numpy")
def _copy(source: int, target: int, size: int) -> None:
    x, y = floats(source), floats(target)
    for i in range(size):
        y[i] = x[i]


@njit(error_model="numpy")
def _load_bfloat16(source: int, target: int, size: int) -> None:
    x, y = halves(source), integers(target)
    for i in range(size):
        y[i] = np.int32(x[i]) << 16


@njit(error_model="numpy")
def _load_block(load: Any, source: int, target: int, num: int, dim: int) -> None:
    """Convert ``num`` rows to float32 and pad them with zeros to sixteen rows."""
    load(source, target, num * dim)
    for i in range(num * dim, 16 * dim):
        floats(target)[i] = _ZERO


@njit(error_model="numpy")
def _softmax(scores: Any, num: int, scale: Any) -> None:
    """softmax(scores * scale) in place, padded with zeros to a multiple of sixteen."""
    largest = _LOWEST
    for j in range(num):
        largest = max(largest, scores[j] * scale)
    total = _ZERO
    for j in range(num):
        power = exponential(scores[j] * scale - largest)
        scores[j] = power
        total += power
    for j in range(num):
        scores[j] /= total
    for j in range(num, (num + 15) // 16 * 16):
        scores[j] = _ZERO


def _attend_with(store: Any, load: Any, size: int) -> Callable[[Any], None]:
    """The kernel for keys and values of ``size`` bytes a number; ``store`` and ``load`` convert from and to float32."""

    @njit(error_model="numpy")
    def attend_to_one_head(a: Any, single: int, kv_head: int, scratch: int) -> None:
        """One row's query heads that share a key head: scores, softmax, weighted sum of values."""
        row, first = longs(a.singles)[2 * single], longs(a.singles)[2 * single + 1]
        slot, end = longs(a.slots)[row], longs(a.positions)[row] + 1
        num = end - first
        keys = a.keys + size * (slot * a.key_slot + kv_head * a.key_head + first * a.dim)
        values = a.values + size * (slot * a.value_slot + kv_head * a.value_head + first * a.value_dim)
        unpacked = scratch + 4 * a.group * a.scores_size
        for j in range(0, num, 16):
            _load_block(load, keys + size * j * a.dim, unpacked, min(16, num - j), a.dim)
            for head in range(a.group):
                q = a.q + 4 * (row * a.q_row + (kv_head * a.group + head) * a.q_head)
                _sixteen_dots(q, unpacked, a.dim // 16, scratch + 4 * (head * a.scores_size + j))
        for head in range(a.group):
            _softmax(floats(scratch + 4 * head * a.scores_size), num, np.float32(a.scale))
        out = a.out + 4 * (row * a.kv_heads + kv_head) * a.group * a.value_dim
        for i in range(a.group * a.value_dim):
            floats(out)[i] = _ZERO
        for j in range(0, num, 16):
            _load_block(load, values + size * j * a.value_dim, unpacked, min(16, num - j), a.value_dim)
            for head in range(a.group):
                weights, y = scratch + 4 * (head * a.scores_size + j), out + 4 * head * a.value_dim
                part = 0
                while a.value_dim - part >= 64:
                    _four_vectors(weights, unpacked + 4 * part, a.value_dim, y + 4 * part)
                    part += 64
                while part < a.value_dim:
                    _one_vector(weights, unpacked + 4 * part, a.value_dim, y + 4 * part)
                    part += 16

    def write_and_attend(a: Any) -> None:
        thread, team_size = thread_number(), num_threads()
        for row in range(a.rows * thread // team_size, a.rows * (thread + 1) // team_size):
            slot, position = longs(a.slots)[row], longs(a.positions)[row]
            for head in range(a.kv_heads):
                key = a.keys + size * (slot * a.key_slot + head * a.key_head + position * a.dim)
                store(a.k + 4 * (row * a.k_row + head * a.k_head), key, a.dim)
                value = a.values + size * (slot * a.value_slot + head * a.value_head + position * a.value_dim)
                store(a.v + 4 * (row * a.v_row + head * a.v_head), value, a.value_dim)
        barrier()
        scratch = a.scores + 4 * thread * (a.group * a.scores_size + 16 * max(a.dim, a.value_dim))
        for task in range(thread, a.num_singles * a.kv_heads, team_size):
            attend_to_one_head(a, task // a.kv_heads, task % a.kv_heads, scratch)

    return write_and_attend


_KERNELS = {
    torch.bfloat16: NativeKernel(_attend_with(_store_bfloat16, _load_bfloat16, 2), _FIELDS, "scale", reorder=True),
    torch.float32: NativeKernel(_attend_with(_copy, _copy, 4), _FIELDS, "scale", reorder=True),
}
"""By the type of keys and values."""


class DecodeAttention:
    """Writes rows' keys and values into a KV cache of one type, and attends with single rows.

    A row's result has the same bits alone and in any batch.
    """

    def __init__(self, launch: Launcher, kernel: NativeKernel) -> None:
        self._launch, self._kernel = launch, kernel

    @staticmethod
    def kernel_for(dtype: torch.dtype) -> NativeKernel | None:
        """The native kernel for keys and values of this type, bfloat16 or float32; None for others."""
        return _KERNELS.get(dtype)

    def can_attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether q is float32, head sizes are multiples of 16, and each head's numbers are contiguous."""
        fits_vectors = k.shape[-1] % 16 == 0 and v.shape[-1] % 16 == 0
        return fits_vectors and q.dtype == torch.float32 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        singles: torch.Tensor,
        longest: int,
        scale: float,
    ) -> torch.Tensor:
        """Write k and v float32 [1, kv_heads, rows, dim] into the cache; then attend with single rows.

        q is float32 [1, heads, rows, dim]; ``keys`` and ``values`` are a layer of the cache, [slots, kv_heads, max_len,
        dim]; ``slots`` and ``positions`` int64 [rows]. ``singles`` int64 [n, 2] are the rows that attend and the first
        key that each sees; none sees more than ``longest`` keys. Returns a new float32 [rows, heads, value_dim], in
        which rows that do not attend are not initialized.
        """
        (_, kv_heads, rows, dim), value_dim = k.shape, v.shape[-1]
        heads, threads = q.shape[1], torch.get_num_threads()
        group = heads // kv_heads
        out = torch.empty(rows, heads, value_dim)
        size = scores_size(longest)
        scratch = torch.empty(threads * (group * size + 16 * max(dim, value_dim)))
        self._launch(
            self._kernel, threads, q.data_ptr(), k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(),
            out.data_ptr(), scratch.data_ptr(), size, slots.data_ptr(), positions.data_ptr(), singles.data_ptr(),
            len(singles), rows, kv_heads, group, dim, value_dim, q.stride(2), q.stride(1), k.stride(2), k.stride(1),
            v.stride(2), v.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), scale,
        )  # fmt: skip
        return out


def scores_size(longest: int) -> int:
    """Room for a head's scores: a power of two, so that it changes seldom."""
    return max(256, 1 << (longest - 1).bit_length())
