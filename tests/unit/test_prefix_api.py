"""Whose prefixes a request may use, and how it is told what was reused."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest

from server.api.app import create_app
from server.api.generation import cache_namespace
from tests.fakes import BASE, FakeEngine, Script, adapter, ask, events, server_state

CHAT: tuple[str, dict[str, Any]] = (
    "/v1/chat/completions",
    {"model": BASE, "messages": [{"role": "user", "content": "hello"}]},
)
COMPLETION: tuple[str, dict[str, Any]] = ("/v1/completions", {"model": BASE, "prompt": "hello"})
KEY = "sk-somebodys-key-0123456789"


def namespaces(*asks: tuple[dict[str, str], dict[str, Any]], to: tuple[str, dict[str, Any]] = CHAT) -> list[bytes]:
    """What the engine is told of requests with these headers and fields."""
    engine = FakeEngine()
    app = create_app(server_state(engine))
    for headers, fields in asks:
        assert ask(app, "POST", to[0], json={**to[1], **fields}, headers=headers).status_code == 200
    return [each.cache_namespace for each in engine.submitted]


@pytest.mark.parametrize("to", [CHAT, COMPLETION])
def test_a_cache_namespace_is_a_key_and_a_salt(to: tuple[str, dict[str, Any]]) -> None:
    keys: list[dict[str, str]] = [{}, {"authorization": f"Bearer {KEY}"}, {"authorization": "Bearer other"}]
    salts: list[dict[str, Any]] = [{}, {"cache_salt": "a"}, {"cache_salt": KEY}]
    asks = list(itertools.product(keys, salts))
    found = namespaces(*asks, *asks, to=to)
    assert found[:9] == found[9:]
    assert len(set(found)) == 9
    assert namespaces((keys[0], {"cache_salt": None}), to=to) == found[:1]


def test_key_and_salt_cannot_be_shifted_into_each_other() -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("abc", None), (None, "abc"), ("abc", ""), ("", "abc"), (None, None), ("", "")]
    assert len({cache_namespace(*pair) for pair in pairs}) == len(pairs)
    assert all(len(cache_namespace(*pair)) == 16 for pair in pairs)


@pytest.mark.parametrize("salt", ["", "x" * 257, 3, ["a"], "\ud800"])
def test_other_salts_are_refused(salt: object) -> None:
    app = create_app(server_state(FakeEngine()))
    body = '{"model": "micro", "prompt": "x", "cache_salt": "\\ud800"}' if salt == "\ud800" else None
    if body is not None:
        headers = {"content-type": "application/json"}
        answer = ask(app, "POST", COMPLETION[0], content=body, headers=headers)
    else:
        answer = ask(app, "POST", COMPLETION[0], json={**COMPLETION[1], "cache_salt": salt})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


@pytest.mark.parametrize("to", [CHAT, COMPLETION])
def test_usage_says_how_many_tokens_were_reused(to: tuple[str, dict[str, Any]]) -> None:
    app = create_app(server_state(FakeEngine(num_cached=21)))
    whole = ask(app, "POST", to[0], json=to[1]).json()
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 21}
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    *_, usage, _ = events(ask(app, "POST", to[0], json={**to[1], **fields}))
    assert usage["usage"] == whole["usage"]


def test_each_prompt_counts_once_with_what_none_of_its_answers_had_to_compute() -> None:
    engine = FakeEngine()
    app = create_app(server_state(engine))
    submit, found = engine.submit, iter((0, 20, 7, 5))

    def reusing(*args: Any, **named: Any) -> Any:
        engine.num_cached = next(found)
        return submit(*args, **named)

    engine.submit = reusing  # type: ignore[method-assign]
    answer = ask(app, "POST", COMPLETION[0], json={"model": BASE, "prompt": ["a", "b"], "n": 2}).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}


def test_reuse_is_logged_and_counted_and_neither_key_nor_salt_is(caplog: pytest.LogCaptureFixture) -> None:
    state = server_state(FakeEngine([Script()], num_cached=21), adapter("poet"))
    body = {**CHAT[1], "model": "poet", "cache_salt": "a-secret-salt"}
    with caplog.at_level(logging.DEBUG):
        ask(create_app(state), "POST", CHAT[0], json=body, headers={"authorization": f"Bearer {KEY}"})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "quickchange.request"]
    assert " cached_tokens=21 " in line
    assert not any(secret in caplog.text for secret in (KEY, "a-secret-salt"))
    counted = state.metrics.registry.get_sample_value("quickchange_prefix_cached_tokens_total", {"adapter": "poet"})
    assert counted == 21
