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

from server.model.sampler import Sampler, filtered
from server.sequence import SamplingParams, Sequence

VOCAB = 60


def rows(count: int, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random logits [count, vocab]."""
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sequence(number: int, **params: float | None) -> Sequence:
    """A sequence with these sampling parameters."""
    return Sequence(number, (1,), 1000, SamplingParams(**params))  # type: ignore[arg-type]


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
    logits, sampler, drawn = rows(1, vocab=20), Sampler(), Sequence(1, (1,), draws, params)
    counts = Counter(sampler.sample(logits, [drawn])[0] for _ in range(draws))
    for token, share in enumerate(stock(logits[0], params).tolist()):
        assert abs(counts[token] / draws - share) <= 5 * math.sqrt(share * (1 - share) / draws)


def test_greedy_takes_the_likeliest() -> None:
    logits = rows(5)
    sequences = [sequence(n, temperature=temperature) for n, temperature in enumerate((0, 0.0, 1e-5, 0, 0))]
    assert Sampler().sample(logits, sequences) == logits.argmax(-1).tolist()


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    steps = [rows(4, seed=step) for step in range(12)]
    alone, crowd = Sampler(), Sampler()
    by_itself = [alone.sample(logits[2:3], [sequence(5, seed=11)])[0] for logits in steps]
    beside = []
    for step, logits in enumerate(steps):
        order = [0, 1, 2, 3] if step % 2 else [2, 3, 1, 0]
        sequences = [sequence(5, seed=11) if row == 2 else sequence(90 + row, seed=row or None) for row in order]
        beside.append(crowd.sample(logits[order], sequences)[order.index(2)])
    assert beside == by_itself
    assert len(set(by_itself)) > 1


def test_another_seed_gives_other_tokens_and_no_seed_other_ones_each_time() -> None:
    def draws(seed: int | None) -> list[int | None]:
        sampler, one = Sampler(), sequence(1, seed=seed, temperature=2.0)
        return [sampler.sample(logits, [one])[0] for logits in rows(20).split(1)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    Sampler().sample(rows(2), [sequence(1), sequence(2, seed=3)])
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_that_are_not_finite_fail_alone() -> None:
    logits = rows(5)
    logits[0, 3], logits[1, 0], logits[3] = math.nan, math.inf, -math.inf
    logits[4, 7] = -math.inf
    for temperature in (0.0, 1.0):
        sequences = [sequence(n, temperature=temperature, seed=n) for n in range(5)]
        tokens = Sampler().sample(logits, sequences)
        assert [token is None for token in tokens] == [True, True, False, True, False]
        assert tokens[2] == Sampler().sample(logits[2:3], sequences[2:3])[0]
        assert tokens[4] != 7


def test_a_generator_goes_with_its_sequence() -> None:
    sampler, one, logits = Sampler(), sequence(1, seed=5), rows(6)
    first = [sampler.sample(row, [one])[0] for row in logits.split(1)]
    sampler.forget(1)
    sampler.forget(2)
    assert [sampler.sample(row, [one])[0] for row in logits.split(1)] == first


def test_no_rows_no_tokens() -> None:
    assert Sampler().sample(torch.empty(0, VOCAB), []) == []


def test_half_precision_logits_are_drawn_in_single() -> None:
    logits = rows(3).bfloat16()
    sequences = [sequence(n, temperature=1.2, top_p=0.9, seed=n) for n in range(3)]
    assert Sampler().sample(logits, sequences) == Sampler().sample(logits.float(), sequences)
