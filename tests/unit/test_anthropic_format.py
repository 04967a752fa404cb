"""Anthropic's messages and the events of their streams, as its own client reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from server.api.app import create_app
from server.api.formats.anthropic import MessagesFormat
from server.api.protocol.anthropic import MessagesRequest
from server.sequence import FinishReason
from server.text.answer import AnswerPart, Content, ToolCallPart
from tests.answer_deltas import deltas, fake_request, streamed, whole
from tests.fakes import BASE, FakeEngine, Script, adapter, server_state
from tests.loopback import on_loopback

ASKED: dict[str, Any] = {"max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]}


def new_format() -> MessagesFormat:
    asked = MessagesRequest.model_validate({"model": BASE, "stop_sequences": ["END"], **ASKED})
    return MessagesFormat(asked, fake_request(), "fp_1")


def events(reason: FinishReason) -> list[dict[str, Any]]:
    found = []
    for written in streamed(new_format(), deltas(reason)):
        name, data = written.removesuffix("\n\n").split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_every_event_is_one_of_anthropics_in_its_order() -> None:
    found = events(FinishReason.TOOL_CALLS)
    for event in found:
        TypeAdapter(RawMessageStreamEvent).validate_python(event)
    assert [event["type"].removeprefix("content_block_") for event in found] == [
        "message_start",
        *("start", "delta", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "stop"),
        "message_delta",
        "message_stop",
    ]
    assert [event["index"] for event in found if event["type"] == "content_block_start"] == [0, 1, 2, 3]


def test_a_whole_message_has_the_blocks_of_the_stream() -> None:
    message = whole(new_format(), deltas(FinishReason.TOOL_CALLS))
    Message.model_validate(message)
    assert message["content"] == [
        {"type": "thinking", "thinking": "Hm...", "signature": "unsigned"},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "call_a", "name": "look", "input": {"city": "Kyiv"}},
        {"type": "tool_use", "id": "call_b", "name": "look", "input": {}},
    ]


def test_a_cached_prefix_is_counted_apart() -> None:
    usage = whole(new_format(), deltas(FinishReason.STOP))["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (5, 2, 5)


@pytest.mark.parametrize(
    ("reason", "stop", "shown"),
    [
        (FinishReason.STOP, None, ("end_turn", None)),
        (FinishReason.STOP, "END", ("stop_sequence", "END")),
        (FinishReason.STOP, "the adapter's", ("end_turn", None)),
        (FinishReason.LENGTH, None, ("max_tokens", None)),
        (FinishReason.TOOL_CALLS, None, ("tool_use", None)),
    ],
)
def test_the_reason_of_the_end_is_told(reason: FinishReason, stop: str | None, shown: tuple[str, str | None]) -> None:
    message = whole(new_format(), deltas(reason, stop=stop, parts=[Content("x")]))
    assert (message["stop_reason"], message["stop_sequence"]) == shown
    *_, written, _ = streamed(new_format(), deltas(reason, stop=stop, parts=[Content("x")]))
    delta = json.loads(written.partition("data: ")[2])["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == shown


def test_a_call_that_was_cut_off_is_left_out() -> None:
    parts: list[AnswerPart] = [Content("x"), ToolCallPart(0, id="a", name="look"), ToolCallPart(0, arguments='{"ci')]
    message = whole(new_format(), deltas(FinishReason.LENGTH, parts=parts))
    assert [block["type"] for block in message["content"]] == ["text"]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([Script("日本 hello 🎉")])


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[Anthropic]:
    with (
        on_loopback(create_app(server_state(engine, adapter("poet")))) as url,
        Anthropic(base_url=url, api_key="any", max_retries=0, _strict_response_validation=True) as made,
    ):
        yield made


def test_whole_messages_are_as_the_client_wants_them(client: Anthropic) -> None:
    message = client.messages.create(model="poet", **ASKED)
    assert message.content[0].type == "text" and message.content[0].text == "日本 hello 🎉"
    assert (message.stop_reason, message.model) == ("end_turn", "poet")
    assert message._request_id


def test_streams_are_as_the_client_wants_them(client: Anthropic) -> None:
    with client.messages.stream(model="poet", **ASKED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "日本 hello 🎉" == stream.get_final_text()
    assert (final.stop_reason, final.usage.output_tokens > 0) == ("end_turn", True)


def test_tokens_are_counted_as_the_client_wants_it(client: Anthropic) -> None:
    assert client.messages.count_tokens(model=BASE, messages=ASKED["messages"]).input_tokens > 0


def test_models_are_as_the_client_wants_them(client: Anthropic) -> None:
    assert [model.id for model in client.models.list()] == [BASE, "poet"]
    assert client.models.retrieve("poet").display_name == "poet"


def test_errors_are_the_clients_classes(client: Anthropic, engine: FakeEngine) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nobody", **ASKED)
    assert missing.value.type == "not_found_error" and missing.value.request_id
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=BASE, **{**ASKED, "max_tokens": -1})
    engine.scripts = [Script("hello", then="fail")]
    stream = client.messages.create(model=BASE, stream=True, **ASKED)
    with pytest.raises(anthropic.APIStatusError, match="failed"):
        list(stream)
