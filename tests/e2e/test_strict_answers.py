"""OpenAI's client validates every object and every chunk of every endpoint (``_strict_response_validation``)."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.serving import ServerProcess

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.fixture(scope="module")
def strict(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True) as client:
        yield client


CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "an adapter": {"model": "helpdesk"},
    "several": {"n": 3},
    "log probabilities": {"logprobs": True, "top_logprobs": 3},
    "tools that may be called": {"tools": TOOLS},
    "tools that may not be called": {"tools": TOOLS, "tool_choice": "none"},
    "extensions": {"extra_body": {"return_token_ids": True, "ignore_eos": True, "top_k": 3}},
}


@pytest.mark.parametrize("change", CHATS.values(), ids=CHATS)
def test_chats_are_valid_whole_and_streamed(strict: OpenAI, change: dict[str, Any]) -> None:
    asked = {"model": "micro", "messages": HELLO, "max_tokens": 8, "seed": 1, **change}
    whole = strict.chat.completions.create(**asked)
    assert whole.usage is not None and whole.system_fingerprint
    chunks = list(strict.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        parts = [each.delta.content or "" for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(parts) == (choice.message.content or "")


@pytest.mark.parametrize(
    "change", [{}, {"logprobs": 2}, {"prompt": ["a", "b"], "n": 2}, {"max_tokens": 0, "echo": True}]
)
def test_completions_are_valid(strict: OpenAI, change: dict[str, Any]) -> None:
    whole = strict.completions.create(**{"model": "micro", "prompt": "hello", "max_tokens": 4, **change})
    assert whole.choices and whole.usage is not None


def test_embeddings_are_valid(strict: OpenAI) -> None:
    """As numbers: the client's own type has no place for the base64 that it asks for by default, and decodes."""
    made = strict.embeddings.create(model="micro", input=["a", "b"], encoding_format="float")
    assert [each.index for each in made.data] == [0, 1]


def test_responses_are_valid_whole_and_streamed(strict: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "helpdesk", "input": "hello", "max_output_tokens": 16}
    whole = strict.responses.create(**asked)
    assert whole.usage is not None and whole.output
    events = list(strict.responses.create(**asked, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_models_are_valid(strict: OpenAI) -> None:
    for model in strict.models.list():
        assert strict.models.retrieve(model.id).id == model.id
        context: Any = model.model_extra
        assert context["max_model_len"] == context["context_length"] > 0


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": "no/body"}, "model_not_found", "model"),
        ({"temperature": 3}, "decimal_above_max_value", "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "missing_required_parameter", "messages[0]"),
        ({"messages": [{"role": "user", "content": "x " * 20_000}]}, "context_length_exceeded", "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_a_code_and_the_path_of_the_field(
    strict: OpenAI, change: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    """Also of a stream: what can be known before the first token has a status of its own."""
    with pytest.raises(openai.APIStatusError) as caught:
        strict.chat.completions.create(**{"model": "micro", "messages": HELLO, "stream": stream, **change})
    body: Any = caught.value.body
    assert body.keys() == {"message", "type", "param", "code"}
    assert body["code"] == code
    assert body["param"].startswith(param)
    assert caught.value.request_id


@pytest.mark.parametrize("request_bytes", [b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n"])
def test_what_is_not_http_gets_an_error_with_a_request_id(server: ServerProcess, request_bytes: bytes) -> None:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request_bytes)
        reply = b""
        while chunk := connection.recv(65536):
            reply += chunk
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"x-request-id: " in head
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
