"""Prompt attention: a chunk of a prompt (rows of one sequence) on the sequence's keys in the KV cache, by AMX.

FlashAttention (Dao et al. 2022): softmax block by block of keys. Keys and values are bfloat16, as in the cache; queries
and softmax's powers are rounded to bfloat16, sums are float32. Without a window, a row's result does not depend on
where chunks begin and end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from cpu_kernels.attention_tiles import (
    FACTORS,
    STATE_SIZE,
    begin_rows,
    compute_powers,
    find_largest,
    finish_rows,
    flush_denormals,
    hide_keys,
    pack_queries,
    pack_values,
    scale_sums,
    unpack_sums,
)
from cpu_kernels.blocks import PANEL_ROWS, TILE_BYTES, TILE_ROWS, padded
from cpu_kernels.intrinsics import (
    barrier,
    floats,
    has_features,
    longs,
    num_threads,
    scratch,
    thread_number,
)
from cpu_kernels.native_kernel import Launcher, NativeKernel
from cpu_kernels.tiles import configure_tiles, may_use_tiles, release_tiles, tile_products

_FIELDS = "q keys values out packed scratch scratch_size rows first num_keys width window heads kv_heads dim value_dim"
_FIELDS += " q_row q_head key_head value_head"
"""``keys`` and ``values`` bfloat16 [kv_heads, num_keys, dim] begin with the first key that a row sees; the first row's
own key has the index ``first``. ``width`` is num_keys padded to whole steps; ``window`` is 0 for none."""
_STEP = 32
"""Keys of a step: two tiles of scores, and one step of the product with values."""
_KEYS = 96
"""Keys of a softmax block; blocks begin at multiples of it, wherever chunks begin and end."""
_LOG2E = 1.4426950408889634
_EVERYTHING = 1 << 30
_TILE = TILE_ROWS * TILE_BYTES
_numbers_memory = scratch(64)
_multiply, _add_products = tile_products(2, of="tdpbf16ps", fresh=True), tile_products(2, of="tdpbf16ps", add=True)


@njit(error_model="numpy")
def _pack_keys(source: int, target: int, num: int, dim: int) -> None:
    """A step's keys bfloat16 [num, dim] -> tiles [2, dim / 32, 16, 32], padded with zeros to 32 keys."""
    for key in range(_STEP):
        tile = target + (key // TILE_ROWS * (dim // 32) * TILE_ROWS + key % TILE_ROWS) * TILE_BYTES
        for part in range(dim // 32):
            numbers, packed = longs(source + 2 * key * dim + TILE_BYTES * part), longs(tile + _TILE * part)
            for i in range(TILE_BYTES // 8):
                packed[i] = numbers[i] if key < num else 0


@njit(error_model="numpy")
def _pack(a: Any) -> None:
    """Pack this thread's share of all heads' keys, and of values as tiles [value_dim / 16, width / 32, 16, 32]."""
    thread, team_size = thread_number(), num_threads()
    steps = a.width // _STEP
    for task in range(thread, a.kv_heads * steps, team_size):
        head, step = task // steps, task % steps
        num, keys = min(_STEP, a.num_keys - _STEP * step), a.packed + 2 * head * a.width * (a.dim + a.value_dim)
        source = a.keys + 2 * (head * a.key_head + _STEP * step * a.dim)
        _pack_keys(source, keys + 2 * _STEP * step * a.dim, num, a.dim)
        source = a.values + 2 * (head * a.value_head + _STEP * step * a.value_dim)
        values = keys + 2 * a.width * a.dim + _TILE * step
        for part in range(a.value_dim // 32):
            target = values + 2 * part * steps * _TILE
            pack_values(source + TILE_BYTES * part, 2 * a.value_dim, num - 1, target, steps * _TILE)


@njit(error_model="numpy")
def _score(a: Any, queries: int, keys: int, key: int, end: int, row: int, scores: int, state: int) -> None:
    """Scores [end - key, 32 rows] of keys from ``key`` on, minus infinity where rows do not see them."""
    for step in range((end - key) // _STEP):
        x = keys + 2 * (key + _STEP * step) * a.dim
        _multiply(x, 32 * a.dim, a.dim // 32, queries, scores + 128 * _STEP * step, 128, 0)
    window, first = a.window if a.window else _EVERYTHING, a.first + row
    after = min(end, a.first + min(row + PANEL_ROWS, a.rows) - window)
    if key < after:
        hide_keys(scores, key, after - key, state, window)
    before = max(key, first + 1)
    if before < end:
        hide_keys(scores + 128 * (before - key), before, end - before, state, window)


@njit(error_model="numpy")
def _attend(a: Any, head: int, row: int, scratch: int) -> None:
    """Attention of one query head for the 32 rows from ``row`` on."""
    last, first = min(PANEL_ROWS, a.rows - row) - 1, a.first + row
    scores, tiles = scratch, scratch + 4 * PANEL_ROWS * _KEYS
    sums = tiles + 2 * PANEL_ROWS * _KEYS
    state, queries = sums + 4 * PANEL_ROWS * a.value_dim, sums + 4 * PANEL_ROWS * a.value_dim + STATE_SIZE
    numbers = _numbers_memory()
    floats(numbers)[0] = np.float32(a.scale * _LOG2E)
    pack_queries(a.q + 4 * (row * a.q_row + head * a.q_head), 4 * a.q_row, last, queries, a.dim // 32)
    begin_rows(state, first, first + last)
    begin = max(0, first - a.window + 1) // _STEP * _STEP if a.window else 0
    end = (first + last + _STEP) // _STEP * _STEP
    keys = a.packed + 2 * (head * a.kv_heads // a.heads) * a.width * (a.dim + a.value_dim)
    values = keys + 2 * a.width * a.dim
    for key in range(begin, end, _KEYS):
        block_end = min(end, key + _KEYS)
        _score(a, queries, keys, key, block_end, row, scores, state)
        find_largest(scores, (block_end - key) // 4, numbers, state, numbers + 8)
        compute_powers(scores, tiles, numbers, state, (block_end - key) // 2)
        if key > begin and longs(numbers)[1] != 0:
            scale_sums(sums, a.value_dim, state)
        for part in range(a.value_dim // 32):
            x = values + (2 * part * (a.width // _STEP) + key // _STEP) * _TILE
            part_sums = sums + 4 * PANEL_ROWS * 32 * part
            if key > begin:
                _add_products(x, a.width // _STEP * _TILE, (block_end - key) // _STEP, tiles, part_sums, 128, 0)
            else:
                _multiply(x, a.width // _STEP * _TILE, (block_end - key) // _STEP, tiles, part_sums, 128, 0)
    finish_rows(state)
    out = a.out + 4 * (row * a.heads + head) * a.value_dim
    unpack_sums(sums, state + FACTORS, out, 4 * a.heads * a.value_dim, last, a.value_dim // 16)


def _attend_to_chunk(a: Any) -> None:
    thread, team_size = thread_number(), num_threads()
    _pack(a)
    barrier()
    configure_tiles()
    flush_denormals(1)
    # Adjacent heads of a row are adjacent in memory: a thread takes several, or threads prefetch each other's lines.
    together = a.heads // team_size if a.heads % team_size == 0 else 1
    for piece in range(thread, (a.rows + PANEL_ROWS - 1) // PANEL_ROWS * a.heads // together, team_size):
        for task in range(piece * together, (piece + 1) * together):
            _attend(a, task % a.heads, task // a.heads * PANEL_ROWS, a.scratch + thread * a.scratch_size)
    flush_denormals(0)
    release_tiles()


_KERNEL = NativeKernel(_attend_to_chunk, _FIELDS, "scale")


class PromptAttention:
    """Attention of a chunk of a prompt on a KV cache of bfloat16, by AMX."""

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    @staticmethod
    def kernel_for(dtype: torch.dtype) -> NativeKernel | None:
        """The native kernel for keys and values of this type; None for types other than bfloat16, and without AMX."""
        has_tiles = has_features("amx-bf16", "amx-tile", "avx512bf16") and may_use_tiles()
        return _KERNEL if has_tiles and dtype == torch.bfloat16 else None

    def can_attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether types and strides fit, and head sizes are multiples of 32."""
        fits_tiles = q.shape[-1] % 32 == 0 and values.shape[-1] % 32 == 0
        return (
            fits_tiles
            and keys.dtype == values.dtype == torch.bfloat16
            and q.dtype == torch.float32
            and q.stride(-1) == 1
        )

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        window: int | None,
        scale: float,
    ) -> None:
        """Attend with q float32 [heads, rows, dim], the sequence's last rows, to keys and values [kv_heads, keys, dim].

        The keys are those that any row sees, the last row's own included. ``out`` float32 [rows, heads, value_dim].
        """
        (heads, rows, dim), (kv_heads, num_keys, value_dim) = q.shape, values.shape
        threads, width = torch.get_num_threads(), padded(num_keys, _STEP)
        packed = torch.empty(kv_heads * width * (dim + value_dim), dtype=torch.bfloat16)
        size = PANEL_ROWS * (6 * _KEYS + 4 * value_dim + 2 * dim) + STATE_SIZE
        scratch = torch.empty(threads * size, dtype=torch.uint8)
        self._launch(
            _KERNEL, threads, q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), packed.data_ptr(),
            scratch.data_ptr(), size, rows, num_keys - rows, num_keys, width, window or 0, heads, kv_heads, dim,
            value_dim, q.stride(1), q.stride(0), keys.stride(0), values.stride(0), scale,
        )  # fmt: skip
