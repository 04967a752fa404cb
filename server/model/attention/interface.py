"""The attention function that modelling code calls, and the interface of its backends.

The sequences of a batch are concatenated in one row; a backend lets each token attend to its own sequence only.
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
    """Parameters of a layer's attention. ``softcap`` is Gemma 2's; ``sinks`` [heads] are GPT-OSS's."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether ``F.scaled_dot_product_attention`` can compute it."""
        return self.softcap is None and self.sinks is None


class AttentionBackend(ABC):
    """Writes the keys and values of a step into a KV cache, and computes attention over the cache.

    In each step ``prepare_slots`` and ``begin`` are called once, then ``attend`` once per layer. A backend plans a step
    (masks, groups of rows) in ``begin``, or for the first layer that needs the plan.
    """

    max_single_rows = 1
    """Up to this number of rows a prompt chunk is computed faster row by row than in one call."""
    is_recordable = False
    """Whether layer graphs can record the calls for decoding rows: native kernels compute them."""
    metadata: AttentionMetadata
    """The metadata of the latest step."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def prepare_slots(self, batch: Batch) -> None:
        """Apply the batch's KV operations to the cache."""
        for kv_op in batch.kv_ops:
            self.cache.apply(kv_op)

    def begin(self, metadata: AttentionMetadata) -> None:
        self.metadata = metadata

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """query [1, heads, rows, dim], key and value [1, kv_heads, rows, dim] -> [1, rows, heads, value_dim].

        The result has the dtype of the query; keys and values are stored in the dtype of the cache.
        """

    def step_tensors(self) -> list[torch.Tensor]:
        """Tensors that kernels read and each step allocates: inputs of a layer graph."""
        return [self.metadata.slots, self.metadata.positions]


BackendFactory = Callable[[KVCache], AttentionBackend]


class FlatAttention:
    """The attention function of one model, registered with transformers under a unique name.

    The backend gets a step's metadata by ``begin``, not as an argument of the model: the modelling code of Nemotron and
    StableLM does not pass keyword arguments on.
    """

    def __init__(self) -> None:
        self.name = f"quickchange_{next(_numbers)}"
        self.backend: AttentionBackend | None = None
        AttentionInterface.register(self.name, self)

    def install(self, model: PreTrainedModel) -> None:
        """Make the model call this function, which is closed when the model is garbage-collected."""
        model.set_attn_implementation(self.name)
        weakref.finalize(model, self.close).atexit = False

    def close(self) -> None:
        """Free the keys and values and unregister; the model cannot be run any more.

        transformers has a method that registers a function, and none that removes it.
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
    """Splits the segments of a batch for a backend.

    Each draft becomes a segment of one row, computed like a decoding row. So does each known token of a segment with at
    most ``max_single_rows`` of them; more stay one segment.
    """
    found: list[AttentionSegment] = []
    row = 0
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
