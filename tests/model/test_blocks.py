"""The largest logit of a row, found by way of the largest of its blocks."""

from __future__ import annotations

import math

import pytest
import torch

from server.model.categorical import largest
from tests.model.test_sampler import rows


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 511, 512, 513, 767, 768, 769, 1024, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_is_found_where_it_comes_first(vocab: int, dtype: torch.dtype) -> None:
    """Wherever it is, among equals near and far, in rows of few different numbers and of minus infinity."""
    borders = {place for end in range(0, vocab + 1, 256) for place in (end - 1, end, end + 1)} | {vocab - 1, vocab // 2}
    places = sorted(place for place in borders if 0 <= place < vocab)
    logits = rows(4 * len(places) + 2, vocab=vocab).to(dtype)
    for number, place in enumerate(places):
        alone, equal, few, lowest = logits[4 * number : 4 * number + 4]
        alone[place] = 50.0
        equal[place], equal[-1], equal[min(place + 1, vocab - 1)] = 50.0, 50.0, 50.0
        few.clamp_(-1, 1)
        lowest.fill_(-math.inf)[place] = -1e30
    logits[-2], logits[-1] = 0.0, -math.inf
    for some in (logits, logits[:1], logits.repeat(1, 2)[:, :vocab]):
        values, indices = largest(some)
        expected = [row.index(max(row)) for row in some.tolist()]
        assert indices.tolist() == expected
        assert torch.equal(values, some.max(dim=-1).values) and values.dtype == dtype


@pytest.mark.parametrize("vocab", [1, 256, 512, 513, 769, 5000])
def test_the_largest_of_a_row_that_is_not_finite_is_not(vocab: int) -> None:
    for place in {0, vocab // 2, vocab - 1}:
        logits = rows(5, vocab=vocab)
        logits[0, place], logits[1, place], logits[3] = math.nan, math.inf, math.nan
        logits[2], logits[2, place] = math.inf, math.nan
        values, indices = largest(logits)
        assert [value.isnan().item() for value in values] == [True, False, True, True, False]
        last = logits[4].tolist()
        assert (values[1].item(), indices[1].item()) == (math.inf, place)
        assert (values[4].item(), indices[4].item()) == (max(last), last.index(max(last)))
        assert all(0 <= index < vocab for index in indices.tolist())
