"""Responses and the events of their streams, as OpenAI's own client reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from server.api.app import create_app
from server.api.formats.responses import ResponsesFormat
from server.api.protocol.responses import ResponsesRequest
from server.sequence import FinishReason, SamplingParams
from tests.answer_deltas import deltas, fake_request, streamed, whole
from tests.fakes import BASE, FakeEngine, Script, adapter, ask, server_state
from tests.loopback import on_loopback


def new_format(**fields: Any) -> ResponsesFormat:
    asked = ResponsesRequest.model_validate({"model": BASE, "input": "hello", **fields})
    params = SamplingParams(temperature=fields.get("temperature", 0.25))
    return ResponsesFormat(asked, fake_request(params), "fp_1")


def stream(reason: FinishReason) -> list[dict[str, Any]]:
    return [read(text) for text in streamed(new_format(), deltas(reason))]


def read(text: str) -> dict[str, Any]:
    name, data = text.removesuffix("\n\n").split("\n")
    event: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert name == f"event: {event['type']}"
    return event


def body(reason: FinishReason) -> dict[str, Any]:
    return whole(new_format(), deltas(reason))


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key != "id"} for item in items]


def test_every_event_is_one_of_openais_and_they_are_numbered() -> None:
    events = stream(FinishReason.TOOL_CALLS)
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


@pytest.mark.parametrize("reason", [FinishReason.TOOL_CALLS, FinishReason.LENGTH])
def test_a_stream_ends_with_the_response_that_is_not_streamed(reason: FinishReason) -> None:
    last, answer = stream(reason)[-1]["response"], body(reason)
    Response.model_validate(answer)
    assert without_ids(last["output"]) == without_ids(answer["output"])
    assert {**last, "id": "", "output": []} == {**answer, "id": "", "output": []}


def test_an_answer_cut_by_its_length_is_incomplete() -> None:
    answer = body(FinishReason.LENGTH)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][-1]["status"] == "incomplete"
    assert stream(FinishReason.LENGTH)[-1]["type"] == "response.incomplete"


def test_an_empty_answer_is_an_empty_message() -> None:
    texts = list(streamed(new_format(), deltas(FinishReason.STOP, parts=())))
    (item,) = read(texts[-1])["response"]["output"]
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]


def test_the_usage_tells_cached_and_reasoning_tokens() -> None:
    usage = body(FinishReason.STOP)["usage"]
    assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (7, 2)
    assert (usage["output_tokens"], usage["output_tokens_details"]["reasoning_tokens"]) == (5, 1)


def test_settings_are_repeated() -> None:
    tool = {"type": "function", "name": "look", "description": None, "parameters": {"type": "object"}, "strict": True}
    format = new_format(instructions="Be brief.", metadata={"a": "b"}, tools=[tool], temperature=0.5)
    response = read(next(iter(format.opening())))["response"]
    assert (response["instructions"], response["metadata"], response["temperature"]) == ("Be brief.", {"a": "b"}, 0.5)
    assert response["tools"] == [tool]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([Script("日本 hello 🎉")])


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[OpenAI]:
    with (
        on_loopback(create_app(server_state(engine, adapter("poet")))) as url,
        OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, _strict_response_validation=True) as made,
    ):
        yield made


def test_whole_responses_are_as_the_client_wants_them(client: OpenAI) -> None:
    response = client.responses.create(model="poet", input="hello")
    assert (response.output_text, response.status) == ("日本 hello 🎉", "completed")


def test_a_response_tells_the_numbers_that_it_was_sampled_by(client: OpenAI) -> None:
    """They were null where the request had none; clients whose schemas want numbers refused the response."""
    for asked, told in ((None, 1.0), (0.5, 0.5)):
        response: Any = client.responses.create(model=BASE, input="hello", temperature=asked, top_p=asked)
        assert (response.temperature, response.top_p) == (told, told)
        assert (response.presence_penalty, response.frequency_penalty) == (0, 0)
    cold = create_app(server_state(FakeEngine(), adapter("cold", temperature=0.25)))
    assert ask(cold, "POST", "/v1/responses", json={"model": "cold", "input": "hello"}).json()["temperature"] == 0.25


def test_streams_are_as_the_client_wants_them(client: OpenAI) -> None:
    with client.responses.stream(model="poet", input="hello") as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert events.get_final_response().output_text == text == "日本 hello 🎉"


def test_log_probabilities_are_as_the_client_wants_them(client: OpenAI) -> None:
    asked: dict[str, Any] = {"input": "hello", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole_text: Any = client.responses.create(model=BASE, **asked).output[0]
    tokens = whole_text.content[0].logprobs
    assert bytes(byte for token in tokens for byte in token.bytes or ()).decode() == "日本 hello 🎉"
    with client.responses.stream(model=BASE, **asked) as events:
        streamed = [
            token.logprob
            for event in events
            if event.type == "response.output_text.delta"
            for token in event.logprobs or ()
        ]
    assert streamed == [token.logprob for token in tokens]


def test_a_failure_in_the_stream_is_an_error_and_the_failed_response(client: OpenAI, engine: FakeEngine) -> None:
    engine.scripts = [Script("hello", then="fail")]
    *_, error, failed = client.responses.create(model=BASE, input="hello", stream=True)
    assert error.type == "error" and "/secret/path" not in error.message
    assert failed.type == "response.failed" and failed.response.status == "failed"
    assert failed.response.error is not None and failed.response.error.code == "server_error"
