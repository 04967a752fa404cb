"""Attention on an accelerator: one call for the decoding rows of all sequences, and one for each chunk of a prompt.

On a CPU a call costs little and padding costs reads, so that ``cpu`` attends to one segment after another. On an
accelerator calls are what a decoding step is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from server.lora.transfer import to_device
from server.model.attention.interface import AttentionBackend, AttentionParams
from server.model.attention.sdpa import attend_chunk, attend_rows, causal_mask, chunk_mask, fold_heads
from server.model.kv_cache import AttentionMetadata, AttentionSegment
from server.sequence import Batch

_PADDING = 512
"""Keys that a row may be given beyond those it sees: reading them costs less than a call."""
_BLOCK = 64
"""Padded rows get whole blocks of keys, so that few sizes occur."""
_row, _slot, _position = attrgetter("row"), attrgetter("slot"), attrgetter("start")


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Decoding rows that are attended to in one call.

    Row ``rows[i]`` of the batch looks at positions ``first`` to ``end`` of slot ``slots[i]``, of which ``mask``
    [n, 1, 1, keys] hides those that it must not see. ``slots`` is a range where the slots follow one another.
    """

    rows: torch.Tensor
    slots: torch.Tensor | range
    first: int
    end: int
    mask: torch.Tensor | None

    def seen(self, kept: torch.Tensor) -> torch.Tensor:
        """Of [slots, kv_heads, max_len, dim] what the group looks at [n, kv_heads, keys, dim]; copied if need be."""
        if isinstance(self.slots, range):
            return kept[self.slots.start : self.slots.stop, :, self.first : self.end]
        return kept[:, :, self.first : self.end].index_select(0, self.slots)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A step's calls for layers of one window.

    ``chunks`` are segments of several rows, each with its mask if it needs one. ``whole`` is the one group of all rows
    in their order, if it is so.
    """

    groups: Sequence[RowGroup]
    chunks: Sequence[tuple[AttentionSegment, torch.Tensor | None]]
    whole: RowGroup | None


class BatchedAttention(AttentionBackend):
    """Attends with all rows that decode in one call, or in a few of similar lengths."""

    def prepare_slots(self, batch: Batch) -> None:
        """Also clears what is behind the prefix of a new sequence: it is read, with a weight of 0."""
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
        if (group := plan.whole) is not None:
            return attend_rows(folded, group.seen(keys), group.seen(values), group.mask, params)
        num_heads, num_rows = query.shape[1:3]
        attended = query.new_empty(num_rows, num_heads, values.shape[-1])
        for group in plan.groups:
            rows = folded.index_select(0, group.rows)
            found = attend_rows(rows, group.seen(keys), group.seen(values), group.mask, params)
            attended.index_copy_(0, group.rows, found)
        for segment, mask in plan.chunks:
            chunk = self.cache.read(layer, segment, params.window)
            attended[segment.rows] = attend_chunk(query[:, :, segment.rows], *chunk, mask, params)
        return attended


def plan_step(
    segments: Sequence[AttentionSegment], params: AttentionParams, *, max_len: int, like: torch.Tensor
) -> AttentionPlan:
    """The calls for segments laid end to end, with masks in the format and on the device of ``like``."""
    groups = grouped([segment for segment in segments if segment.length == 1], params.window)
    lists = [[number(segment) for segment in group] for group in groups for number in (_row, _slot, _position)]
    tensors = to_device(like.device, *lists)
    row_groups = [
        _row_group(group, *tensors[3 * place : 3 * place + 3], window=params.window, max_len=max_len, dtype=like.dtype)
        for place, group in enumerate(groups)
    ]
    chunks = [
        (segment, chunk_mask(segment, params, like.dtype, like.device)) for segment in segments if segment.length > 1
    ]
    in_order = len(groups) == 1 and [segment.row for segment in groups[0]] == list(range(len(segments)))
    return AttentionPlan(row_groups, chunks, row_groups[0] if in_order and not chunks else None)


def grouped(rows: Sequence[AttentionSegment], window: int | None) -> list[list[AttentionSegment]]:
    """Single rows in groups that read few keys for nothing: at most as many as they need, or ``_PADDING``."""
    groups: list[list[AttentionSegment]] = []
    for row in sorted(rows, key=_position):
        if groups:
            head = groups[-1][0]
            first = head.first_key(window)
            if row.end - first <= max(2 * (head.end - first), _PADDING):
                groups[-1].append(row)
                continue
        groups.append([row])
    return [_ordered(group) for group in groups]


def _ordered(group: Sequence[AttentionSegment]) -> list[AttentionSegment]:
    """By slot where the slots follow one another, so that no key is copied; else by row, so that no query is."""
    by_slot = sorted(group, key=_slot)
    return by_slot if _have_adjacent_slots(by_slot) else sorted(group, key=_row)


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
        end = min(max_len, first + -(-(end - first) // _BLOCK) * _BLOCK)
        mask = causal_mask(positions[:, None, None], first, end, window, dtype=dtype)
    low = group[0].slot
    return RowGroup(rows, range(low, low + len(group)) if _have_adjacent_slots(group) else slots, first, end, mask)
