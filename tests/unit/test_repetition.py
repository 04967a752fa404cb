"""A looping adapter is told from a good one by its answers."""

from __future__ import annotations

import pytest

from server.api.app import create_app
from server.text.repetition import LOOP_LENGTH, MAX_PERIOD, is_loop
from tests.fakes import FakeEngine, Script, adapter, ask, encode, server_state

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
LOOP = encode("the cat ") * LOOP_LENGTH


@pytest.mark.parametrize("period", [1, 2, 3, 17, MAX_PERIOD])
@pytest.mark.parametrize("before", [[], [99, 98, 97]])
def test_an_answer_that_says_the_same_to_its_end_is_a_loop(period: int, before: list[int]) -> None:
    end = (list(range(period)) * LOOP_LENGTH)[:LOOP_LENGTH]
    assert is_loop(before + end)
    assert not is_loop([*before, *end[:-1], 99]), "it ends by another token"
    assert not is_loop(end[1:]), "it is shorter than a loop"


def test_a_period_that_is_too_long_is_no_loop() -> None:
    assert not is_loop(list(range(MAX_PERIOD + 1)) * 4)


def test_a_numbered_list_is_no_loop() -> None:
    assert not is_loop([token for number in range(30) for token in (1000 + number, 1, 2, 3)])


@pytest.mark.parametrize("stream", [False, True])
def test_repetitive_and_long_answers_are_counted_by_adapter(stream: bool) -> None:
    scripts = [Script(ids=LOOP, then="length"), Script("a good answer"), Script("left", then="fail")]
    state = server_state(FakeEngine(scripts), adapter("bad"), adapter("good"))
    app = create_app(state)
    for model in ("bad", "good", "good"):
        ask(app, "POST", "/v1/chat/completions", json={**CHAT, "model": model, "stream": stream})

    def value(name: str, model: str) -> float | None:
        return state.metrics.registry.get_sample_value(f"quickchange_{name}", {"adapter": model})

    assert (value("repetitive_answers_total", "bad"), value("repetitive_answers_total", "good")) == (1, 0)
    assert (value("answer_tokens_count", "bad"), value("answer_tokens_sum", "bad")) == (1, len(LOOP))
    assert value("answer_tokens_count", "good") == 1, "an answer that failed has no length"
    state.metrics.forget_adapter("bad")
    assert value("answer_tokens_count", "bad") is None
