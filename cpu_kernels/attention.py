"""Attention by a kernel in C: writes rows' keys and values into the KV cache, and attends with rows of any sequences.

A row's result has the same bits alone, in any batch, and wherever its prompt was cut: one order of sums serves rows of
prompts and of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from cpu_kernels.blocks import padded
from cpu_kernels.c_kernel import CKernel
from cpu_kernels.native_kernel import Launcher

_FIELDS = "q k v keys values out slots positions spans num_spans sinks scratch scratch_size partials num_parts panel"
_FIELDS += " is_bfloat16 rows window kv_heads group dim value_dim q_row q_head k_row k_head v_row v_head key_slot"
_FIELDS += " key_head value_slot value_head"
_LANES, _KEYS, _SHARED = 16, 64, 24
"""Constants of ``attention.c``: lanes of a vector, keys of a block, query heads whose scores are computed together."""
_PART = 512
"""Keys of a part; several threads compute the parts of a row where there are too few rows for them."""
_MOST_PARTIALS = 1 << 22
"""Numbers of the sums of parts; where there would be more, a thread computes all parts of a row."""
_PANEL_HEADS = 128
"""Query heads, times rows, that share the keys which a thread loads; their sums then fit into the second cache."""


class Attention:
    """Attention on KV caches of one type, bfloat16 or float32."""

    KERNEL: ClassVar[CKernel] = CKernel("attention", _FIELDS, "scale softcap")
    DTYPES: ClassVar[Sequence[torch.dtype]] = (torch.bfloat16, torch.float32)

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        spans: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write k and v [1, kv_heads, rows, dim] of a step into the cache; then let rows attend to their sequences.

        q is [1, heads, rows, dim]; ``keys`` and ``values`` are a layer of the cache, [slots, kv_heads, max_len, dim];
        ``slots`` and ``positions`` int64 [rows]. ``spans`` int64 [n, 2] are the rows that attend: the first, and one
        past the last. ``softcap`` and ``sinks`` float32 [heads] are those of ``AttentionParams``. Returns a new
        float32 [rows, heads, value_dim], in which rows that do not attend are not initialized.
        """
        q, k, v = _strided(q), _strided(k), _strided(v)
        (_, kv_heads, rows, dim), value_dim, max_len = k.shape, v.shape[-1], keys.shape[2]
        heads, threads = q.shape[1], torch.get_num_threads()
        group, num_parts = heads // kv_heads, -(-max_len // _PART)
        partials_size = rows * num_parts * heads * _state_size(value_dim)
        is_split = rows * kv_heads < 2 * threads and num_parts > 1 and partials_size <= _MOST_PARTIALS
        panel = 1 if is_split else _rows_of_panel(rows * kv_heads, group, threads)
        thread_size = _scratch_size(panel * group, group, dim, value_dim)
        size = _LANES + threads * thread_size
        num_bytes = 4 * (size + partials_size if is_split else size)
        scratch = self._launch.workspace("attention", num_bytes, reuse=True).data_ptr()
        partials = scratch + 4 * size if is_split else 0
        out = torch.empty(rows, heads, value_dim)
        self._launch(
            self.KERNEL, threads, q.data_ptr(), k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(),
            out.data_ptr(), slots.data_ptr(), positions.data_ptr(), spans.data_ptr(), len(spans),
            0 if sinks is None else sinks.data_ptr(), scratch, thread_size, partials, num_parts, panel,
            keys.dtype == torch.bfloat16, rows, window or 0, kv_heads, group, dim, value_dim, q.stride(2), q.stride(1),
            k.stride(2), k.stride(1), v.stride(2), v.stride(1), keys.stride(0), keys.stride(1), values.stride(0),
            values.stride(1), scale, softcap or 0.0,
        )  # fmt: skip
        return out


def _strided(x: torch.Tensor) -> torch.Tensor:
    """x in float32, itself where the numbers of each head are contiguous."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_of_panel(num_tasks: int, group: int, threads: int) -> int:
    """Rows that share loaded keys: many, but so few that each thread has two panels."""
    return max(1, min(_PANEL_HEADS // group, -(-num_tasks // (2 * threads))))


def _state_size(value_dim: int) -> int:
    """Numbers of the state of a row of a query head: its largest score, totals and sums."""
    return 2 * _LANES + padded(value_dim, _LANES)


def _scratch_size(heads: int, group: int, dim: int, value_dim: int) -> int:
    """Numbers that a thread needs for panels of ``heads`` query heads times rows: ``memory_of`` of ``attention.c``."""
    packed = _KEYS * (dim + padded(value_dim, _LANES))
    scores = min(heads, max(_SHARED, group)) * _KEYS
    return padded(heads * dim, _LANES) + packed + scores + 2 * heads * _state_size(value_dim)
