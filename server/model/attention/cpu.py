"""Attention on a CPU: by torch, one segment after another, or by native kernels.

On a CPU a call is cheap and padding costs memory reads, so that segments are not batched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from cpu_kernels.kernels import Kernels
from server.model.attention.interface import AttentionBackend, AttentionParams
from server.model.attention.sdpa import attend_chunk, attend_rows, chunk_mask, fold_heads
from server.model.kv_cache import AttentionMetadata, AttentionSegment, KVCache

if TYPE_CHECKING:
    from cpu_kernels.decode_attention import DecodeAttention
    from cpu_kernels.prompt_attention import PromptAttention

_FEW_ROWS = 32
"""Most rows of a prompt that the decode kernel computes as fast as the prompt kernel."""


class TorchAttention(AttentionBackend):
    """One call of torch's attention per segment."""

    def begin(self, metadata: AttentionMetadata) -> None:
        super().begin(metadata)
        self._masks: dict[tuple[AttentionSegment, int | None, bool], torch.Tensor | None] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        self.cache.write(layer, self.metadata, key, value)
        queries = query.to(self.cache.layout.dtype)
        folded = fold_heads(queries, key.shape[1])
        parts = []  # [length, heads, value_dim] each
        for segment in self.metadata.segments:
            if segment.length > 1:
                parts.append(self.attend_chunk(layer, segment, queries[:, :, segment.rows], params))
            else:
                keys, values = self.cache.read(layer, segment, params.window)
                parts.append(attend_rows(folded[segment.rows], keys, values, None, params))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended[None].to(query.dtype)

    def attend_chunk(
        self, layer: int, segment: AttentionSegment, query: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """query [1, heads, length, dim] in the cache's dtype -> [length, heads, value_dim]."""
        kind = segment, params.window, params.plain
        if kind not in self._masks:
            self._masks[kind] = chunk_mask(segment, params, query.dtype, query.device)
        keys, values = self.cache.read(layer, segment, params.window)
        return attend_chunk(query, keys, values, self._masks[kind], params)


class NativeAttention(AttentionBackend):
    """One kernel writes keys and values and computes single rows, another one prompt chunks.

    Torch computes layers with soft caps or sinks, unsupported head sizes, and prompt chunks if the CPU has no kernel
    for them. ``windows`` are the windows of the model's layers; ``plain``: none has a soft cap or sinks.
    """

    is_recordable = True

    def __init__(
        self,
        cache: KVCache,
        decode: DecodeAttention,
        prompt: PromptAttention | None,
        *,
        windows: Iterable[int | None],
        plain: bool,
    ) -> None:
        super().__init__(cache)
        self.max_single_rows = _FEW_ROWS if plain else 1
        self._decode, self._prompt, self._torch = decode, prompt, TorchAttention(cache)
        self._windows = tuple(windows)

    def begin(self, metadata: AttentionMetadata) -> None:
        super().begin(metadata)
        self._torch.begin(metadata)
        self._chunks = [segment for segment in metadata.segments if segment.length > 1]
        self._single_rows: dict[int | None, tuple[torch.Tensor, int]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        if not params.plain or not self._decode.can_attend(query, key, value):
            return self._torch.attend(layer, query, key, value, params)
        rows, num_keys = self._plan_single_rows(params.window)
        slots, positions = self.metadata.slots, self.metadata.positions
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        attended = self._decode(query, key, value, keys, values, slots, positions, rows, num_keys, params.scale)
        for segment in self._chunks:
            self._attend_chunk(layer, segment, query[:, :, segment.rows], params, attended[segment.rows])
        return attended[None]

    def step_tensors(self) -> list[torch.Tensor]:
        return [*super().step_tensors(), *(self._plan_single_rows(window)[0] for window in self._windows)]

    def _attend_chunk(
        self, layer: int, segment: AttentionSegment, query: torch.Tensor, params: AttentionParams, out: torch.Tensor
    ) -> None:
        kernel = self._prompt
        keys, values = self.cache.read(layer, segment, params.window)
        if kernel is not None and kernel.can_attend(query, keys, values):
            kernel(query[0], keys[0], values[0], out, params.window, params.scale)
        else:
            out.copy_(self._torch.attend_chunk(layer, segment, query.to(self.cache.layout.dtype), params))

    def _plan_single_rows(self, window: int | None) -> tuple[torch.Tensor, int]:
        """Segments of one row: row and first key, int64 [n, 2], and the largest number of keys."""
        if window not in self._single_rows:
            rows, num_keys = [], 0
            for segment in self.metadata.segments:
                if segment.length == 1:
                    first = segment.first_key(window)
                    rows.append((segment.row, first))
                    num_keys = max(num_keys, segment.end - first)
            self._single_rows[window] = torch.tensor(rows, dtype=torch.long).view(-1, 2), num_keys
        return self._single_rows[window]


def cpu_attention(cache: KVCache, *, kernels: Kernels, windows: Iterable[int | None], plain: bool) -> AttentionBackend:
    """Native kernels, or torch if there are none for the dtype of the cache."""
    decode = kernels.decode_attention(cache.layout.dtype)
    if decode is None:
        return TorchAttention(cache)
    prompt = kernels.prompt_attention(cache.layout.dtype)
    return NativeAttention(cache, decode, prompt, windows=windows, plain=plain)
