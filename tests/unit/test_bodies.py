"""Large bodies: what is refused before it is validated or tokenized, and that the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.api import ignored_fields, translation
from server.api.app import create_app
from server.api.limits import bodies
from server.api.limits.bodies import LARGE_BODY, MAX_DEPTH, BodyReader
from server.api.protocol.model import fields_without_effect
from server.errors import PromptTooLong
from server.text.chat_prompt import ChatPrompts
from server.text.prompt import PromptRenderer
from server.text.prompt_bound import max_prompt_bytes
from tests.fakes import BASE, FakeEngine, ask, encode, server_state, small_tokenizer

URL = "/v1/chat/completions"


def post(body: Any, url: str = URL) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    app = create_app(server_state(FakeEngine()))
    return ask(app, "POST", url, content=content, headers={"content-type": "application/json"})


def chat(**more: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], **more}


def padded(body: dict[str, Any]) -> bytes:
    """The JSON of a body, with as many spaces behind it that it is a large one."""
    return json.dumps(body).encode() + b" " * LARGE_BODY


def test_a_body_of_more_messages_than_the_context_has_tokens_is_refused_before_it_is_validated() -> None:
    since = time.perf_counter()
    answer = post(chat(messages=[{"role": "user", "content": "a"}] * 50_000))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert "100002 fields" in answer.json()["error"]["message"]
    assert time.perf_counter() - since < 2


@pytest.mark.parametrize("nested", ["[" * 5_000 + "]" * 5_000, "[" + "[]," * 20_000 + "[]]"])
def test_too_deep_or_too_many_arrays_are_refused(nested: str) -> None:
    padding = " " * LARGE_BODY
    answer = post(f'{{"model": "{BASE}", "messages": {nested}{padding}}}'.encode())
    assert answer.status_code in (400, 413)
    assert answer.json()["error"]["code"] in ("request_too_large", "invalid_json")


def test_nesting_has_a_limit() -> None:
    answer = post(
        chat(metadata={"x": json.loads("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)), "p": "x" * LARGE_BODY})
    )
    assert answer.status_code == 413 and "levels" in answer.json()["error"]["message"]


def test_quotes_in_strings_are_no_fields() -> None:
    text = json.dumps({f"key{number}": "v" for number in range(20_000)})
    answer = post(chat(messages=[{"role": "user", "content": text}]))
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [({"temperature": "hot"}, "temperature", "invalid_type"), ({"messages": []}, "messages", "empty_array")],
)
def test_a_large_body_has_the_errors_of_a_small_one(wrong: dict[str, Any], param: str, code: str) -> None:
    small = post(chat(**wrong))
    large = post(padded(chat(**wrong)))
    assert large.status_code == small.status_code == 400
    assert large.json() == small.json()
    assert (large.json()["error"]["param"], large.json()["error"]["code"]) == (param, code)


def test_large_text_that_is_no_json_is_told_as_such() -> None:
    small, large = post(b'{"model": x'), post(b'{"model": "' + b"a" * LARGE_BODY + b'", x')
    assert large.status_code == small.status_code == 400
    assert large.json()["error"]["code"] == small.json()["error"]["code"] == "invalid_json"


def test_a_prompt_longer_than_the_context_can_be_is_refused_without_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 2 MB was tokenized for 3 s before its length was known."""
    tokenizer = small_tokenizer()
    renderer = PromptRenderer(tokenizer, max_model_len=256)
    longest = max_prompt_bytes(tokenizer.backend_tokenizer, 256)
    assert longest is not None
    monkeypatch.setattr(ChatPrompts, "ids", lambda *_, **__: pytest.fail("it was rendered"))
    with pytest.raises(PromptTooLong, match=f"256 tokens have at most {longest}"):
        renderer.chat([{"role": "user", "content": "x" * (longest + 1)}])
    with pytest.raises(PromptTooLong):
        renderer.completion("x" * (longest + 1))


def test_no_text_of_that_many_tokens_is_longer_than_the_bound() -> None:
    tokenizer = small_tokenizer()
    longest = max(tokenizer.get_vocab().items(), key=lambda item: len(item[0]))[1]
    text = str(tokenizer.decode([longest] * 50))
    bound = max_prompt_bytes(tokenizer.backend_tokenizer, len(encode(text)))
    assert bound is not None and len(text.encode()) <= bound


async def test_large_bodies_are_validated_in_a_thread_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    validate, threads, active = BodyReader._validate, set(), []

    def watched(reader: BodyReader, data: bytes, function: Callable[[Any], Any]) -> Any:
        threads.add(threading.current_thread())
        active.append(data)
        assert len(active) == 1
        time.sleep(0.01)
        try:
            return validate(reader, data, function)
        finally:
            active.clear()

    monkeypatch.setattr(BodyReader, "_validate", watched)
    app = create_app(server_state(FakeEngine()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        headers = {"content-type": "application/json"}
        content = padded(chat())
        answers = await asyncio.gather(*(client.post(URL, content=content, headers=headers) for _ in range(5)))
    assert [answer.status_code for answer in answers] == [200] * 5
    assert len(threads) == 1 and threading.current_thread() not in threads


async def test_a_body_that_does_not_arrive_in_time_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)

    async def slow() -> Any:
        yield b'{"model": '
        await asyncio.sleep(1)

    app = create_app(server_state(FakeEngine()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.post(URL, content=slow(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "request_timeout")


async def test_large_bodies_beyond_the_memory_for_them_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_LARGE_BYTES", 3 * LARGE_BODY)
    app = create_app(server_state(FakeEngine()))
    release = asyncio.Event()

    async def slow() -> Any:
        yield b" " * 10
        await release.wait()

    headers = {"content-type": "application/json", "content-length": str(2 * LARGE_BODY)}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        first = asyncio.create_task(client.post(URL, content=slow(), headers=headers))
        await asyncio.sleep(0.05)
        second = await client.post(URL, content=b"x" * 2 * LARGE_BODY, headers=headers)
        release.set()
        await first
        assert (await client.post(URL, json=chat())).status_code == 200
    assert (second.status_code, second.json()["error"]["code"]) == (503, "server_overloaded")


@pytest.mark.parametrize("encoding", [{}, {"content-encoding": "gzip"}])
async def test_bodies_of_unannounced_length_count_as_they_arrive(
    encoding: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies in chunks counted as small ones, and compressed bodies did not count."""
    monkeypatch.setattr(bodies, "MAX_LARGE_BYTES", 4 * LARGE_BODY)
    app = create_app(server_state(FakeEngine()))
    half = json.dumps(chat()).encode() + b" " * LARGE_BODY
    compressor = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
    release, arrived = asyncio.Event(), asyncio.Event()

    def packed(data: bytes) -> bytes:
        return compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH) if encoding else data

    async def slow() -> Any:
        yield packed(half + b" " * LARGE_BODY)
        arrived.set()
        await release.wait()
        yield compressor.flush() if encoding else b" "

    def other(size: int) -> Any:
        content = half + b" " * (size - len(half))
        return client.post(URL, content=gzip.compress(content) if encoding else content, headers=headers)

    headers = {"content-type": "application/json", **encoding}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        first = asyncio.create_task(client.post(URL, content=slow(), headers=headers))
        await arrived.wait()
        refused = await other(2 * LARGE_BODY)
        release.set()
        assert (await first).status_code == 200
        assert (await other(2 * LARGE_BODY)).status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")


def test_the_fields_of_a_large_body_that_have_no_effect_are_named_too() -> None:
    answer = post(padded(chat(keep_alive="5m")))
    assert answer.status_code == 200
    assert answer.headers["x-quickchange-ignored"] == "keep_alive"


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/responses", {"model": BASE, "input": "Hi"}),
        ("/v1/messages", chat(max_tokens=1)),
        ("/v1/messages/count_tokens", chat()),
        ("/api/chat", chat(stream=False)),
        ("/api/generate", {"model": BASE, "prompt": "Hi", "stream": False}),
        ("/api/generate", {"model": BASE, "prompt": "Hi", "stream": False, "raw": True}),
        ("/tokenize", chat()),
    ],
)
def test_a_large_body_is_translated_and_looked_through_in_the_thread_of_large_bodies(
    url: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop stood still for seconds: the body of another API was translated and validated there."""
    threads: dict[str, str] = {}

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            threads[function.__name__] = threading.current_thread().name
            return function(*args, **more)

        return call

    monkeypatch.setattr(translation, "_validated", watched(translation._validated))
    monkeypatch.setattr(ignored_fields, "fields_without_effect", watched(fields_without_effect))
    assert post(padded(body), url).status_code == 200
    assert len(threads) == 2
    assert all(name.startswith("bodies") for name in threads.values())
