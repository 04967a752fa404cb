"""Attention on an accelerator: one call for the decoding rows of all sequences, and one for each chunk of a prompt.

On a CPU a call costs little and padding costs reads, so that ``FlatAttention`` attends to one row after another. On an
accelerator calls are what a decoding step is made of.

Which kernel torch takes on CUDA decides how things are laid out. With a mask, and in float32, that is the
memory-efficient one: it takes any strides but those of the last dimension, copies a mask whose rows do not begin at
multiples of 8 numbers, and may know nothing of grouped heads. So the query heads that share keys are laid out as rows,
or as a batch of which all see the same keys, and no key is repeated in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from server.lora.transfer import to_device
from server.model.attention import Layout, Scoring, explicit, first_key
from server.model.kv_cache import KVCache, Span

_PADDING = 512
"""Keys that a row may be given beyond those it sees: reading them costs less than a call."""
_BLOCK = 64
"""Padded rows get whole blocks of keys, so that few sizes occur."""
_MASK_ALIGNMENT = 8


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
class Chunk:
    """Rows of one prompt; without a ``mask`` [rows, keys] each sees its own position and those before."""

    span: Span
    first: int
    mask: torch.Tensor | None

    @property
    def rows(self) -> slice:
        """Its rows of the batch."""
        return slice(self.span.row, self.span.row + self.span.length)

    def seen(self, kept: torch.Tensor) -> torch.Tensor:
        """Of [slots, kv_heads, max_len, dim] what the chunk looks at [1, kv_heads, keys, dim]."""
        return kept[self.span.slot : self.span.slot + 1, :, self.first : self.span.start + self.span.length]


@dataclass(frozen=True, eq=False)
class Plan:
    """A step's calls for layers of one window. ``whole`` is the one group of all rows in their order, if it is so."""

    groups: Sequence[RowGroup]
    chunks: Sequence[Chunk]
    whole: RowGroup | None


class BatchedAttention:
    """Attends to rows of a ``KVCache`` in which their keys and values are written already; it remembers nothing."""

    def attend(self, cache: KVCache, layer: int, layout: Layout, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """query [1, heads, rows, dim] in the cache's format -> [rows, heads, value_dim]."""
        kind = scoring.window, scoring.plain
        if kind not in layout.plans:
            layout.plans[kind] = plan(layout.spans, *kind, max_len=cache.layout.max_len, like=query)
        todo = layout.plans[kind]
        keys, values = cache.keys[layer], cache.values[layer]
        if todo.whole is not None:
            return _of_group(todo.whole, query, keys, values, scoring)
        num_heads, num_rows = query.shape[1:3]
        attended = query.new_empty(num_rows, num_heads, values.shape[-1])
        for group in todo.groups:
            queries = query.index_select(2, group.rows)
            attended.index_copy_(0, group.rows, _of_group(group, queries, keys, values, scoring))
        for chunk in todo.chunks:
            attended[chunk.rows] = _of_chunk(chunk, query[:, :, chunk.rows], keys, values, scoring)
        return attended


def plan(spans: Sequence[Span], window: int | None, causal: bool, *, max_len: int, like: torch.Tensor) -> Plan:
    """The calls for spans laid end to end, with masks in the format and on the device of ``like``.

    With ``causal`` the first rows of a prompt need no mask where no window hides any.
    """
    groups = grouped([span for span in spans if span.length == 1], window)
    lists = [[number(span) for span in group] for group in groups for number in (_row, _slot, _position)]
    tensors = to_device(like.device, *lists)
    made = [
        _row_group(group, *tensors[3 * place : 3 * place + 3], window=window, max_len=max_len, like=like)
        for place, group in enumerate(groups)
    ]
    chunks = [_planned_chunk(span, window, like, causal=causal) for span in spans if span.length > 1]
    in_order = len(groups) == 1 and [span.row for span in groups[0]] == list(range(len(spans)))
    return Plan(made, chunks, made[0] if in_order and not chunks else None)


def grouped(spans: Sequence[Span], window: int | None) -> list[list[Span]]:
    """Single rows in groups that read few keys for nothing: at most as many as they need, or ``_PADDING``."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=_position):
        if groups:
            head = groups[-1][0]
            first = first_key(head, window)
            num_keys = span.start + 1 - first
            if num_keys <= max(2 * (head.start + 1 - first), _PADDING):
                groups[-1].append(span)
                continue
        groups.append([span])
    return [_ordered(group) for group in groups]


def _ordered(group: Sequence[Span]) -> list[Span]:
    """By slot where the slots follow one another, so that no key is copied; else by row, so that no query is."""
    by_slot = sorted(group, key=_slot)
    return by_slot if _side_by_side(by_slot) else sorted(group, key=_row)


def _side_by_side(group: Sequence[Span]) -> bool:
    return [span.slot for span in group] == list(range(group[0].slot, group[0].slot + len(group)))


def _row_group(
    group: Sequence[Span],
    rows: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    window: int | None,
    max_len: int,
    like: torch.Tensor,
) -> RowGroup:
    first, end = min(first_key(span, window) for span in group), max(span.start for span in group) + 1
    mask = None
    if any(span.start + 1 != end for span in group):
        end = min(max_len, first + -(-(end - first) // _BLOCK) * _BLOCK)
        keys = torch.arange(first, end, device=like.device)
        mask = _mask(_hidden(positions[:, None], keys, window)[:, None, None], like)
    low = group[0].slot
    places = range(low, low + len(group)) if _side_by_side(group) else slots
    return RowGroup(rows, places, first, end, mask)


def _planned_chunk(span: Span, window: int | None, like: torch.Tensor, *, causal: bool) -> Chunk:
    first, end = first_key(span, window), span.start + span.length
    if causal and span.start == 0 and (window is None or span.length <= window):
        return Chunk(span, first, None)
    positions = torch.arange(span.start, end, device=like.device)
    keys = torch.arange(first, end, device=like.device)
    return Chunk(span, first, _mask(_hidden(positions[:, None], keys, window), like))


def _hidden(positions: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which keys [keys] rows at positions [rows, 1] must not see, [rows, keys]."""
    hidden = keys > positions
    return hidden if window is None else hidden | (keys <= positions - window)


def _mask(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What is added to scores, in rows that begin at multiples of ``_MASK_ALIGNMENT`` numbers."""
    num_keys = hidden.shape[-1]
    width = -(-num_keys // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
    mask = torch.zeros(*hidden.shape[:-1], width, dtype=like.dtype, device=like.device)[..., :num_keys]
    return mask.masked_fill_(hidden, float("-inf"))


def _of_group(
    group: RowGroup, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """query [1, heads, n, dim] -> [n, heads, value_dim]. Query heads that share keys lie where rows would."""
    _, num_heads, num_rows, dim = query.shape
    seen_keys, seen_values = group.seen(keys), group.seen(values)  # [n, kv_heads, keys, dim]
    if not scoring.plain:
        queries = query.permute(2, 1, 0, 3)  # [n, heads, 1, dim]
        mask = None if group.mask is None else group.mask[:, None]
        return explicit(queries, seen_keys, seen_values, mask, scoring)[:, :, 0]
    folded = query.view(keys.shape[1], -1, num_rows, dim).permute(2, 0, 1, 3)  # [n, kv_heads, group, dim]
    attended = F.scaled_dot_product_attention(folded, seen_keys, seen_values, attn_mask=group.mask, scale=scoring.scale)
    return attended.reshape(num_rows, num_heads, -1)


def _of_chunk(
    chunk: Chunk, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """query [1, heads, rows, dim] -> [rows, heads, value_dim]. Query heads that share keys are a batch."""
    _, num_heads, num_rows, dim = query.shape
    seen_keys, seen_values, mask = chunk.seen(keys), chunk.seen(values), chunk.mask
    if not scoring.plain:
        return explicit(query, seen_keys, seen_values, mask, scoring)[0].transpose(0, 1)
    split = query.view(keys.shape[1], -1, num_rows, dim).transpose(0, 1)  # [group, kv_heads, rows, dim]
    each_keys, each_values = (seen.expand(len(split), -1, -1, -1) for seen in (seen_keys, seen_values))
    attended = F.scaled_dot_product_attention(
        split, each_keys, each_values, attn_mask=mask, is_causal=mask is None, scale=scoring.scale
    )
    return attended.permute(2, 1, 0, 3).reshape(num_rows, num_heads, -1)


def _row(span: Span) -> int:
    return span.row


def _slot(span: Span) -> int:
    return span.slot


def _position(span: Span) -> int:
    return span.start
