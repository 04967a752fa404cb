"""A sequence that reuses a prefix comes out as the stock model generates it alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from server.sequence import LoRARequest
from tests.model.families import FAMILIES, build, fix_long_factors
from tests.model.harness import Answer, Ask, Hosted, difference, generate, host, margin, prompts, stock_logits
from tests.model.test_peft_cases import family_of, make

TOLERANCE = 1e-5
"""Largest difference of logits, as a share of the largest stock logit, in float32."""

PLENTY = 2**30


def conversations(length: int) -> list[Ask]:
    """A prompt; its answer goes on; three that share its beginning come at once; one that shares half; one again."""
    system, one, two = prompts(length, 5, 7)
    return [
        Ask(system, 6),
        Ask((*system, *one), 8, step=20),
        Ask((*system, *two), 8, step=40),
        Ask((*system, *reversed(two)), 8, step=40),
        Ask((*system, *one, *two), 8, step=40),
        Ask((*system[: length // 2], *two, *one), 8, step=41),
        Ask(system, 6, step=80),
    ]


def check(hosted: Hosted, stock: object, asks: list[Ask]) -> list[Answer]:
    """Answers whose logits and tokens are the stock model's."""
    answers = hosted.run(asks)
    for answer in answers:
        expected = stock_logits(stock, answer)  # type: ignore[arg-type]
        assert difference(answer.logits, expected) < TOLERANCE
        if margin(expected) > 10 * TOLERANCE:
            assert answer.tokens == generate(stock, answer.ask)  # type: ignore[arg-type]
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reused_prefix_changes_nothing(family: str) -> None:
    """Sliding windows of 8, soft caps, sinks, position embeddings: keys and values are those of the tokens before."""
    model = build(family)
    stock = copy.deepcopy(model)
    if family == "phi3_longrope":
        fix_long_factors(stock)
    asks = conversations(60)
    answers = check(host(model, kv_memory=PLENTY), stock, asks)
    shared = len(asks[0].prompt)
    assert answers[0].num_cached == 0
    assert [answer.num_cached for answer in answers[1:5]] == [shared, shared, shared, shared + 5]
    assert answers[5].num_cached == shared // 2
    assert answers[6].num_cached == shared - 1


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2"])
def test_nor_does_memory_that_is_given_back_and_taken_again(family: str) -> None:
    model = build(family)
    stock = copy.deepcopy(model)
    hosted = host(model, kv_memory=PLENTY)
    hosted.kv_memory = 3 * hosted._cache.layout.bytes_of(hosted.max_len)
    asks = [Ask(prompt, 5, step=8 * n) for n, prompt in enumerate(prompts(60, 100, 30, 90, 20, 70))]
    asks = [*asks, *(Ask((*ask.prompt[:-2], 7, 8, 9), 5, step=80 + 8 * n) for n, ask in enumerate(reversed(asks)))]
    answers = check(hosted, stock, asks)
    assert any(answer.num_cached for answer in answers)
    assert not all(answer.num_cached for answer in answers[6:])


def test_adapters_and_scales_have_prefixes_of_their_own(tmp_path: Path) -> None:
    """Answers with prefixes reused are those without, for the base and an adapter at two scales."""
    family = family_of("llama")
    make("rslora", "llama", tmp_path / "it")
    family.hosted.add("it", family.read(tmp_path / "it")[1])
    (prompt,) = prompts(40)
    uses = ((), (LoRARequest("it"),), (LoRARequest("it", 0.5),))
    asks = [Ask(prompt, 4, use, step=20 * n) for n, use in enumerate((*uses, *uses))]
    plain, reusing = (replace(family.hosted, kv_memory=kv_memory).run(asks) for kv_memory in (None, PLENTY))
    family.hosted.runner.remove_adapter("it")
    assert [answer.num_cached for answer in plain] == [0] * 6
    assert [answer.num_cached for answer in reusing] == [0, 0, 0, 39, 39, 39]
    for one, other in zip(plain, reusing, strict=True):
        assert one.tokens == other.tokens
        assert difference(other.logits, one.logits) < TOLERANCE
    assert all(difference(reusing[n].logits[:1], reusing[0].logits[:1]) > 0.01 for n in (1, 2))
