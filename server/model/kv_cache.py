"""Keys and values of all sequences, one slot a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps for a position; K and V may differ, and so may layers."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """Per layer a tensor of keys and one of values, [slots, kv_heads, max_len, dim].

    A sequence's keys lie contiguous. On a CPU the operating system gives memory only to the pages that are written, so
    a slot costs what its sequence is long, not ``max_len``.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], *, num_slots: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = [
            torch.empty(num_slots, shape.num_kv_heads, max_len, shape.key_dim, dtype=dtype, device=device)
            for shape in shapes
        ]
        self.values = [
            torch.empty(num_slots, shape.num_kv_heads, max_len, shape.value_dim, dtype=dtype, device=device)
            for shape in shapes
        ]

    def write(
        self, layer: int, slots: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store keys and values [rows, kv_heads, dim] at (``slots``, ``positions``), [rows] each."""
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values
