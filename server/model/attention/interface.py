"""The attention function that modelling code calls, and the interface of the backends that compute it.

Sequences lie end to end in one row of the batch; a backend lets each row see the keys of its own sequence alone.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from server.model.kv_cache import AttentionMetadata, AttentionSegment, KVCache
from server.sequence import Batch, Segment

_numbers = itertools.count()


class AttentionParams(NamedTuple):
    """How scores are computed. ``softcap`` is Gemma 2's; ``sinks`` [heads] are GPT-OSS's."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether ``F.scaled_dot_product_attention`` computes it."""
        return self.softcap is None and self.sinks is None


class AttentionBackend(ABC):
    """Writes the keys and values of a step into a KV cache, and attends to what is there.

    For each step ``prepare_slots`` and ``begin`` are called once, then ``attend`` once for each layer. What a backend
    plans for a step (masks, groups of rows) it makes in ``begin``, or for the first layer that needs it.
    """

    max_single_rows = 1
    """A prompt chunk of at most so many rows is computed faster row by row than in one call."""
    is_recordable = False
    """Whether a layer graph can hold the calls for decoding rows: native kernels compute them."""
    metadata: AttentionMetadata
    """That of the latest step."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def prepare_slots(self, batch: Batch) -> None:
        """What a batch asks of the KV cache before it is computed."""
        for kv_op in batch.kv_ops:
            self.cache.apply(kv_op)

    def begin(self, metadata: AttentionMetadata) -> None:
        self.metadata = metadata

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """query [1, heads, rows, dim], key and value [1, kv_heads, rows, dim] -> [1, rows, heads, value_dim].

        The result has the number format of the query; keys and values are kept in the cache's.
        """

    def step_tensors(self) -> list[torch.Tensor]:
        """Tensors that kernels read and that each step has anew: inputs of a recorded layer."""
        return [self.metadata.slots, self.metadata.positions]


BackendFactory = Callable[[KVCache], AttentionBackend]


class FlatAttention:
    """The attention function of one model, registered with transformers under a name of its own.

    A step's metadata reaches the backend by ``begin``, not as an argument of the model: the modelling code of Nemotron
    and of StableLM does not pass keyword arguments on.
    """

    def __init__(self) -> None:
        self.name = f"quickchange_{next(_numbers)}"
        self.backend: AttentionBackend | None = None
        AttentionInterface.register(self.name, self)

    def install(self, model: PreTrainedModel) -> None:
        """Make the model call this function; when the model is gone, it is closed."""
        model.set_attn_implementation(self.name)
        weakref.finalize(model, self.close).atexit = False

    def close(self) -> None:
        """Free the keys and values, and leave transformers' table of functions; its model cannot be run any more.

        transformers has a way into the table of all models, and none out of it.
        """
        AttentionInterface._global_mapping.pop(self.name, None)
        self.backend = None

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
        """As transformers calls it; ``s_aux`` are attention sinks. Shapes are those of ``AttentionBackend.attend``."""
        layer = module.layer_idx
        assert isinstance(layer, int)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        params = AttentionParams(scale, sliding_window, softcap, s_aux)
        return self.attend(layer, query, key, value, params), None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        assert self.backend is not None, "no KV cache, or the base was closed"
        return self.backend.attend(layer, query, key, value, params)


def attention_segments(segments: Sequence[Segment], max_single_rows: int) -> tuple[AttentionSegment, ...]:
    """The rows of a batch as a backend attends to them.

    Each draft is a segment of one row, so that it is computed as a decoding row is. So is each known token of a segment
    that has at most ``max_single_rows`` of them; more are one segment.
    """
    found, row = [], 0
    for segment in segments:
        num_together = segment.length - len(segment.drafts)
        if num_together > max_single_rows:
            found.append(AttentionSegment(row, segment.start, num_together, segment.slot))
        else:
            num_together = 0
        for offset in range(num_together, segment.length):
            found.append(AttentionSegment(row + offset, segment.start + offset, 1, segment.slot))
        row += segment.length
    return tuple(found)
