"""Whatever else is in the batch, a sequence comes out as the stock model generates it alone."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.model.families import FAMILIES, LONGROPE_BORDER, build, fix_long_factors
from tests.model.harness import Ask, difference, generate, host, margin, prompts, stock_logits

TOLERANCE = 1e-5
"""Largest difference of logits, as a share of the largest stock logit, in float32; measured: 2e-6."""

BFLOAT16_MARGIN = 0.15
"""A row is decided in bfloat16 where its first logit stands so far above the second; rounding moves logits by 0.05."""

SEEDS = {"gpt2": 5}
"""Where the model of seed 0 has two tokens that are nearly equal."""

LENGTHS = (3, 40, 5, 61, 17, 9, 1)
"""Shorter and longer than a window of 8 and than a step's budget of 16 rows; more of them than there are slots."""


def asks(*lengths: int, num_tokens: int = 10) -> list[Ask]:
    """Prompts of these lengths that join one after another."""
    return [Ask(prompt, num_tokens + n % 3, step=2 * n) for n, prompt in enumerate(prompts(*lengths))]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits_equal_the_stock_models(family: str) -> None:
    length = LONGROPE_BORDER if family == "phi3_longrope" else 128
    model = build(family, seed=SEEDS.get(family, 0))
    wanted = asks(*(length_ for length_ in LENGTHS if length_ + 12 < length))
    stock = copy.deepcopy(model)
    answers = host(model, max_model_len=length).run(wanted)
    for answer in answers:
        expected = stock_logits(stock, answer)
        assert difference(answer.logits, expected) < TOLERANCE
        assert margin(expected) > 10 * TOLERANCE, "the test's model is not decided enough: choose another seed"
        assert answer.tokens == generate(stock, answer.ask)


def test_longrope_beyond_the_border_equals_generate_and_below_it_the_long_factors() -> None:
    """The frequencies are chosen once by ``max_model_len``, so that no sequence changes when a longer one joins."""
    model = build("phi3_longrope")
    stock, fixed = copy.deepcopy(model), copy.deepcopy(model)
    fix_long_factors(fixed)
    answers = host(model, max_model_len=128).run(asks(40, 5, 61, 9))
    for answer in answers:
        assert difference(answer.logits, stock_logits(fixed, answer)) < TOLERANCE
        if len(answer.ask.prompt) > LONGROPE_BORDER:
            assert answer.tokens == generate(stock, answer.ask)
        else:
            assert difference(answer.logits, stock_logits(stock, answer)) > 0.01


@pytest.mark.parametrize("family", ["llama", "llama_dynamic_rope", "gemma2", "gpt_oss", "phi3_longrope", "gpt2"])
def test_a_long_neighbour_does_not_change_a_short_row(family: str) -> None:
    hosted = host(build(family))
    short, long = (Ask(prompt, 12) for prompt in prompts(6, 90))
    (alone,) = hosted.run([short])
    beside = hosted.run([long, short])[1]
    assert beside.tokens == alone.tokens
    assert difference(beside.logits, alone.logits) < 1e-5


def test_a_slot_used_before_leaves_nothing_behind() -> None:
    hosted = host(build("mistral"), max_num_seqs=1)
    long, short = (Ask(prompt, 12) for prompt in prompts(90, 6))
    before = hosted.run([short])[0]
    after = hosted.run([long, short])[1]
    assert torch.equal(before.logits, after.logits)


@pytest.mark.parametrize("budget", [4, 7, 64, 1000])
def test_the_size_of_chunks_changes_nothing(budget: int) -> None:
    model = build("gemma3")
    stock = copy.deepcopy(model)
    for answer in host(model, budget=budget).run(asks(61, 5, 33)):
        assert difference(answer.logits, stock_logits(stock, answer)) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_bfloat16_is_as_near_to_the_truth_as_the_stock_model_in_bfloat16(family: str) -> None:
    """Truth is the same weights in float32. Tokens agree with the stock model's wherever the truth is decided."""
    model = build(family, dtype=torch.bfloat16)
    stock, exact = copy.deepcopy(model), copy.deepcopy(model).float()
    ours, theirs, decided, rows = 0.0, 0.0, 0, 0
    for answer in host(model).run(asks(3, 40, 17, 61)):
        truth, rounded = stock_logits(exact, answer), stock_logits(stock, answer)
        ours += float((answer.logits - truth).abs().mean())
        theirs += float((rounded - truth).abs().mean())
        for row, (mine, yours, true) in enumerate(zip(answer.logits, rounded, truth, strict=True)):
            rows += 1
            if margin(true[None]) > BFLOAT16_MARGIN:
                decided += 1
                assert int(mine.argmax()) == int(yours.argmax()) == int(true.argmax()), row
    assert ours < 1.25 * theirs
    assert decided > rows / 4, "the test's model is not decided enough: choose another seed"
