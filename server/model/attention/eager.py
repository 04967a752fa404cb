"""Causal masks, and attention written out for what ``F.scaled_dot_product_attention`` cannot do: soft caps, sinks."""

from __future__ import annotations

import torch

from server.model.attention.interface import AttentionParams
from server.model.kv_cache import AttentionSegment

_MASK_ALIGNMENT = 8
"""Rows of a mask begin at multiples of so many numbers: CUDA's memory-efficient kernel copies other masks."""


def causal_mask(
    positions: torch.Tensor, first: int, end: int, window: int | None, *, dtype: torch.dtype
) -> torch.Tensor:
    """What is added to scores of rows at ``positions`` [..] and keys ``first`` to ``end``, [.., end - first].

    0 where the row sees the key, else minus infinity.
    """
    keys, rows = torch.arange(first, end, device=positions.device), positions[..., None]
    hidden = keys > rows
    if window is not None:
        hidden |= keys <= rows - window
    width = -(-(end - first) // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
    mask = torch.zeros(*positions.shape, width, dtype=dtype, device=positions.device)[..., : end - first]
    return mask.masked_fill_(hidden, float("-inf"))


def segment_mask(
    segment: AttentionSegment, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What is added to the scores of a segment's rows, [length, keys]; keys begin with the first that any row sees."""
    positions = torch.arange(segment.start, segment.end, device=device)
    return causal_mask(positions, segment.first_key(window), segment.end, window, dtype=dtype)


def eager_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, params: AttentionParams
) -> torch.Tensor:
    """Attention written out, for soft-capped scores (Gemma 2) and for sinks (GPT-OSS), which only take probability.

    query [n, heads, rows, dim], keys and values [n, kv_heads, keys, dim], mask [rows, keys] or [n, 1, 1, rows, keys]
    -> [n, heads, rows, value_dim].
    """
    number, heads, rows, dim = query.shape
    _, kv_heads, num_keys, _ = keys.shape
    grouped = query.reshape(number, kv_heads, -1, dim)
    # [n, kv_heads, group, rows, keys]
    scores = (grouped @ keys.transpose(2, 3)).view(number, kv_heads, -1, rows, num_keys) * params.scale
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    if mask is not None:
        scores = scores + mask
    if params.sinks is not None:
        column = params.sinks.view(kv_heads, -1, 1, 1).expand(number, kv_heads, -1, rows, 1).to(scores.dtype)
        weights = torch.cat([scores, column], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    folded = weights.to(values.dtype).view(number, kv_heads, -1, num_keys)
    return (folded @ values).view(number, heads, rows, -1)
