"""The attention of a probe: whole sequences without a KV cache, recording what each layer asks for."""

from __future__ import annotations

import torch

from server.model.attention.interface import AttentionParams, FlatAttention
from server.model.attention.sdpa import attend_chunk, chunk_mask
from server.model.kv_cache import AttentionMetadata, LayerShape


class ProbingAttention(FlatAttention):
    """The attention function of a model without a KV cache; ``begin`` takes the sequences of a forward pass.

    It counts calls, and records the shape of each layer's keys and values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._metadata: AttentionMetadata | None = None
        self._shapes: dict[int, LayerShape] = {}
        self.num_calls = 0

    @property
    def shapes(self) -> list[LayerShape]:
        return [self._shapes[layer] for layer in sorted(self._shapes)]

    def begin(self, metadata: AttentionMetadata) -> None:
        assert all(segment.start == 0 for segment in metadata.segments), "without a cache a sequence comes whole"
        self._metadata = metadata
        self.num_calls = 0

    def check_calls(self, num_layers: int) -> str | None:
        """What is wrong with the calls of the latest pass, None where each layer called the function once."""
        if 0 < num_layers == len(self._shapes) == self.num_calls:
            return None
        return (
            "its layers do not call the replaceable attention function exactly once "
            f"({num_layers} layers, {self.num_calls} calls on {len(self._shapes)} layers)"
        )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        assert self._metadata is not None, "no pass was begun"
        self.num_calls += 1
        self._shapes[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        parts = []  # [length, heads, value_dim] each
        for segment in self._metadata.segments:
            queries, keys, values = (tensor[:, :, segment.rows] for tensor in (query, key, value))
            mask = chunk_mask(segment, params, query.dtype, query.device)
            parts.append(attend_chunk(queries, keys, values, mask, params))
        return torch.cat(parts)[None]
