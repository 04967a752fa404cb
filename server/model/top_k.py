"""The k largest logits of rows over a vocabulary."""

from __future__ import annotations

import torch

from server.model.blocks import BLOCK, block_maxima, block_places


def likeliest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Token ids [rows, count] of the largest logits of each row [rows, vocab], ascending; of equals the first ones.

    They lie in the ``count`` blocks whose maxima are the largest, of equal ones the first: whatever lies elsewhere has
    the maxima of ``count`` blocks before it.
    """
    vocab_size = logits.shape[1]
    if count * BLOCK >= vocab_size:
        return _largest_places(logits, count)
    places = block_places(_largest_places(block_maxima(logits), count), vocab_size)
    inside = logits.gather(1, places.clamp(max=vocab_size - 1)).masked_fill_(places >= vocab_size, -torch.inf)
    return places.gather(1, _largest_places(inside, count))


def _largest_places(values: torch.Tensor, count: int) -> torch.Tensor:
    """Places [rows, count], ascending, of the largest of each row of values [rows, width]; of equals the first ones."""
    least = values.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    chosen = values >= least
    if int(chosen.sum()) > chosen.shape[0] * count:
        larger, equal = values > least, values == least
        room = count - larger.sum(-1, keepdim=True)
        chosen = larger | (equal & (equal.cumsum(-1) <= room))
    return chosen.nonzero()[:, 1].view(len(values), count)
