"""Attention by torch on any device, and the masks for it.

Layouts suit the kernel that torch chooses on CUDA. With a mask, or in float32, that is the memory-efficient one: it
accepts any strides but those of the last dimension, copies a mask whose rows are not aligned to 8 numbers, and may not
support grouped heads. So the query heads of a group become rows, or a batch with the same keys, and no key is
repeated in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cpu_kernels.blocks import padded
from server.model.attention.interface import AttentionParams
from server.model.kv_cache import AttentionSegment

_MASK_ALIGNMENT = 8


def attend_rows(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, params: AttentionParams
) -> torch.Tensor:
    """One row of each of n sequences: query [n, kv_heads, group, dim] by ``fold_heads`` -> [n, heads, value_dim].

    keys and values are [n, kv_heads, keys, dim], mask [n, 1, 1, keys]; without a mask a row attends to all keys.
    """
    if not params.plain:
        heads = query.flatten(1, 2)[:, :, None]  # [n, heads, 1, dim]
        return eager_attention(heads, keys, values, None if mask is None else mask[:, None], params)[:, :, 0]
    attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=params.scale)
    return attended.reshape(len(query), -1, values.shape[-1])


def attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, params: AttentionParams
) -> torch.Tensor:
    """Rows of one sequence: query [1, heads, rows, dim] -> [rows, heads, value_dim].

    keys and values are [1, kv_heads, keys, dim], up to the last row's own; ``mask`` is that of ``chunk_mask``.
    """
    if not params.plain:
        return eager_attention(query, keys, values, mask, params)[0].transpose(0, 1)
    _, heads, rows, dim = query.shape
    split = query.view(keys.shape[1], -1, rows, dim).transpose(0, 1)  # [group, kv_heads, rows, dim]
    each_keys = keys.expand(len(split), -1, -1, -1)
    each_values = values.expand(len(split), -1, -1, -1)
    attended = F.scaled_dot_product_attention(
        split, each_keys, each_values, attn_mask=mask, is_causal=mask is None, scale=params.scale
    )
    return attended.permute(2, 1, 0, 3).reshape(rows, heads, -1)


def fold_heads(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[1, heads, rows, dim] -> [rows, kv_heads, group, dim]: the query heads of a group become rows."""
    _, _, rows, dim = query.shape
    return query.view(kv_heads, -1, rows, dim).permute(2, 0, 1, 3)


def chunk_mask(
    segment: AttentionSegment, params: AttentionParams, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """[rows, keys]; None if ``is_causal`` is enough: the first rows of a sequence, all within the window."""
    if params.plain and segment.start == 0 and (params.window is None or segment.length <= params.window):
        return None
    positions = torch.arange(segment.start, segment.end, device=device)
    return causal_mask(positions, segment.first_key(params.window), segment.end, params.window, dtype=dtype)


def causal_mask(
    positions: torch.Tensor, first: int, end: int, window: int | None, *, dtype: torch.dtype
) -> torch.Tensor:
    """The mask added to scores of rows at ``positions`` [..] and keys ``first`` to ``end``, [.., end - first].

    0 if the row attends to the key, else minus infinity.
    """
    keys = torch.arange(first, end, device=positions.device)
    rows = positions[..., None]
    hidden = keys > rows
    if window is not None:
        hidden |= keys <= rows - window
    width = padded(end - first, _MASK_ALIGNMENT)
    mask = torch.zeros(*positions.shape, width, dtype=dtype, device=positions.device)[..., : end - first]
    return mask.masked_fill_(hidden, float("-inf"))


def eager_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, params: AttentionParams
) -> torch.Tensor:
    """Attention without SDPA, for soft-capped scores (Gemma 2) and for sinks (GPT-OSS), which take probability only.

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
