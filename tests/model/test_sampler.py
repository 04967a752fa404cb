"""Tokens are drawn from exactly the distribution that was asked for, and by nobody else's dice."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.model.categorical import StoredWeights, block_sums, exponentials, on_host, stream
from server.model.drawing import redraw_outside
from server.sequence import SampleRow, SamplingParams, Sequence
from tests.model.engines import sample

VOCAB = 60
LARGE_VOCAB = 151_936

SETTINGS = [
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
]


def rows(count: int, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random logits [count, vocab]."""
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sequence(number: int, **params: float | None) -> Sequence:
    """A sequence with these sampling parameters."""
    return Sequence(number, (1,), 1000, SamplingParams(**params))  # type: ignore[arg-type]


def firsts(*sequences: Sequence) -> list[SampleRow]:
    """The first token of each sequence."""
    return [SampleRow(sequence, 0) for sequence in sequences]


def draw_all(logits: torch.Tensor, drawn: Sequence) -> list[int | None]:
    """One token after another from rows of logits [tokens, vocab]."""
    return [sample(row, [SampleRow(drawn, number)])[0] for number, row in enumerate(logits.split(1))]


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


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution [vocab] in double precision, by a sort: likeliest first, equals by token id."""
    scaled, order = (logits.double() / params.temperature).sort(descending=True, stable=True)
    width = params.top_k or len(logits)
    shares = scaled[:width].softmax(0)
    kept = shares.cumsum(0) - shares < params.top_p
    kept &= shares >= params.min_p * shares[0]
    kept[0] = True
    shares = shares * kept
    return torch.zeros(len(logits), dtype=torch.float64).scatter_(0, order[:width], shares / shares.sum())


def all_draws(logits: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    """``count`` tokens of one sequence, all from the same row of logits [vocab]."""
    drawn, tokens = Sequence(1, (1,), count, params), []
    batch = 32 if len(logits) == LARGE_VOCAB else 250
    for first in range(0, count, batch):
        draws = [SampleRow(drawn, number) for number in range(first, min(first + batch, count))]
        tokens += sample(logits.expand(len(draws), -1), draws)
    return [token for token in tokens if token is not None]


def in_top_p(weights: list[float], top_p: float) -> list[int]:
    """The places of one row of weights which are left as they were drawn."""
    places = list(range(len(weights)))
    draws = [SampleRow(sequence(place, top_p=top_p, seed=place), 0) for place in places]
    table = torch.tensor(weights).expand(len(weights), -1)
    redraw_outside(places, np.array(weights), StoredWeights(table), on_host(block_sums(table)), draws)
    kept = [place for place, drawn in enumerate(places) if place == drawn]
    assert set(places) <= set(kept)
    return kept


@pytest.mark.parametrize("params", SETTINGS)
def test_the_reference_is_the_distribution_transformers_computes(params: SamplingParams) -> None:
    for logits in rows(20):
        torch.testing.assert_close(reference(logits, params).float(), stock(logits, params), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("params", [SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.95)])
def test_rounding_changes_few_of_the_tokens_that_are_drawn(params: SamplingParams) -> None:
    """A neighbour in the batch may round logits otherwise, which an inverse CDF over 152k tokens showed 60 times more.

    The most that any way to draw could keep is one less half the difference of the distributions.
    """
    logits = torch.randn(LARGE_VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    noise = torch.randn(LARGE_VOCAB, generator=torch.Generator().manual_seed(6)) * 1e-3
    count = 320
    as_it_was, rounded = all_draws(logits, params, count), all_draws(logits + noise, params, count)
    assert len(set(as_it_was)) > count / 2
    assert sum(one != other for one, other in zip(as_it_was, rounded, strict=True)) <= 3


@pytest.mark.parametrize("params", SETTINGS)
def test_what_is_drawn_is_never_outside_and_all_that_is_inside_is_drawn(params: SamplingParams) -> None:
    for seed, logits in enumerate(rows(2, vocab=12)):
        shares = reference(logits, params)
        drawn = set(all_draws(logits, replace(params, seed=seed), 500))
        assert drawn <= {token for token, share in enumerate(shares.tolist()) if share > 0}
        assert drawn >= {token for token, share in enumerate(shares.tolist()) if share > 0.03}


def test_top_p_keeps_the_fewest_that_reach_it_and_equals_by_token_id() -> None:
    equal = [0.25] * 4
    assert in_top_p(equal, 0.25) == [0]
    assert in_top_p(equal, 0.5) == [0, 1]
    assert in_top_p(equal, 0.51) == [0, 1, 2]
    assert in_top_p(equal, 0.75) == [0, 1, 2]
    assert in_top_p(equal, 0.76) == [0, 1, 2, 3]
    mixed = [0.125, 0.0625, 0.5, 0.125, 0.0625, 0.125, 0.0]
    assert in_top_p(mixed, 1e-9) == [2]
    assert in_top_p(mixed, 0.5) == [2]
    assert in_top_p(mixed, 0.625) == [0, 2]
    assert in_top_p(mixed, 0.7) == [0, 2, 3]
    assert in_top_p(mixed, 0.875) == [0, 2, 3, 5]
    assert in_top_p(mixed, 0.9) == [0, 1, 2, 3, 5]


def test_top_k_keeps_the_first_of_equals() -> None:
    """Far apart and side by side, within one block and over many, by way of blocks and of the whole row."""
    for vocab in (20, 5000):
        logits = torch.zeros(1, vocab)
        logits[0, 7], logits[0, vocab - 2] = 1.0, 1.0
        for top_k, kept in ((1, {7}), (2, {7, vocab - 2}), (4, {0, 1, 7, vocab - 2})):
            assert set(all_draws(logits[0], SamplingParams(top_k=top_k, seed=3), 200)) == kept


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[[3, 50]] = torch.tensor([1.0, 1.5])
    for params in SETTINGS:
        assert set(all_draws(logits, params, 50)) <= {3, 50}


def test_drawn_tokens_follow_the_distribution() -> None:
    """Of 2,000 draws each candidate's share lies within five standard deviations."""
    draws, params = 2000, SamplingParams(temperature=1.5, top_k=8, top_p=0.9, seed=7)
    logits, drawn = rows(1, vocab=20), Sequence(1, (1,), draws, params)
    counts = Counter(draw_all(logits.expand(draws, -1), drawn))
    for token, share in enumerate(stock(logits[0], params).tolist()):
        assert abs(counts[token] / draws - share) <= 5 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize(
    ("params", "spread"),
    [
        (SamplingParams(seed=1), 0.5),
        (SamplingParams(seed=2, top_p=0.95), 0.5),
        (SamplingParams(seed=3, top_p=0.95), 4.0),
        (SamplingParams(seed=4, top_p=0.3), 0.5),
        (SamplingParams(seed=5, temperature=0.7, top_k=40, top_p=0.9, min_p=0.02), 4.0),
    ],
)
def test_a_large_vocabulary_is_drawn_from_in_its_proportions(params: SamplingParams, spread: float) -> None:
    """Flat as a random base's, or peaked as a trained one's: chi-square over tokens in groups of like share."""
    count, num_groups = 320, 16
    logits = torch.randn(LARGE_VOCAB, generator=torch.Generator().manual_seed(9)) * spread
    shares = reference(logits, params)
    groups = ((shares.cumsum(0) - shares / 2) * num_groups).long().clamp_(max=num_groups - 1)
    drawn = torch.tensor(all_draws(logits, params, count))
    assert bool((shares[drawn] > 0).all())
    expected = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups, shares) * count
    found = torch.bincount(groups[drawn], minlength=num_groups)
    large = expected >= 5
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    found = torch.cat([found[large], found[~large].sum()[None]])
    statistic = float(((found - expected) ** 2 / expected.clamp(min=1.0)).sum())
    assert statistic < len(expected) + 5 * math.sqrt(2 * len(expected))


@contextmanager
def recorded() -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Names of torch's operations, and what each returned first."""
    operations: list[tuple[str, torch.Tensor]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            first = result[0] if isinstance(result, tuple | list) else result
            if isinstance(first, torch.Tensor):
                operations.append((func.overloadpacket.__name__, first))
            return result

    new_mode: Callable[[], TorchDispatchMode] = Record  # whose __init__ has no annotations in torch
    with new_mode():
        yield operations


@pytest.mark.parametrize("params", [*SETTINGS, SamplingParams(top_k=50), SamplingParams(top_p=0.2)])
def test_nothing_is_sorted_and_no_device_needs_double_precision(params: SamplingParams) -> None:
    """A sort of the vocabulary took 27 ms a token, and GPUs of some kinds have no float64."""
    logits = rows(3, vocab=LARGE_VOCAB)
    logits[1] /= 6
    with recorded() as operations:
        assert None not in sample(logits, firsts(*[Sequence(n, (1,), 9, params) for n in range(3)]))
    names = {name for name, _ in operations}
    assert names >= {"amax", "_softmax"}
    assert names.isdisjoint({"sort", "argsort", "msort", "_unique2", "multinomial"})
    assert all(result.dtype != torch.float64 for _, result in operations)


def test_greedy_takes_the_likeliest() -> None:
    logits = rows(5)
    sequences = [sequence(n, temperature=temperature) for n, temperature in enumerate((0, 0.0, 1e-5, 0, 0))]
    assert sample(logits, firsts(*sequences)) == logits.argmax(-1).tolist()


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    steps, one = [rows(4, seed=step) for step in range(12)], sequence(5, seed=11)
    by_itself = draw_all(torch.stack([logits[2] for logits in steps]), one)
    beside = []
    for step, logits in enumerate(steps):
        order = [0, 1, 2, 3] if step % 2 else [2, 3, 1, 0]
        draws = [SampleRow(one if row == 2 else sequence(90 + row, seed=row or None), step) for row in order]
        beside.append(sample(logits[order], draws)[order.index(2)])
    assert beside == by_itself
    assert len(set(by_itself)) > 1


@pytest.mark.parametrize("vocab", [300, 5003, LARGE_VOCAB])
def test_a_token_is_the_same_alone_and_among_any_neighbours_with_any_number_of_threads(vocab: int) -> None:
    """To the bit: weights and the sums of their blocks too, on which the choice rests."""
    settings = [*SETTINGS, SamplingParams(temperature=0), SamplingParams(top_p=0.9), SamplingParams(top_k=50)]
    logits = rows(len(settings), vocab=vocab)
    draws = [SampleRow(Sequence(n, (1,), 9, replace(params, seed=n)), n) for n, params in enumerate(settings)]
    alone = [sample(logits[n : n + 1], draws[n : n + 1])[0] for n in range(len(draws))]
    weights = [row[None].softmax(-1) for row in logits]
    threads = torch.get_num_threads()
    try:
        for number, num_threads in enumerate((1, 2, 3)):
            torch.set_num_threads(num_threads)
            order = random.Random(number).sample(range(len(draws)), len(draws) - 4 * number)
            tokens = sample(logits[order], [draws[n] for n in order])
            assert tokens == [alone[n] for n in order]
            together = logits[order].softmax(-1)
            assert torch.equal(together, torch.cat([weights[n] for n in order]))
            assert torch.equal(block_sums(together), torch.cat([block_sums(weights[n]) for n in order]))
    finally:
        torch.set_num_threads(threads)


def test_another_seed_gives_other_tokens_and_no_seed_other_ones_each_time() -> None:
    def draws(seed: int | None) -> list[int | None]:
        return draw_all(rows(20), sequence(1, seed=seed, temperature=2.0))

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    sample(rows(2), firsts(sequence(1), sequence(2, seed=3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_that_are_not_finite_fail_alone() -> None:
    logits = rows(5)
    logits[0, 3], logits[1, 0], logits[3] = math.nan, math.inf, -math.inf
    logits[4, 7] = -math.inf
    for params in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        sequences = [sequence(n, seed=n, **params) for n in range(5)]
        tokens = sample(logits, firsts(*sequences))
        assert [token is None for token in tokens] == [True, True, False, True, False]
        assert tokens[2] == sample(logits[2:3], firsts(sequences[2]))[0]
        assert tokens[4] != 7


def test_a_token_is_drawn_by_its_seed_and_number_alone() -> None:
    """Whatever was drawn before it: with drafts, several tokens are drawn at once, and some of them in vain."""
    logits, one = rows(6), sequence(1, seed=5, temperature=2.0)
    in_order = draw_all(logits, one)
    backwards = [sample(logits[number : number + 1], [SampleRow(one, number)])[0] for number in range(5, -1, -1)]
    assert backwards[::-1] == in_order
    drafts = [SampleRow(one, 0), *(SampleRow(one, number, in_order[number - 1]) for number in range(1, 6))]
    assert sample(logits, drafts) == in_order


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_drawn_behind_a_draft_that_was_wrong(temperature: float) -> None:
    logits, one = rows(4), sequence(1, seed=5, temperature=temperature)
    right = draw_all(logits, one)
    wrong = (right[1] or 0) + 1
    draws = [SampleRow(one, 0), SampleRow(one, 1, right[0]), SampleRow(one, 2, wrong), SampleRow(one, 3, right[2])]
    assert sample(logits, draws) == [right[0], right[1], None, None]


def test_random_numbers_are_exponential_and_those_of_neighbouring_streams_have_nothing_in_common() -> None:
    """Means, variances and correlations of 4,000 numbers within five standard deviations."""
    count = 4000
    streams = [stream(seed, 0) for seed in (0, 1, 2, -1, 2**63)]
    streams += [stream(0, number, attempt) for number, attempt in ((1, 0), (2, 0), (0, 1), (0, 2), (1, 1))]
    rows = [exponentials(streams, np.arange(count))]
    rows.append(exponentials([stream(7, number) for number in range(count)], np.arange(2)).T)  # token after token
    rows.append(exponentials([stream(7, 0, attempt) for attempt in range(1, count + 1)], np.arange(1)).T)
    numbers = torch.from_numpy(np.concatenate(rows))
    assert bool((numbers > 0).all()) and bool(numbers.isfinite().all())
    centred = 0.5 - (-numbers).exp()  # even, between -0.5 and 0.5
    assert float(centred.mean(1).abs().max()) < 5 * math.sqrt(1 / 12 / count)
    correlations = centred @ centred.T / count * 12
    assert float((correlations - torch.eye(len(centred))).abs().max()) < 5 * math.sqrt(1 / count)
    following = (centred[:, 1:] * centred[:, :-1]).mean(1) * 12
    assert float(following.abs().max()) < 5 * math.sqrt(1 / count)


def test_no_rows_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


def test_half_precision_logits_are_drawn_in_single() -> None:
    logits = rows(3).bfloat16()
    sequences = [sequence(n, temperature=1.2, top_p=0.9, seed=n) for n in range(3)]
    draws = firsts(*sequences)
    assert sample(logits, draws) == sample(logits.float(), draws)
