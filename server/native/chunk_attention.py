"""Attention of a chunk of a prompt, rows of one sequence, on its keys in the KV cache, by tiles of AMX.

Keys and values are bfloat16, as they are kept; queries and the powers of e are rounded to it, sums are float32. What a
row gets does not depend on where chunks begin and end, but for windows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from server.native.blocks import ROW_BLOCK, TILE_ROWS, padded
from server.native.intrinsics import (
    barrier,
    floats,
    halves,
    has_features,
    integers,
    largest,
    num_threads,
    scratch,
    thread_number,
)
from server.native.passes import to_bfloat16
from server.native.routine import Routine
from server.native.tiles import configure_tiles, may_use_tiles, release_tiles, tile_products
from server.native.vectors import powers_of_two

_FIELDS = "q keys values out packed scratch scratch_size rows first num_keys width window heads kv_heads dim value_dim"
_FIELDS += " q_row q_head key_head value_head"
"""``keys`` and ``values`` bfloat16 [kv_heads, .., dim] begin with the first key that any row sees, which is ``first``
before that of the first row; ``width`` are the keys in whole blocks. ``window`` is 0 for none."""
_KEYS = 32
"""Keys of a block: two tiles of scores, and one step of the sum of values."""
_APART = 16
"""Numbers between rows of scores, so that those of one key do not all go to the same few lines of the first cache."""
_LOG2E = np.float32(1.4426950408889634)
_LOWEST, _ZERO, _ONE = np.float32(-np.inf), np.float32(0.0), np.float32(1.0)
_numbers_memory = scratch(64)
_tiles, _zeros_memory = tile_products(2, of="tdpbf16ps"), scratch(128)


@njit(error_model="numpy")
def _pack_keys(source: int, target: int, num: int, dim: int) -> None:
    """A block of keys bfloat16 [num, dim] -> pairs of numbers side by side, [dim / 32, 16, 32 keys, 2]."""
    for key in range(_KEYS):
        pairs, packed = integers(source + 2 * key * dim), integers(target + 4 * key)
        for pair in range(dim // 2):
            packed[pair * _KEYS] = pairs[pair] if key < num else 0


@njit(error_model="numpy")
def _pack_values(source: int, target: int, num: int, dim: int, apart: int) -> None:
    """A block of values bfloat16 [num, dim] -> pairs of keys side by side, [dim / 32, 16, 32, 2], ``apart`` bytes."""
    for pair in range(_KEYS // 2):
        first, second = halves(source + 4 * pair * dim), halves(source + (4 * pair + 2) * dim)
        for part in range(dim // 32):
            packed = integers(target + part * apart + 128 * pair)
            for i in range(32):
                low = np.int32(first[32 * part + i]) & 0xFFFF if 2 * pair < num else 0
                high = np.int32(second[32 * part + i]) << 16 if 2 * pair + 1 < num else 0
                packed[i] = low | high


@njit(error_model="numpy")
def _pack(a: Any) -> None:
    """This thread's part of the keys and values of all heads."""
    me, team = thread_number(), num_threads()
    blocks = a.width // _KEYS
    for task in range(me, a.kv_heads * blocks, team):
        head, block = task // blocks, task % blocks
        num, keys = min(_KEYS, a.num_keys - _KEYS * block), a.packed + 2 * head * a.width * (a.dim + a.value_dim)
        source = a.keys + 2 * (head * a.key_head + _KEYS * block * a.dim)
        _pack_keys(source, keys + 2 * _KEYS * block * a.dim, num, a.dim)
        source = a.values + 2 * (head * a.value_head + _KEYS * block * a.value_dim)
        values = keys + 2 * a.width * a.dim
        _pack_values(source, values + 2 * _KEYS * 32 * block, num, a.value_dim, 2 * a.width * 32)


@njit(error_model="numpy")
def _as_tiles(source: int, target: int, size: int, one: int, steps: int) -> None:
    """Row ``one`` of float32 [32, size] as bfloat16 into tiles [2, steps, 16, 32]."""
    tile = target + 2 * (one // TILE_ROWS * steps * TILE_ROWS + one % TILE_ROWS) * 32
    for step in range(size // 32):
        x, y = floats(source + 128 * step), halves(tile + 2 * step * TILE_ROWS * 32)
        for i in range(32):
            y[i] = np.int16(to_bfloat16(x[i]))


@njit(error_model="numpy")
def _powers(scores_at: int, tile: int, first: int, end: int, steps: int, scale: Any, total_at: int) -> None:
    """A row's scores from ``first`` to ``end`` to powers of e, and all others to zeros, into tiles; and their sum."""
    scores, numbers = floats(scores_at), _numbers_memory()
    for j in range(first):
        scores[j] = _LOWEST
    for j in range(end, _KEYS * steps):
        scores[j] = _LOWEST
    largest(scores_at, _KEYS * steps // 16, numbers)
    factor = scale * _LOG2E
    floats(numbers)[1] = -factor * floats(numbers)[0]
    floats(numbers)[0] = factor
    powers_of_two(scores_at, tile, steps, numbers, total_at)


@njit(error_model="numpy")
def _attend(a: Any, head: int, row: int, scratch: int) -> None:
    """One head's 32 rows from ``row`` on."""
    num_rows, stride = min(ROW_BLOCK, a.rows - row), 4 * (a.width + _APART)
    scores, tiles = scratch, scratch + ROW_BLOCK * stride
    queries = tiles + 2 * ROW_BLOCK * a.width
    sums, totals = queries + 2 * ROW_BLOCK * a.dim, queries + 2 * ROW_BLOCK * a.dim + 4 * ROW_BLOCK * 32
    zeros = _zeros_memory()
    for i in range(32):
        floats(zeros)[i] = _ZERO
    for one in range(num_rows):
        source = a.q + 4 * ((row + one) * a.q_row + head * a.q_head)
        _as_tiles(source, queries, a.dim, one, a.dim // 32)
    begin = max(0, a.first + row - a.window + 1) // _KEYS * _KEYS if a.window else 0
    end = (a.first + row + num_rows + _KEYS - 1) // _KEYS * _KEYS
    steps = (end - begin) // _KEYS
    keys = a.packed + 2 * (head * a.kv_heads // a.heads) * a.width * (a.dim + a.value_dim)
    for block in range(steps):
        weights = keys + 2 * (begin + _KEYS * block) * a.dim
        _tiles(queries, 32 * a.dim, a.dim // 32, weights, scores + 4 * _KEYS * block, stride, zeros)
    for one in range(num_rows):
        mine, seen = scores + one * stride, a.first + row + one + 1
        hidden = max(0, seen - a.window) - begin if a.window else 0
        scale = np.float32(a.scale)
        tile = tiles + 2 * (one // TILE_ROWS * steps * TILE_ROWS + one % TILE_ROWS) * _KEYS
        _powers(mine, tile, max(0, hidden), seen - begin, steps, scale, totals + 4 * one)
    for part in range(a.value_dim // 32):
        weights = keys + 2 * a.width * (a.dim + 32 * part) + 2 * begin * 32
        _tiles(tiles, 2 * TILE_ROWS * (end - begin), steps, weights, sums, 128, zeros)
        for one in range(num_rows):
            x, y = (
                floats(sums + 128 * one),
                floats(a.out + 4 * (((row + one) * a.heads + head) * a.value_dim + 32 * part)),
            )
            factor = _ONE / floats(totals)[one]
            for i in range(32):
                y[i] = x[i] * factor


def _attend_to_chunk(a: Any) -> None:
    me, team = thread_number(), num_threads()
    _pack(a)
    barrier()
    configure_tiles()
    for task in range(me, (a.rows + ROW_BLOCK - 1) // ROW_BLOCK * a.heads, team):
        _attend(a, task % a.heads, task // a.heads * ROW_BLOCK, a.scratch + me * a.scratch_size)
    release_tiles()


class ChunkAttention:
    """The routine, as torch's tensors have it."""

    def __init__(self) -> None:
        self.routine = Routine(_attend_to_chunk, _FIELDS, "scale", reorder=True)

    def can(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether it serves such queries, and keys and values as the cache has them: heads of whole tiles."""
        whole = q.shape[-1] % 32 == 0 == values.shape[-1] % 32
        return whole and keys.dtype == values.dtype == torch.bfloat16 and q.dtype == torch.float32 and q.stride(-1) == 1

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        window: int | None,
        scale: float,
    ) -> None:
        """Attend with q float32 [heads, rows, dim], the last of the sequence, to keys and values [kv_heads, keys, dim].

        The keys are those that any row sees, up to the last row's own. ``out`` is float32 [rows, heads, value_dim].
        """
        (heads, rows, dim), (kv_heads, num_keys, value_dim) = q.shape, values.shape
        threads, width = torch.get_num_threads(), padded(num_keys, _KEYS)
        packed = torch.empty(kv_heads * width * (dim + value_dim), dtype=torch.bfloat16)
        size = padded(ROW_BLOCK * (4 * (width + _APART) + 2 * width + 2 * dim + 4 * 32 + 4), 64)
        scratch = torch.empty(threads * size, dtype=torch.uint8)
        self.routine(
            threads, q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), packed.data_ptr(),
            scratch.data_ptr(), size, rows, num_keys - rows, num_keys, width, window or 0, heads, kv_heads, dim,
            value_dim, q.stride(1), q.stride(0), keys.stride(0), values.stride(0), scale,
        )  # fmt: skip


@cache
def chunk_attention() -> ChunkAttention | None:
    """The one of a process; None where the CPU has no such tiles."""
    return ChunkAttention() if has_features("amx-bf16", "amx-tile", "avx512bf16") and may_use_tiles() else None
