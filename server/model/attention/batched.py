"""Attention on an accelerator: one call for the decoding rows of all sequences, and one for each chunk of a prompt.

On a CPU a call is cheap and padding costs memory reads, so that ``cpu`` attends to one segment after another. On an
accelerator the number of calls decides the time of a decoding step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from cpu_kernels.blocks import padded
from server.lora.transfer import to_device
from server.model.attention.interface import AttentionBackend, AttentionParams
from server.model.attention.sdpa import attend_chunk, attend_rows, causal_mask, chunk_mask, fold_heads
from server.model.kv_cache import AttentionMetadata, AttentionSegment
from server.sequence import Batch

_PADDING = 512
"""Hidden keys that a row may be padded with: reading them costs less than a call."""
_BLOCK = 64
"""Padded numbers of keys are multiples of this, so that few sizes occur."""


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Decoding rows that are computed in one call.

    Row ``rows[i]`` of the batch attends to positions ``first`` to ``end`` of slot ``slots[i]``; ``mask``
    [n, 1, 1, keys] hides padding. ``slots`` is a range if the slots are adjacent.
    """

    rows: torch.Tensor
    slots: torch.Tensor | range
    first: int
    end: int
    mask: torch.Tensor | None

    def select(self, cached: torch.Tensor) -> torch.Tensor:
        """The group's part [n, kv_heads, keys, dim] of [slots, kv_heads, max_len, dim]; a view for adjacent slots."""
        if isinstance(self.slots, range):
            return cached[self.slots.start : self.slots.stop, :, self.first : self.end]
        return cached[:, :, self.first : self.end].index_select(0, self.slots)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A step's calls for layers of one window.

    ``chunks`` are segments of several rows, each with its mask if it needs one. ``whole`` is the only group if it has
    all rows in the order of the batch.
    """

    groups: Sequence[RowGroup]
    chunks: Sequence[tuple[AttentionSegment, torch.Tensor | None]]
    whole: RowGroup | None


class BatchedAttention(AttentionBackend):
    """One call for all decoding rows, or a few calls for rows of similar lengths."""

    def prepare_slots(self, batch: Batch) -> None:
        """Also clears slots behind the prefix of a new sequence: padding is read, with a weight of 0."""
        super().prepare_slots(batch)
        for segment in batch.segments:
            if segment.start == segment.sequence.num_cached:
                self.cache.clear(segment.slot, segment.start)

    def begin(self, metadata: AttentionMetadata) -> None:
        super().begin(metadata)
        self._plans: dict[tuple[int | None, bool], AttentionPlan] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        self.cache.write(layer, self.metadata, key, value)
        queries = query.to(self.cache.layout.dtype)
        kind = params.window, params.plain
        if kind not in self._plans:
            self._plans[kind] = plan_step(
                self.metadata.segments, params, max_len=self.cache.layout.max_len, like=queries
            )
        attended = self._run(self._plans[kind], layer, queries, params)
        return attended[None].to(query.dtype)

    def _run(self, plan: AttentionPlan, layer: int, query: torch.Tensor, params: AttentionParams) -> torch.Tensor:
        """query [1, heads, rows, dim] in the cache's format -> [rows, heads, value_dim]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        folded = fold_heads(query, keys.shape[1])
        if plan.whole is not None:
            group = plan.whole
            return attend_rows(folded, group.select(keys), group.select(values), group.mask, params)
        num_heads, num_rows = query.shape[1:3]
        attended = query.new_empty(num_rows, num_heads, values.shape[-1])
        for group in plan.groups:
            rows = folded.index_select(0, group.rows)
            found = attend_rows(rows, group.select(keys), group.select(values), group.mask, params)
            attended.index_copy_(0, group.rows, found)
        for segment, mask in plan.chunks:
            chunk = self.cache.read(layer, segment, params.window)
            attended[segment.rows] = attend_chunk(query[:, :, segment.rows], *chunk, mask, params)
        return attended


def plan_step(
    segments: Sequence[AttentionSegment], params: AttentionParams, *, max_len: int, like: torch.Tensor
) -> AttentionPlan:
    """The calls for the segments of a step; masks have the dtype and device of ``like``."""
    groups = grouped([segment for segment in segments if segment.length == 1], params.window)
    lists: list[list[int]] = []
    for group in groups:
        lists.append([segment.row for segment in group])
        lists.append([segment.slot for segment in group])
        lists.append([segment.start for segment in group])
    tensors = to_device(like.device, *lists)
    row_groups = [
        _row_group(group, *tensors[3 * index : 3 * index + 3], window=params.window, max_len=max_len, dtype=like.dtype)
        for index, group in enumerate(groups)
    ]
    chunks = [
        (segment, chunk_mask(segment, params, like.dtype, like.device)) for segment in segments if segment.length > 1
    ]
    is_whole = not chunks and len(groups) == 1 and lists[0] == list(range(len(segments)))
    return AttentionPlan(row_groups, chunks, row_groups[0] if is_whole else None)


def grouped(rows: Sequence[AttentionSegment], window: int | None) -> list[list[AttentionSegment]]:
    """Groups of single rows whose padding is at most ``_PADDING`` keys, or as many as they attend to."""
    groups: list[list[AttentionSegment]] = []
    for row in sorted(rows, key=attrgetter("start")):
        if groups:
            head = groups[-1][0]
            first = head.first_key(window)
            if row.end - first <= max(2 * (head.end - first), _PADDING):
                groups[-1].append(row)
                continue
        groups.append([row])
    return [_ordered(group) for group in groups]


def _ordered(group: Sequence[AttentionSegment]) -> list[AttentionSegment]:
    """Sorted by slot if the slots are adjacent, so that no key is copied; else by row, so that no query is."""
    by_slot = sorted(group, key=attrgetter("slot"))
    return by_slot if _have_adjacent_slots(by_slot) else sorted(group, key=attrgetter("row"))


def _have_adjacent_slots(group: Sequence[AttentionSegment]) -> bool:
    return [segment.slot for segment in group] == list(range(group[0].slot, group[0].slot + len(group)))


def _row_group(
    group: Sequence[AttentionSegment],
    rows: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    window: int | None,
    max_len: int,
    dtype: torch.dtype,
) -> RowGroup:
    first = min(segment.first_key(window) for segment in group)
    end = max(segment.end for segment in group)
    mask = None
    if any(segment.end != end for segment in group):
        end = min(max_len, first + padded(end - first, _BLOCK))
        mask = causal_mask(positions[:, None, None], first, end, window, dtype=dtype)
    if _have_adjacent_slots(group):
        return RowGroup(rows, range(group[0].slot, group[0].slot + len(group)), first, end, mask)
    return RowGroup(rows, slots, first, end, mask)
