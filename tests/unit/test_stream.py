"""Streams: their grammar, and clients that go away; driven by ASGI messages, because disconnecting is one of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message

from server.api import responses
from server.api.app import create_app
from server.api.formats.chat import ChatFormat
from server.api.state import PingMode, ServerState
from server.metrics import BASE as BASE_LABEL
from server.text.prompt import PromptRenderer
from tests.fakes import BASE, FakeEngine, FakeSequence, Script, adapter, ask, events, server_state

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ONE: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "stream": True}


def stream(engine: FakeEngine, **fields: Any) -> list[Any]:
    """The events of a streamed chat."""
    response = ask(create_app(server_state(engine)), "POST", CHAT, json={**ONE, **fields})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(response)


def test_a_stream_is_role_deltas_end_and_done() -> None:
    *chunks, done = stream(FakeEngine([Script("the cat")]))
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == "the cat"
    assert all(set(choice["delta"]) == {"content"} and choice["finish_reason"] is None for choice in choices[1:-1])
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


def test_roles_come_first_and_in_order_however_the_answers_race() -> None:
    engine = FakeEngine([Script("slow", delay=0.005), Script("quick"), Script("quick too", then="length")])
    *chunks, done = stream(engine, n=3)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["index"] for choice in choices[:3]] == [0, 1, 2]
    assert all("role" in choice["delta"] for choice in choices[:3])
    texts, reasons = ["", "", ""], ["", "", ""]
    for choice in choices[3:]:
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] += choice["finish_reason"] or ""
    assert (texts, reasons) == (["slow", "quick", "quick too"], ["stop", "stop", "length"])
    assert done == "[DONE]"


def test_usage_comes_in_a_chunk_of_its_own_before_done() -> None:
    *chunks, usage, done = stream(FakeEngine([Script(then="length")]), stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]
    assert done == "[DONE]"


def test_a_stream_of_completions_has_text_and_no_roles() -> None:
    body = {"model": BASE, "prompt": ["a", "b"], "stream": True}
    app = create_app(server_state(FakeEngine([Script("x"), Script("y")])))
    *chunks, done = events(ask(app, "POST", COMPLETIONS, json=body))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        (choice,) = chunk["choices"]
        assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
        texts[choice["index"]] += choice["text"]
    assert (texts, done) == ({0: "x", 1: "y"}, "[DONE]")


def test_what_fails_after_the_first_token_is_an_event_and_the_end() -> None:
    *_, last, done = stream(FakeEngine([Script("hello", then="fail")]))
    assert (last["error"]["code"], done) == ("generation_failed", "[DONE]")
    assert "secret" not in json.dumps(last)
    *_, last, done = stream(FakeEngine([Script("hello", then="die")]))
    assert (last["error"]["code"], done) == ("engine_unavailable", "[DONE]")


def test_no_character_and_no_stop_string_is_cut() -> None:
    *chunks, _ = stream(FakeEngine([Script("日本 🎉🎉 STOP and more")]), stop="STOP")
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "日本 🎉🎉 "
    assert all("\ufffd" not in text and "S" not in text for text in texts)


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even before the first token, whose waiting must not keep the response back for ever."""
    monkeypatch.setattr(responses, "PING_SECONDS", 0.01)
    app = create_app(server_state(FakeEngine([Script("hi", delay=0.1)])))
    response = ask(app, "POST", CHAT, json=ONE)
    assert response.text.count(": ping\n\n") >= 2
    assert events(response)[-1] == "[DONE]"


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("ping", ["delta", "off"])
def test_silence_is_filled_with_empty_deltas_or_with_nothing(
    url: str, ping: PingMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "PING_SECONDS", 0.01)
    state = replace(server_state(FakeEngine([Script("hi", delay=0.1)])), sse_ping=ping)
    body = ONE if url == CHAT else {"model": BASE, "prompt": "x", "stream": True}
    response = ask(create_app(state), "POST", url, json=body)
    assert ": ping" not in response.text
    *chunks, done = events(response)
    choices = [chunk["choices"][0] for chunk in chunks]
    empty = [each for each in choices if each.get("delta", each.get("text")) in ({}, "") and not each["finish_reason"]]
    assert done == "[DONE]"
    assert (len(empty) >= 2) == (ping == "delta")


async def until_gone(app: FastAPI, engine: FakeEngine, body: dict[str, Any], *, num_messages: int) -> None:
    """Ask, take so many messages of the response, wait until the engine is at work, and hang up."""
    sent: list[Message] = []
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        while len(sent) < num_messages or engine.num_hanging < body["n"]:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b"", "root_path": ""}
    await asyncio.wait_for(app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send), 30)


@pytest.mark.parametrize(
    ("text", "streaming", "num_messages"),
    [
        pytest.param("hello", True, 3, id="in mid-stream"),
        pytest.param("hello", True, 1, id="as the stream opens"),
        pytest.param("", True, 0, id="before the first token of a stream"),
        pytest.param("hello", False, 0, id="while the answer is collected"),
        pytest.param("", False, 0, id="before the first token"),
    ],
)
def test_a_client_that_goes_away_stops_the_engine(text: str, streaming: bool, num_messages: int) -> None:
    engine = FakeEngine([Script(text, then="hang")])
    state = server_state(engine, adapter("poet"))
    body = {**ONE, "model": "poet", "stream": streaming, "n": 2}
    asyncio.run(until_gone(create_app(state), engine, body, num_messages=num_messages))
    assert len(engine.sequences) == 2
    assert engine.num_open == 0
    assert state.adapters.cache.num_leases("poet-weights") == 0
    labels = {"adapter": "poet", "finish_reason": "cancelled"}
    assert state.metrics.registry.get_sample_value("quickchange_requests_total", labels) == 2


def test_a_stream_that_is_never_begun_gives_everything_back() -> None:
    """A generator that was never started does not run its ``finally``: the response has to."""
    engine = FakeEngine()
    state = server_state(engine, adapter("poet"))

    async def broken(message: Message) -> None:
        raise OSError("the socket is gone")

    async def run() -> None:
        app, body = create_app(state), json.dumps({**ONE, "model": "poet"}).encode()
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            if (part := next(parts, None)) is not None:
                return part
            await asyncio.Event().wait()
            raise AssertionError

        headers = [(b"content-type", b"application/json")]
        await app(
            {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}, receive, broken
        )

    asyncio.run(run())
    assert engine.num_open == 0
    assert state.adapters.cache.num_leases("poet-weights") == 0


def cancelled_after(state: ServerState, num_ticks: int, body: dict[str, Any]) -> bool:
    """Ask, and cancel the request after so many turns of the event loop; whether it was still running."""

    async def run() -> bool:
        parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Message:
            if parts:
                return parts.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            await asyncio.sleep(0)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        app = create_app(state)
        handler = asyncio.ensure_future(app(scope, receive, send))
        for _ in range(num_ticks):
            await asyncio.sleep(0)
        running = handler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await handler
        return running

    return asyncio.run(run())


@pytest.mark.parametrize("streaming", [True, False])
def test_a_handler_cancelled_at_any_moment_gives_everything_back(
    streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler cancelled while its stream was handed over left the lease and the sequences with nobody."""

    async def in_the_loop(function: Any, *arguments: Any) -> Any:
        await asyncio.sleep(0)  # a worker thread would make the number of ticks differ from run to run
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", in_the_loop)
    body = {**ONE, "model": "poet", "stream": streaming, "n": 3}
    for num_ticks in range(200):
        engine = FakeEngine([Script("hello")])
        state = server_state(engine, adapter("poet"))
        running = cancelled_after(state, num_ticks, body)
        assert (engine.num_open, state.adapters.cache.num_leases("poet-weights")) == (0, 0), num_ticks
        if not running:
            break
    assert not running and num_ticks > 10


def count(state: ServerState, adapter_name: str, reason: str) -> float | None:
    labels = {"adapter": adapter_name, "finish_reason": reason}
    return state.metrics.registry.get_sample_value("quickchange_requests_total", labels)


def test_the_last_request_of_a_deleted_adapter_leaves_no_metric_series() -> None:
    """The lease was released before the log was written, which created the series of the forgotten adapter anew."""
    state = server_state(FakeEngine(), adapter("poet"))
    cache = state.adapters.cache
    release = cache.release

    def release_and_forget(digests: Any) -> None:
        release(digests)
        state.metrics.forget_adapter("poet")

    cache.release = release_and_forget  # type: ignore[method-assign]
    state.metrics.know_adapter("poet")
    ask(create_app(state), "POST", CHAT, json={**ONE, "model": "poet"})
    assert count(state, "poet", "stop") is None


@pytest.mark.parametrize("streaming", [True, False])
def test_an_error_after_a_stop_string_does_not_end_the_other_choices(
    streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that was in the queue behind the tokens of a stop string failed the whole request."""
    monkeypatch.setattr(FakeSequence, "close", lambda self: None)  # outputs that are on their way still arrive
    engine = FakeEngine([Script("a STOP b", then="fail"), Script("the other answer", delay=0.01)])
    body = {**ONE, "stream": streaming, "n": 2, "stop": "STOP"}
    response = ask(create_app(server_state(engine)), "POST", CHAT, json=body)
    assert response.status_code == 200
    assert "error" not in response.text


@pytest.mark.parametrize("streaming", [True, False])
def test_a_bug_while_text_is_made_counts_as_failed(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors of the engine were counted as failed; one of decoding was counted as a client that had left."""
    state = server_state(FakeEngine())

    def broken(self: PromptRenderer, ids: Any) -> str:
        raise RuntimeError("no text")

    monkeypatch.setattr(PromptRenderer, "decode", broken)
    response = ask(create_app(state), "POST", CHAT, json={**ONE, "stream": streaming})
    assert "internal_error" in response.text
    assert (count(state, BASE_LABEL, "failed"), count(state, BASE_LABEL, "cancelled")) == (1, 0)


def test_a_bug_while_a_whole_answer_is_written_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its choices had ended, so they were counted as answered, though the client got a 500."""
    state = server_state(FakeEngine())
    monkeypatch.setattr(ChatFormat, "body", lambda *_: 1 / 0)
    assert ask(create_app(state), "POST", CHAT, json={**ONE, "stream": False}).status_code == 500
    assert (count(state, BASE_LABEL, "failed"), count(state, BASE_LABEL, "stop")) == (1, 0)
