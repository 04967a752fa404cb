"""Penalties, biases and the least length of an answer change the logits as their definitions say, and no others."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from server.api.protocol import processed_fields
from server.model.logits.registry import PROCESSORS, LogitsProcessing
from server.sequence import SampleRow, SamplingParams, Sequence
from tests.model.engines import sample

VOCAB = 6
LOGITS = [2.0, -1.0, 0.5, 0.0, 3.0, -2.0]


def sequence(output_ids: list[int], *, prompt: tuple[int, ...] = (1,), eos: int = 5, **processors: object) -> Sequence:
    """A sequence with an output so far, and these processors."""
    params = SamplingParams(temperature=0, processors=tuple(processors.items()))
    return Sequence(1, prompt, 99, params, eos_ids=frozenset({eos}), output_ids=output_ids)


def processed(one: Sequence, *, drafts: tuple[int, ...] = (), logits: list[float] | None = None) -> list[float]:
    """The logits of the row behind output and drafts."""
    number = len(one.output_ids)
    draws = [SampleRow(one, number), *(SampleRow(one, number + 1 + place, draft) for place, draft in enumerate(drafts))]
    rows = torch.tensor(LOGITS if logits is None else logits).expand(len(draws), -1)
    found: list[float] = LogitsProcessing()(rows, draws)[-1].tolist()
    return found


def test_frequency_penalty_counts_and_presence_penalty_does_not() -> None:
    """Of the output alone, as OpenAI has it: token 1 of the prompt is not counted."""
    assert processed(sequence([4, 0, 4, 4], frequency_penalty=0.5)) == [1.5, -1.0, 0.5, 0.0, 1.5, -2.0]
    assert processed(sequence([4, 0, 4, 4], presence_penalty=0.5)) == [1.5, -1.0, 0.5, 0.0, 2.5, -2.0]
    both = sequence([4, 0, 4, 4], frequency_penalty=-0.25, presence_penalty=1.0)
    assert processed(both) == [1.25, -1.0, 0.5, 0.0, 2.75, -2.0]
    assert processed(sequence([], frequency_penalty=2.0, presence_penalty=2.0)) == LOGITS


def test_repetition_penalty_is_of_prompt_and_output() -> None:
    one = sequence([0, 3, 0], prompt=(1, 1, 4), repetition_penalty=2.0)
    assert processed(one) == [1.0, -2.0, 0.5, 0.0, 1.5, -2.0]
    assert processed(sequence([], prompt=(0,), repetition_penalty=0.5)) == [4.0, -1.0, 0.5, 0.0, 3.0, -2.0]


def test_biases_are_added_to_the_tokens_they_name() -> None:
    assert processed(sequence([], logit_bias=((0, -100.0), (5, 7.5)))) == [-98.0, -1.0, 0.5, 0.0, 3.0, 5.5]


def test_end_tokens_cannot_be_chosen_before_the_least_length() -> None:
    for length in range(5):
        ended = processed(sequence([0] * length, eos=4, min_tokens=3))
        assert ended == [*LOGITS[:4], -torch.inf if length < 3 else 3.0, LOGITS[5]]
    assert processed(sequence([0], eos=VOCAB + 1, min_tokens=3)) == LOGITS


def test_all_of_them_together_in_their_order() -> None:
    """Repetition first, then frequency and presence, then biases, and what may not end does not."""
    one = sequence(
        [0, 0, 4],
        prompt=(1, 0),
        eos=4,
        min_tokens=9,
        logit_bias=((4, 100.0), (2, 1.0)),
        presence_penalty=0.25,
        frequency_penalty=0.5,
        repetition_penalty=2.0,
    )
    assert processed(one) == [1.0 - 1.0 - 0.25, -2.0, 1.5, 0.0, -torch.inf, -2.0]


def test_a_drafts_row_sees_the_drafts_before_it_and_forgets_them() -> None:
    processing = LogitsProcessing()
    settings: dict[str, Any] = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.5}
    one, rng = sequence([4], prompt=(1, 2), min_tokens=9, **settings), random.Random(0)
    for _ in range(60):
        drafts = [rng.randrange(VOCAB) for _ in range(rng.randrange(5))]
        number = len(one.output_ids)
        draws = [
            SampleRow(one, number),
            *(SampleRow(one, number + 1 + place, draft) for place, draft in enumerate(drafts)),
        ]
        rows = processing(torch.tensor(LOGITS).repeat(len(draws), 1), draws)
        for place, row in enumerate(rows.tolist()):
            fresh = sequence([*one.output_ids, *drafts[:place]], prompt=(1, 2), min_tokens=9, **settings)
            assert row == processed(fresh)
        one.output_ids.append(rng.randrange(VOCAB))


def test_tokens_beyond_the_first_hundred_are_counted() -> None:
    output = [token for token in range(300) for _ in range(1 + token % 3)]
    one, logits = sequence([], frequency_penalty=1.0), torch.zeros(1, 400)
    processing = LogitsProcessing()
    for number in range(0, len(output) + 1, 25):
        one.output_ids[:] = output[:number]
        row = processing(logits, [SampleRow(one, number)])[0]
        assert torch.equal(-row, torch.bincount(torch.tensor(output[:number], dtype=torch.long), minlength=400).float())


@pytest.mark.parametrize("penalty", [1.3, 0.7, 5.0])
def test_repetition_penalty_is_transformers_own(penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ids = torch.randint(50, (1, 30), generator=generator)
        logits = torch.randn(50, generator=generator) * 5
        stock = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0]
        one = sequence(ids[0, 20:].tolist(), prompt=tuple(ids[0, :20].tolist()), repetition_penalty=penalty)
        assert processed(one, logits=logits.tolist()) == stock.tolist()


def test_the_least_length_is_transformers_own() -> None:
    for length in range(5):
        stock = MinNewTokensLengthLogitsProcessor(1, 3, [5])
        ids = torch.zeros(1, 1 + length, dtype=torch.long)
        expected = stock(ids, torch.tensor([LOGITS]))[0].tolist()
        assert processed(sequence([0] * length, prompt=(0,), min_tokens=3)) == expected


def test_rows_without_processors_are_untouched_and_a_batch_of_them_is_not_even_copied() -> None:
    plain, one = sequence([4]), sequence([4], frequency_penalty=1.0)
    logits = torch.tensor([LOGITS] * 3)
    before, processing = logits.clone(), LogitsProcessing()
    assert processing(logits, [SampleRow(plain, 1)] * 3) is logits
    changed = processing(logits, [SampleRow(plain, 1), SampleRow(one, 1), SampleRow(plain, 1)])
    assert torch.equal(logits, before)
    assert torch.equal(changed[[0, 2]], logits[[0, 2]]) and not torch.equal(changed[1], logits[1])


def test_greedy_and_sampled_rows_alike_are_chosen_from_processed_logits() -> None:
    logits = torch.tensor([LOGITS])
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=1, processors=(("logit_bias", ((3, 100.0),)),))
        assert sample(logits, [SampleRow(Sequence(1, (1,), 9, params), 0)]) == [3]


def test_a_row_that_is_not_finite_fails_with_processors_as_without() -> None:
    logits = torch.tensor([LOGITS, [torch.nan] * VOCAB, LOGITS])
    one = sequence([4], frequency_penalty=1.0, repetition_penalty=1.2, min_tokens=2)
    assert sample(logits, [SampleRow(one, 1)] * 3) == [0, None, 0]


def test_what_was_counted_goes_with_the_sequence() -> None:
    processing, one = LogitsProcessing(), sequence([4], frequency_penalty=1.0)
    processing(torch.tensor([LOGITS]), [SampleRow(one, 1)])
    assert len(processing._processors) == 1
    del one
    gc.collect()
    assert len(processing._processors) == 0


def test_every_marked_field_of_a_request_has_its_processor() -> None:
    assert set(processed_fields()) == set(PROCESSORS)
