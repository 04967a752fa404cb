"""Rotary embeddings whose frequencies depend on length, fixed once for the longest sequence that may come.

Stock code chooses frequencies by the longest position in the batch, so that a long neighbour would change a short row.
"""

from __future__ import annotations

import torch
from torch import nn

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def fix_rope(model: nn.Module, max_model_len: int) -> None:
    """Let every rotary embedding choose its frequencies for ``max_model_len``, and keep them."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str) and _depends_on_length(rope_type):
            _choose(module, max_model_len)
            module.__dict__["rope_type"] = "default"
        elif isinstance(rope_type, dict):
            for layer_type, kind in rope_type.items():
                if _depends_on_length(kind):
                    _choose(module, max_model_len, layer_type=layer_type)
                    rope_type[layer_type] = "default"


def _depends_on_length(rope_type: str) -> bool:
    return any(kind in rope_type for kind in _LENGTH_DEPENDENT)


def _choose(module: nn.Module, max_model_len: int, **layer: str) -> None:
    frequencies = next(buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq"))
    last = torch.tensor([[max_model_len - 1]], device=frequencies.device)
    module(frequencies.new_zeros(1), position_ids=last, **layer)
