"""Log probabilities are those of the model's own logits, for the rows that ask for them and no others."""

from __future__ import annotations

import math
from typing import Any

import torch

from server.model.sampler import Sampler
from server.sequence import SampledToken, SampleRow, SamplingParams, Sequence
from tests.model.test_sampler import recorded

LARGE_VOCAB = 151_936


def sequence(number: int, num_logprobs: int | None, **params: Any) -> Sequence:
    """A sequence that asks for so many of the likeliest tokens."""
    return Sequence(number, (1,), 99, SamplingParams(num_logprobs=num_logprobs, **params))


def random_logits(rows: int, vocab: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [rows, vocab] as peaked as a trained model's."""
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)


def sample(logits: torch.Tensor, *sequences: Sequence) -> list[SampledToken]:
    """The first token of each sequence."""
    tokens = Sampler().sample(logits, [SampleRow(each, 0) for each in sequences])
    return [token for token in tokens if token is not None]


def test_they_are_the_log_softmax_of_the_logits_whatever_the_sampling() -> None:
    """Temperature, filters, penalties and biases change which token is chosen, not what it is said to be worth."""
    changes: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.3, "seed": 1},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "seed": 2},
        {"seed": 3, "processors": (("logit_bias", ((7, 100.0),)), ("repetition_penalty", 1.5))},
    ]
    for vocab in (300, LARGE_VOCAB):
        for dtype in (torch.float32, torch.bfloat16):
            logits = random_logits(len(changes), vocab, dtype=dtype)
            before = logits.clone()
            expected = logits.double().log_softmax(-1)
            tokens = sample(logits, *(sequence(n, 20, **change) for n, change in enumerate(changes)))
            assert torch.equal(logits, before)
            for token, row in zip(tokens, expected, strict=True):
                assert token.logprob is not None and abs(token.logprob - row[token.id]) < 1e-5
                assert [top for top, _ in token.top_logprobs] == row.sort(descending=True, stable=True).indices[
                    :20
                ].tolist()
                assert all(abs(logprob - row[top]) < 1e-5 for top, logprob in token.top_logprobs)
            assert tokens[3].id == 7


def test_each_row_has_as_many_as_its_sequence_asks_for() -> None:
    logits = random_logits(5, 50)
    tokens = sample(logits, *(sequence(n, count, temperature=0) for n, count in enumerate((None, 0, 1, 20, 5))))
    assert [len(token.top_logprobs) for token in tokens] == [0, 0, 1, 20, 5]
    assert [token.logprob is None for token in tokens] == [True, False, False, False, False]
    assert all(token.top_logprobs[0] == (token.id, token.logprob) for token in tokens[2:])
    alone = [sample(logits[n : n + 1], sequence(n, 20, temperature=0))[0] for n in range(5)]
    assert all(alone[n].logprob == tokens[n].logprob for n in range(1, 5))
    assert tokens[4].top_logprobs == alone[4].top_logprobs[:5]


def test_equally_likely_tokens_come_by_their_ids_and_impossible_ones_are_minus_infinity() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 1.0, 1.0]])
    (token,) = sample(logits, sequence(1, 20, temperature=0))
    total = math.log(3 * math.e + 1)
    assert [top for top, _ in token.top_logprobs] == [1, 3, 4, 0, 2]
    assert [round(logprob, 6) for _, logprob in token.top_logprobs[:4]] == [
        *[round(1 - total, 6)] * 3,
        round(-total, 6),
    ]
    assert token.top_logprobs[4][1] == -math.inf


def test_rows_of_drafts_have_their_own_and_rejected_ones_none() -> None:
    logits, asking = random_logits(4, 40), sequence(1, 2, temperature=0)
    right = logits.argmax(-1).tolist()
    wrong = (right[1] + 1) % 40
    draws = [
        SampleRow(asking, 0),
        SampleRow(asking, 1, right[0]),
        SampleRow(asking, 2, wrong),
        SampleRow(asking, 3, right[2]),
    ]
    first, second, *rejected = Sampler().sample(logits, draws)
    assert rejected == [None, None]
    for number, token in enumerate((first, second)):
        assert token is not None and token.id == right[number] and token.logprob is not None
        assert abs(token.logprob - float(logits[number].log_softmax(-1)[right[number]])) < 1e-5


def test_who_does_not_ask_pays_nothing() -> None:
    """Not one operation more in a step where nobody asks, and only rows that ask where others do."""
    logits = random_logits(4, LARGE_VOCAB)
    with recorded() as nobody:
        sample(logits, *(sequence(n, None, temperature=0) for n in range(4)))
    names = [name for name, _ in nobody]
    assert not {"exp_", "sub", "topk"} & set(names)
    with recorded() as somebody:
        sample(logits, *(sequence(n, 5 if n == 2 else None, temperature=0) for n in range(4)))
    assert [name for name, _ in somebody[: len(names)]] == names
    more = [result for _, result in somebody[len(names) :]]
    assert max(result.numel() for result in more) == LARGE_VOCAB
    assert all(result.dtype != torch.float64 for result in more)  # which not every device has
