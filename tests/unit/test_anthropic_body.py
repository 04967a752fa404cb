"""Bodies of Anthropic's API as chat requests, and their errors in their own names."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.anthropic import to_chat
from server.api.app import create_app
from server.api.protocol.anthropic import MessagesRequest
from tests.fakes import BASE, FakeEngine, ask, encode, server_state, small_tokenizer

URL = "/v1/messages"
HELLO: dict[str, Any] = {"model": BASE, "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}


def turns(*messages: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    chat = to_chat(MessagesRequest.model_validate({**HELLO, "messages": list(messages), **more}))
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def test_the_system_prompt_is_the_first_turn() -> None:
    cached = {**text("Be brief."), "cache_control": {"type": "ephemeral"}}
    for system in ("Be brief.", [cached]):
        found = turns({"role": "user", "content": "hello"}, system=system)
        assert found == [
            {"role": "system", "content": [text("Be brief.")]},
            {"role": "user", "content": [text("hello")]},
        ]


def test_calls_and_results_are_turns_of_a_chat() -> None:
    found = turns(
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                text("Let me see."),
                {"type": "tool_use", "id": "a", "name": "look", "input": {"city": "Kyiv"}},
                {"type": "tool_use", "id": "b", "name": "look", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [text("sunny")], "is_error": False},
                {"type": "tool_result", "tool_use_id": "b"},
                text("Well?"),
            ],
        },
    )
    assert [turn["role"] for turn in found] == ["user", "assistant", "tool", "tool", "user"]
    assert [call["id"] for call in found[1]["tool_calls"]] == ["a", "b"]
    assert found[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"city": "Kyiv"}'}
    assert [turn["tool_call_id"] for turn in found[2:4]] == ["a", "b"]
    assert found[4]["content"] == [text("Well?")]


def test_a_last_turn_of_the_assistant_is_the_beginning_of_the_answer() -> None:
    turns = [*HELLO["messages"], {"role": "assistant", "content": "Dear"}]
    chat = to_chat(MessagesRequest.model_validate({**HELLO, "messages": turns}))
    assert (chat.continue_final_message, chat.opens_answer) == (True, False)
    assert not to_chat(MessagesRequest.model_validate(HELLO)).continue_final_message


@pytest.mark.parametrize(("thinking", "effort"), [("enabled", "medium"), ("disabled", "none"), ("adaptive", None)])
def test_thinking_is_the_effort_of_a_chat(thinking: str, effort: str | None) -> None:
    body = {**HELLO, "thinking": {"type": thinking, "budget_tokens": 1024}}
    assert to_chat(MessagesRequest.model_validate(body)).reasoning_effort == effort


def test_sampling_parameters_are_those_of_a_chat() -> None:
    body = {**HELLO, "stop_sequences": ["!"], "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    chat = to_chat(MessagesRequest.model_validate({**body, "metadata": {"user_id": "u"}}))
    assert (chat.max_completion, chat.stop, chat.temperature, chat.top_k, chat.top_p) == (9, ["!"], 0.5, 3, 0.9)
    assert chat.user == "u"


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": 3.0}, "temperature"),
        ({"stop_sequences": ["x" * 2000]}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "look"}]}, "tools[0].input_schema"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
    ],
)
def test_a_wrong_or_unsupported_field_is_named_in_anthropics_error(more: dict[str, Any], name: str) -> None:
    response = ask(create_app(server_state(FakeEngine())), "POST", URL, json={**HELLO, **more})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert f"'{name}'" in error["message"]


def test_tokens_are_counted_as_they_would_be_for_the_answer() -> None:
    app, engine = create_app(server_state(FakeEngine())), FakeEngine()
    body = {key: value for key, value in HELLO.items() if key != "max_tokens"}
    counted = ask(app, "POST", f"{URL}/count_tokens", json=body).json()
    answered = ask(create_app(server_state(engine)), "POST", URL, json=HELLO).json()
    assert counted == {"input_tokens": answered["usage"]["input_tokens"]}
    assert counted["input_tokens"] == len(engine.submitted[0].prompt_ids) > len(encode("hello"))
    assert "hello" in small_tokenizer().decode(list(engine.submitted[0].prompt_ids))
