"""Attention over a flat batch: every row looks at its own sequence's keys alone.

The modelling code of transformers calls this in place of its own attention function; it hands over the window as
``sliding_window``, the soft cap as ``softcap``, and attention sinks as ``s_aux``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from server.lora.transfer import to_device
from server.model.kv_cache import KVCache, LayerShape, Span

if TYPE_CHECKING:
    from cpu_kernels.decode_attention import DecodeAttention
    from cpu_kernels.prompt_attention import PromptAttention
    from server.model.batched_attention import BatchedAttention, Plan

_FEW_ROWS = 32
_numbers = itertools.count()


@dataclass
class Layout:
    """Where each row of the flat batch belongs. ``slots`` and ``positions`` are [rows].

    ``masks`` and ``plans`` are what attention made of it for the first layer that needed them.
    """

    spans: tuple[Span, ...]
    slots: torch.Tensor
    positions: torch.Tensor
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    plans: dict[tuple[int | None, bool], Plan] = field(default_factory=dict)
    _singles: dict[int | None, tuple[torch.Tensor, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, spans: tuple[Span, ...], device: torch.device) -> Layout:
        """The layout of spans laid end to end."""
        slots, positions = to_device(device, *rows_of(spans))
        return cls(spans, slots, positions)

    def singles(self, window: int | None) -> tuple[torch.Tensor, int]:
        """Rows that are a span of their own with the first key each sees, int64 [n, 2]; the most keys one sees."""
        if window not in self._singles:
            rows = [(span.row, first_key(span, window)) for span in self.spans if span.length == 1]
            longest = max(
                (span.start + 1 - first_key(span, window) for span in self.spans if span.length == 1), default=0
            )
            self._singles[window] = torch.tensor(rows, dtype=torch.long).view(-1, 2), longest
        return self._singles[window]

    def mask(self, span: Span, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores of a chunk, [length, keys]: 0 where a row sees a key, else minus infinity.

        None for a single row, which sees all the keys it is given.
        """
        if span.length == 1:
            return None
        key = (span.start, span.length, window)
        if key not in self.masks:
            device = self.positions.device
            queries = torch.arange(span.start, span.start + span.length, device=device)[:, None]
            keys = torch.arange(first_key(span, window), span.start + span.length, device=device)[None]
            seen = keys <= queries
            seen = seen if window is None else seen & (queries - keys < window)
            self.masks[key] = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
        return self.masks[key]


def rows_of(spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """The slot and the position of each row of spans laid end to end."""
    slots = [span.slot for span in spans for _ in range(span.length)]
    positions = [position for span in spans for position in range(span.start, span.start + span.length)]
    return slots, positions


def first_key(span: Span, window: int | None) -> int:
    """The first position that any row of the span sees."""
    return 0 if window is None else max(0, span.start - window + 1)


@dataclass(frozen=True, eq=False)
class Scoring:
    """What becomes of the products of queries and keys; ``sinks`` [heads] and ``softcap`` are few models'."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.softcap is None and self.sinks is None


class FlatAttention:
    """The attention function of one model, registered with transformers under a name of its own.

    Without a cache it serves whole sequences only, and notes each layer's shapes: that is the probe at start. ``rows``,
    where it is set, is the native kernel for decoding rows, ``chunks`` that for prompts; ``windows`` are those it was
    called with. ``batched``, where it is set, attends to what is in the cache, as on accelerators. ``explicit`` says
    that some layer has soft caps or sinks.
    """

    def __init__(self, batched: BatchedAttention | None = None) -> None:
        self.name = f"quickchange_{next(_numbers)}"
        self.batched = batched
        self.cache: KVCache | None = None
        self.layout: Layout | None = None
        self.rows: DecodeAttention | None = None
        self.chunks: PromptAttention | None = None
        self.seen_shapes: dict[int, LayerShape] = {}
        self.windows: set[int | None] = set()
        self.explicit = False
        self.num_calls = 0
        AttentionInterface.register(self.name, self)

    @property
    def most_apart(self) -> int:
        """Rows of a prompt that are attended to one by one as fast as together, so that no step is of two kinds."""
        return 1 if self.rows is None or self.explicit else _FEW_ROWS

    def install(self, model: PreTrainedModel) -> None:
        """Make the model call this function; when the model is gone, it is closed."""
        model.set_attn_implementation(self.name)
        weakref.finalize(model, self.close).atexit = False

    def close(self) -> None:
        """Free the keys and values, and leave transformers' table of functions; its model cannot be run any more.

        transformers has a way into the table of all models, and none out of it.
        """
        AttentionInterface._global_mapping.pop(self.name, None)
        self.cache = self.layout = self.rows = self.chunks = None

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, heads, rows, dim], key and value [1, kv_heads, rows, dim] -> [1, rows, heads, value_dim]."""
        layout, layer = self._note(module, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.rows is not None and softcap is None and s_aux is None and self.rows.can_attend(query, key, value):
            return self._by_routine(layout, layer, query, key, value, scale, sliding_window), None
        if self.cache is not None:
            self.cache.write(layer, layout, key, value)
        kept = query.dtype if self.cache is None else self.cache.layout.dtype
        scoring = Scoring(scale, sliding_window, softcap, s_aux)
        plain = scoring.plain
        self.explicit |= not plain
        queries = query if kept == query.dtype else query.to(kept)
        if self.batched is not None and self.cache is not None:
            attended = self.batched.attend(self.cache, layer, layout, queries, scoring)[None]
            return attended if kept == query.dtype else attended.to(query.dtype), None
        singles = _folded(queries, key.shape[1]) if plain else ()
        parts = []  # [length, heads, value_dim] each
        for span in layout.spans:
            keys, values = self._keys_and_values(layer, span, sliding_window, key, value)
            if span.length == 1 and plain:
                parts.append(_single(singles[span.row], keys, values, scale))
                continue
            chunk = queries[:, :, span.row : span.row + span.length]
            if plain and span.start == 0 and (sliding_window is None or span.length <= sliding_window):
                parts.append(_chunk(chunk, keys, values, None, scale))
                continue
            mask = layout.mask(span, sliding_window, kept)
            if plain:
                parts.append(_chunk(chunk, keys, values, mask, scale))
            else:
                parts.append(explicit(chunk, keys, values, mask, scoring)[0].transpose(0, 1))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended[None].to(query.dtype), None

    def _by_routine(
        self,
        layout: Layout,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """As a call, without soft cap and sinks: chunks of prompts by a routine of their own, or by torch."""
        assert self.rows is not None and self.cache is not None
        self.windows.add(window)
        singles, longest = layout.singles(window)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        slots, positions = layout.slots, layout.positions
        attended = self.rows(query, key, value, keys, values, slots, positions, singles, longest, scale)
        for span in layout.spans:
            if span.length > 1:
                at = slice(span.row, span.row + span.length)
                mine = self._keys_and_values(layer, span, window, key, value)
                chunks = self.chunks
                if chunks is not None and chunks.can_attend(query, *mine):
                    chunks(query[0, :, at], mine[0][0], mine[1][0], attended[at], window, scale)
                    continue
                first = span.start == 0 and (window is None or span.length <= window)
                mask = None if first else layout.mask(span, window, keys.dtype)
                attended[at] = _chunk(query[:, :, at].to(keys.dtype), *mine, mask, scale)
        return attended[None]

    def _note(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[Layout, int]:
        assert self.layout is not None, "no batch was begun"
        layer = module.layer_idx
        assert isinstance(layer, int)
        self.num_calls += 1
        if self.cache is None:
            self.seen_shapes[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        return self.layout, layer

    def _keys_and_values(
        self, layer: int, span: Span, window: int | None, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values [1, kv_heads, keys, dim] a span looks at, without those before its window."""
        first, end = first_key(span, window), span.start + span.length
        if self.cache is not None:
            keys, values = self.cache.slot(layer, span.slot)
            return keys.narrow(2, first, end - first), values.narrow(2, first, end - first)
        assert span.start == 0, "without a cache a sequence comes whole"
        rows = slice(span.row, span.row + span.length)
        return key[:, :, rows], value[:, :, rows]


def _folded(query: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """Each row of a query [1, heads, rows, dim] as [1, kv_heads, group, dim].

    The heads of a group, which share keys, lie where rows would, so that no key is repeated.
    """
    _, heads, rows, dim = query.shape
    split: tuple[torch.Tensor, ...] = query[0].transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, dim).split(1)
    return split


def _single(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One row, folded, on all the keys it is given -> [1, heads, value_dim].

    Kernels differ in how their result lies in memory: on CUDA in float32 it is row by row, all heads of each.
    """
    return F.scaled_dot_product_attention(query, keys, values, scale=scale).reshape(1, -1, values.shape[-1])


def _chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Rows of a sequence, its first where there is no mask: [1, heads, rows, dim] -> [rows, heads, value_dim]."""
    grouped = query.shape[1] != keys.shape[1]
    attended = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return attended[0].transpose(0, 1)


def explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention written out, for soft-capped scores (Gemma 2) and for sinks (GPT-OSS), which only take probability.

    query [n, heads, rows, dim], keys and values [n, kv_heads, keys, dim], mask [rows, keys] or [n, 1, 1, rows, keys]
    -> [n, heads, rows, value_dim].
    """
    number, heads, rows, dim = query.shape
    _, kv_heads, num_keys, _ = keys.shape
    grouped = query.reshape(number, kv_heads, -1, dim)
    # [n, kv_heads, group, rows, keys]
    scores = (grouped @ keys.transpose(2, 3)).view(number, kv_heads, -1, rows, num_keys) * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None:
        scores = scores + mask
    if scoring.sinks is not None:
        column = scoring.sinks.view(kv_heads, -1, 1, 1).expand(number, kv_heads, -1, rows, 1).to(scores.dtype)
        weights = torch.cat([scores, column], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    folded = weights.to(values.dtype).view(number, kv_heads, -1, num_keys)
    return (folded @ values).view(number, heads, rows, -1)
