"""Tokens are drawn from exactly the distribution that was asked for, and by nobody else's dice."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.model.sampler import Sampler, _largest, filtered, uniform
from server.sequence import Draw, SamplingParams, Sequence

VOCAB = 60


def rows(count: int, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random logits [count, vocab]."""
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sequence(number: int, **params: float | None) -> Sequence:
    """A sequence with these sampling parameters."""
    return Sequence(number, (1,), 1000, SamplingParams(**params))  # type: ignore[arg-type]


def firsts(*sequences: Sequence) -> list[Draw]:
    """The first token of each sequence."""
    return [Draw(sequence, 0) for sequence in sequences]


def draw_all(logits: torch.Tensor, drawn: Sequence) -> list[int | None]:
    """One token after another from rows of logits [tokens, vocab]."""
    return [Sampler().sample(row, [Draw(drawn, number)])[0] for number, row in enumerate(logits.split(1))]


def stock(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution [vocab] by transformers' own warpers."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    probabilities: torch.Tensor = warpers(torch.LongTensor([[0]]), torch.FloatTensor(logits[None]))[0].softmax(0)
    return probabilities


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.3),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=1),
        SamplingParams(top_k=7, temperature=1.5),
        SamplingParams(top_k=10_000),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.95, temperature=1.7),
        SamplingParams(top_p=1e-6),
        SamplingParams(min_p=0.1),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.8, min_p=0.05),
    ],
)
def test_the_distribution_is_the_one_transformers_computes(params: SamplingParams) -> None:
    for logits in rows(20):
        probabilities, ids = filtered(logits, params)
        ours = torch.zeros(VOCAB).scatter_(0, ids, probabilities / probabilities.sum())
        torch.testing.assert_close(ours, stock(logits, params), atol=1e-6, rtol=1e-4)
        assert probabilities.tolist() == sorted(probabilities.tolist(), reverse=True)


def test_drawn_tokens_follow_the_distribution() -> None:
    """Of 2,000 draws each candidate's share lies within five standard deviations."""
    draws, params = 2000, SamplingParams(temperature=1.5, top_k=8, top_p=0.9, seed=7)
    logits, drawn = rows(1, vocab=20), Sequence(1, (1,), draws, params)
    counts = Counter(draw_all(logits.expand(draws, -1), drawn))
    for token, share in enumerate(stock(logits[0], params).tolist()):
        assert abs(counts[token] / draws - share) <= 5 * math.sqrt(share * (1 - share) / draws)


def test_greedy_takes_the_likeliest() -> None:
    logits = rows(5)
    sequences = [sequence(n, temperature=temperature) for n, temperature in enumerate((0, 0.0, 1e-5, 0, 0))]
    assert Sampler().sample(logits, firsts(*sequences)) == logits.argmax(-1).tolist()


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    steps, one = [rows(4, seed=step) for step in range(12)], sequence(5, seed=11)
    by_itself = draw_all(torch.stack([logits[2] for logits in steps]), one)
    beside = []
    for step, logits in enumerate(steps):
        order = [0, 1, 2, 3] if step % 2 else [2, 3, 1, 0]
        draws = [Draw(one if row == 2 else sequence(90 + row, seed=row or None), step) for row in order]
        beside.append(Sampler().sample(logits[order], draws)[order.index(2)])
    assert beside == by_itself
    assert len(set(by_itself)) > 1


def test_another_seed_gives_other_tokens_and_no_seed_other_ones_each_time() -> None:
    def draws(seed: int | None) -> list[int | None]:
        return draw_all(rows(20), sequence(1, seed=seed, temperature=2.0))

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    Sampler().sample(rows(2), firsts(sequence(1), sequence(2, seed=3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_that_are_not_finite_fail_alone() -> None:
    logits = rows(5)
    logits[0, 3], logits[1, 0], logits[3] = math.nan, math.inf, -math.inf
    logits[4, 7] = -math.inf
    for temperature in (0.0, 1.0):
        sequences = [sequence(n, temperature=temperature, seed=n) for n in range(5)]
        tokens = Sampler().sample(logits, firsts(*sequences))
        assert [token is None for token in tokens] == [True, True, False, True, False]
        assert tokens[2] == Sampler().sample(logits[2:3], firsts(sequences[2]))[0]
        assert tokens[4] != 7


def test_a_token_is_drawn_by_its_seed_and_number_alone() -> None:
    """Whatever was drawn before it: with drafts, several tokens are drawn at once, and some of them in vain."""
    logits, one = rows(6), sequence(1, seed=5, temperature=2.0)
    in_order = draw_all(logits, one)
    backwards = [Sampler().sample(logits[number : number + 1], [Draw(one, number)])[0] for number in range(5, -1, -1)]
    assert backwards[::-1] == in_order
    drafts = [Draw(one, 0), *(Draw(one, number, in_order[number - 1]) for number in range(1, 6))]
    assert Sampler().sample(logits, drafts) == in_order


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_drawn_behind_a_draft_that_was_wrong(temperature: float) -> None:
    logits, one = rows(4), sequence(1, seed=5, temperature=temperature)
    right = draw_all(logits, one)
    wrong = (right[1] or 0) + 1
    draws = [Draw(one, 0), Draw(one, 1, right[0]), Draw(one, 2, wrong), Draw(one, 3, right[2])]
    assert Sampler().sample(logits, draws) == [right[0], right[1], None, None]


def test_random_numbers_are_even_and_those_of_neighbouring_seeds_have_nothing_in_common() -> None:
    """Means, variances and correlations of 4,000 numbers within five standard deviations."""
    count = 4000
    streams = torch.tensor(
        [[uniform(seed, number) for number in range(count)] for seed in (0, 1, 2, -1, 2**63)], dtype=torch.float64
    )
    assert float(streams.min()) >= 0.0
    assert float(streams.max()) < 1.0
    centred = streams - 0.5
    assert float(centred.mean(1).abs().max()) < 5 * math.sqrt(1 / 12 / count)
    correlations = centred @ centred.T / count * 12
    assert float((correlations - torch.eye(5)).abs().max()) < 5 * math.sqrt(1 / count)
    following = (centred[:, 1:] * centred[:, :-1]).mean(1) * 12
    assert float(following.abs().max()) < 5 * math.sqrt(1 / count)


def test_no_rows_no_tokens() -> None:
    assert Sampler().sample(torch.empty(0, VOCAB), []) == []


def test_half_precision_logits_are_drawn_in_single() -> None:
    logits = rows(3).bfloat16()
    sequences = [sequence(n, temperature=1.2, top_p=0.9, seed=n) for n in range(3)]
    draws = firsts(*sequences)
    assert Sampler().sample(logits, draws) == Sampler().sample(logits.float(), draws)


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
        values, indices = _largest(some)
        expected = [row.index(max(row)) for row in some.tolist()]
        assert indices.tolist() == expected
        assert torch.equal(values, some.max(dim=-1).values) and values.dtype == dtype


@pytest.mark.parametrize("vocab", [1, 256, 512, 513, 769, 5000])
def test_the_largest_of_a_row_that_is_not_finite_is_not(vocab: int) -> None:
    for place in {0, vocab // 2, vocab - 1}:
        logits = rows(5, vocab=vocab)
        logits[0, place], logits[1, place], logits[3] = math.nan, math.inf, math.nan
        logits[2], logits[2, place] = math.inf, math.nan
        values, indices = _largest(logits)
        assert [value.isnan().item() for value in values] == [True, False, True, True, False]
        last = logits[4].tolist()
        assert (values[1].item(), indices[1].item()) == (math.inf, place)
        assert (values[4].item(), indices[4].item()) == (max(last), last.index(max(last)))
        assert all(0 <= index < vocab for index in indices.tolist())
