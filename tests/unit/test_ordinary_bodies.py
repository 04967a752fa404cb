"""What clients send besides the fields that they need: taken, named, counted, or refused by the name that was meant."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.api.ignored_fields import IGNORED_HEADER, MAX_NAMES
from server.api.protocol import ChatRequest
from server.api.protocol.messages import template_messages
from server.api.protocol.misspelled import Spelling
from tests.fakes import BASE, FakeEngine, ask, server_state

CHAT = "/v1/chat/completions"
USER: dict[str, Any] = {"role": "user", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def send(**fields: Any) -> httpx.Response:
    """The reply to a chat request with these fields."""
    return send_to(False, fields)


def send_to(strict: bool, fields: dict[str, Any]) -> httpx.Response:
    """The reply of a server that may be strict."""
    app = create_app(server_state(FakeEngine(), strict_fields=strict))
    return ask(app, "POST", CHAT, json={"model": BASE, "messages": [USER], **fields})


def assistant(**fields: Any) -> list[dict[str, Any]]:
    """A conversation with an earlier turn of the assistant."""
    return [USER, {"role": "assistant", **fields}, USER]


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({}, None),
        ({"keep_alive": "5m", "chat_id": "x"}, "keep_alive, chat_id"),
        ({"cache_prompt": True, "priority": 0}, "cache_prompt, priority"),
        ({"store": True, "service_tier": "flex"}, "store, service_tier"),
        ({"use_beam_search": False, "stop": [], "max_tokens": 256.0, "modalities": ["text"]}, None),
        ({"stream_options": {"include_usage": True, "mood": 1}}, "stream_options.mood"),
        ({"messages": [{**USER, "id": "x", "timestamp": 1}]}, "messages.id, messages.timestamp"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}, "id": "y"}]}
                ]
            },
            "messages.content.cache_control, messages.content.id",
        ),
        ({"messages": assistant(tool_calls=[{**CALL, "index": 0}], content=None)}, "messages.tool_calls.index"),
        ({"models": ["x"], "mode": "chat", "a b": 1, "gone": None}, "models, mode"),
    ],
)
def test_what_changes_no_answer_is_taken_and_named(fields: dict[str, Any], ignored: str | None) -> None:
    for stream in (False, True):
        response = send(**fields, stream=stream)
        assert response.status_code == 200, response.text
        assert response.headers.get(IGNORED_HEADER) == ignored


def test_ignored_fields_are_counted_without_their_names() -> None:
    state = server_state(FakeEngine())
    fields = {f"field_{number}": 1 for number in range(50)}
    response = ask(create_app(state), "POST", CHAT, json={"model": BASE, "messages": [USER], **fields})
    assert len(response.headers[IGNORED_HEADER].split(", ")) == MAX_NAMES
    assert state.metrics.ignored_fields._value.get() == 50
    assert "field_1" not in ask(create_app(state), "GET", "/metrics").text


def test_an_object_has_a_limited_number_of_fields() -> None:
    response = send_to(False, {f"field_{number}": 1 for number in range(300)})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("fields", "param", "intended"),
    [
        ({"temprature": 1}, "temprature", "temperature"),
        ({"max_token": 1}, "max_token", "max_tokens"),
        ({"seeed": 1}, "seeed", "seed"),
        ({"stram": True}, "stram", "stream"),
        ({"top_pp": 1}, "top_pp", "top_p"),
        ({"sotp": "x"}, "sotp", "stop"),
        ({"messages": [{**USER, "nmae": "x"}]}, "messages[0].nmae", "name"),
        ({"stream_options": {"include_usag": True}}, "stream_options.include_usag", "include_usage"),
    ],
)
def test_a_name_one_edit_away_from_a_field_is_refused_by_the_name_that_was_meant(
    fields: dict[str, Any], param: str, intended: str
) -> None:
    response = send(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unknown_parameter", param)
    assert f"'{intended}'" in error["message"]


def test_short_names_and_two_edits_are_no_misspelling() -> None:
    spelling = Spelling(["n", "stop", "seed"])
    assert [spelling.intended(name) for name in ("m", "nn", "n", "stop", "spot", "x" * 10**6)] == [None] * 6
    found = [spelling.intended(name) for name in ("stp", "stops", "stup", "tsop", "s", "")]
    assert found == ["stop", "stop", "stop", "stop", None, None]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"messages": [{**USER, "id": "x"}]}, "messages[0].id"),
        ({"messages": [{"role": "user", "content": [{"text": "x", "id": 1}]}]}, "messages[0].content[0].id"),
    ],
)
def test_a_strict_server_refuses_unknown_fields_at_every_level(fields: dict[str, Any], param: str) -> None:
    response = send_to(True, fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unknown_parameter", param)


def test_a_strict_server_takes_known_fields_without_effect() -> None:
    assert send_to(True, {"store": True, "metadata": {"a": "b"}}).status_code == 200


@pytest.mark.parametrize("field", ["max_new_tokens", "repeat_penalty", "think", "chat_template", "web_search_options"])
def test_a_field_known_to_matter_is_refused(field: str) -> None:
    error = send_to(False, {field: {"x": 1}}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)


@pytest.mark.parametrize("value", [256.5, "256", True, 1e300])
def test_only_whole_numbers_are_integers(value: object) -> None:
    assert send(max_tokens=value).status_code == 400


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 16.0}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16.0}),
        ("/api/generate", {"prompt": "Hi", "stream": False, "options": {"num_predict": 16.0}}),
        ("/v1/embeddings", {"input": "Hi", "dimensions": 2.0}),
    ],
)
def test_whole_numbers_are_integers_in_every_api(url: str, fields: dict[str, Any]) -> None:
    reply = ask(create_app(server_state(FakeEngine())), "POST", url, json={"model": BASE, **fields})
    assert reply.status_code == 200, reply.text


def rendered(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What templates get of these messages."""
    return template_messages(ChatRequest.model_validate({"model": "m", "messages": list(messages)}).messages)


def test_a_replayed_answer_comes_as_clients_keep_it() -> None:
    assert rendered({"role": "assistant", "content": None}) == [{"role": "assistant", "content": ""}]
    assert rendered({"role": "assistant", "content": []}) == [{"role": "assistant", "content": ""}]
    assert rendered({"role": "assistant", "refusal": "No."})[0]["content"] == "No."
    part = {"type": "refusal", "refusal": "No."}
    assert rendered({"role": "assistant", "content": [part]})[0]["content"] == "No."
    thought = rendered({"role": "assistant", "content": "x", "reasoning": "y"})
    assert thought == [{"role": "assistant", "content": "x", "reasoning_content": "y"}]


def test_arguments_may_be_an_object() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": {"city": "Ulm"}}}
    [turn] = rendered({"role": "assistant", "tool_calls": [call]})
    assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"city": "Ulm"}'}


def test_the_old_form_of_a_call_is_the_new_one() -> None:
    call, result = rendered(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "3"},
    )
    assert result == {"role": "tool", "name": "f", "tool_call_id": call["tool_calls"][0]["id"], "content": "3"}


@pytest.mark.parametrize("message", [{"role": "user", "content": None}, {"role": "function", "content": "x"}])
def test_a_message_without_what_its_role_needs_is_refused(message: dict[str, Any]) -> None:
    error = send(messages=[message]).json()["error"]
    assert error["code"] == "missing_required_parameter"


def test_the_template_gets_text_where_the_assistant_said_none() -> None:
    """SmolLM2's template concatenates: ``null`` was dropped before the template saw it, which then failed."""
    assert send(messages=assistant(content=None)).status_code == 200
