"""Bodies of the Responses API as chat requests, and their errors in their own names."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.app import create_app
from server.api.protocol.responses import ResponsesRequest
from server.api.responses_api import to_chat
from tests.fakes import BASE, FakeEngine, ask, server_state

URL = "/v1/responses"


def messages(*items: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    chat = to_chat(ResponsesRequest.model_validate({"model": BASE, "input": list(items), **more}))
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def test_a_text_is_a_turn_of_the_user_behind_the_instructions() -> None:
    chat = to_chat(ResponsesRequest.model_validate({"model": BASE, "input": "hello", "instructions": "Be brief."}))
    assert [(message.role, message.model_dump()["content"][0]["text"]) for message in chat.messages] == [
        ("system", "Be brief."),
        ("user", "hello"),
    ]


def test_text_and_calls_of_one_turn_are_one_message() -> None:
    found = messages(
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let me see."}],
        },
        {"id": "f1", "type": "function_call", "call_id": "a", "name": "look", "arguments": '{"city":"Kyiv"}'},
        {"id": "f2", "type": "function_call", "call_id": "b", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "sunny"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]},
    )
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in found[1]["tool_calls"]] == ["a", "b"]
    assert found[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"city":"Kyiv"}'}
    assert [message["tool_call_id"] for message in found[2:]] == ["a", "b"]


def test_two_turns_of_the_assistant_stay_two() -> None:
    turn = {"type": "message", "role": "assistant", "content": "a"}
    assert [message["role"] for message in messages(turn, turn)] == ["assistant", "assistant"]


def test_sampling_parameters_are_those_of_a_chat() -> None:
    body = {
        "model": BASE,
        "input": "x",
        "max_output_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.5,
        "seed": 3,
        "stop": "!",
    }
    chat = to_chat(ResponsesRequest.model_validate(body))
    assert (chat.max_completion, chat.temperature, chat.top_p, chat.seed, chat.stop) == (9, 0.5, 0.5, 3, ["!"])


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3.0}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "p"}}, "prompt"),
    ],
)
def test_a_wrong_or_unsupported_field_is_named(more: dict[str, Any], param: str) -> None:
    body = {"model": BASE, "input": "hello", **more}
    response = ask(create_app(server_state(FakeEngine())), "POST", URL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("store", [True, False, None])
def test_nothing_is_stored_and_the_response_says_so(store: bool | None) -> None:
    body = {"model": BASE, "input": "hello", "store": store, "include": ["reasoning.encrypted_content"]}
    response = ask(create_app(server_state(FakeEngine())), "POST", URL, json=body)
    assert (response.status_code, response.json()["store"]) == (200, False)
