"""Attention on a CPU: by native kernels, or by torch, one segment after another.

On a CPU a call is cheap and padding costs memory reads, so that segments are not batched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cpu_kernels.kernels import Kernels
from server.model.attention.interface import AttentionBackend, AttentionParams
from server.model.attention.sdpa import attend_chunk, attend_rows, chunk_mask, fold_heads
from server.model.kv_cache import AttentionMetadata, AttentionSegment, KVCache

if TYPE_CHECKING:
    from cpu_kernels.attention import Attention
    from cpu_kernels.prompt_attention import PromptAttention


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
    """One native kernel writes keys and values and attends; on AMX another one attends with prompt chunks.

    That one has no soft caps and sinks.
    """

    is_recordable = True
    max_single_rows = 32
    """The kernel joins adjacent rows of a sequence itself; up to so many rows it is as fast as AMX."""

    def __init__(self, cache: KVCache, attention: Attention, prompt: PromptAttention | None) -> None:
        super().__init__(cache)
        self._attention, self._prompt = attention, prompt

    def begin(self, metadata: AttentionMetadata) -> None:
        super().begin(metadata)
        self._chunks = [segment for segment in metadata.segments if segment.length > 1]
        self._all_rows = torch.tensor([[0, len(metadata.slots)]])
        self._single_rows: torch.Tensor | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        prompt = self._prompt
        if prompt is not None and not (params.plain and prompt.can_attend(query, keys, values)):
            prompt = None
        spans = self._all_rows if prompt is None or not self._chunks else self._spans_of_single_rows()
        attended = self._attention(
            query,
            key,
            value,
            keys,
            values,
            self.metadata.slots,
            self.metadata.positions,
            spans,
            scale=params.scale,
            window=params.window,
            softcap=params.softcap,
            sinks=params.sinks,
        )
        if prompt is not None:
            for segment in self._chunks:
                chunk_keys, chunk_values = self.cache.read(layer, segment, params.window)
                out = attended[segment.rows]
                prompt(query[0, :, segment.rows], chunk_keys[0], chunk_values[0], out, params.window, params.scale)
        return attended[None].to(query.dtype)

    def step_tensors(self) -> list[torch.Tensor]:
        return [*super().step_tensors(), self._all_rows]

    def _spans_of_single_rows(self) -> torch.Tensor:
        """Rows between chunks: the first, and the one behind the last, int64 [n, 2]."""
        if self._single_rows is None:
            begins = [0, *(segment.row + segment.length for segment in self._chunks)]
            ends = [*(segment.row for segment in self._chunks), len(self.metadata.slots)]
            spans = [span for span in zip(begins, ends, strict=True) if span[0] < span[1]]
            self._single_rows = torch.tensor(spans, dtype=torch.long).view(-1, 2)
        return self._single_rows


def cpu_attention(cache: KVCache, *, kernels: Kernels) -> AttentionBackend:
    """Native kernels, or torch if there are none for the dtype of the cache."""
    attention = kernels.attention(cache.layout.dtype)
    if attention is None:
        return TorchAttention(cache)
    return NativeAttention(cache, attention, kernels.prompt_attention(cache.layout.dtype))
