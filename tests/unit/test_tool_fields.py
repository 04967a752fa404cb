"""``tools``, ``tool_choice`` and ``parallel_tool_calls`` of a request, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.app import create_app
from server.api.protocol import ChatRequest
from tests.fakes import BASE, FakeEngine, ask, server_state

CHAT = "/v1/chat/completions"


def tool(name: str = "get_weather", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": "hello"}], **fields}


def parsed(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(body(**fields))


def callable_names(request: ChatRequest) -> list[str]:
    return [definition.function.name for _, definition in request.callable_tools]


TWO = [tool("a"), tool("b")]
FUNCTION_B = {"type": "function", "function": {"name": "b"}}


@pytest.mark.parametrize(
    ("choice", "names", "must_call"),
    [
        (None, ["a", "b"], False),
        ("auto", ["a", "b"], False),
        ("none", [], False),
        ("required", ["a", "b"], True),
        (FUNCTION_B, ["b"], True),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [FUNCTION_B]}}, ["b"], False),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [FUNCTION_B]}}, ["b"], True),
    ],
)
def test_tool_choice_says_what_is_called(choice: object, names: list[str], must_call: bool) -> None:
    request = parsed(tools=TWO, tool_choice=choice)
    assert (callable_names(request), request.must_call) == (names, must_call)


def test_fields_of_tools_without_tools_have_no_effect() -> None:
    without: list[dict[str, Any]] = [{"tools": []}, {"tools": [], "tool_choice": "none"}, {"tool_choice": "auto"}]
    for fields in without:
        assert callable_names(parsed(**fields, parallel_tool_calls=False)) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
        ({"tools": [tool("a", parameters={"type": "array"})]}, "tools[0].function.parameters"),
        ({"tools": [tool("a", parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool(f"t{number}") for number in range(129)]}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tools": TWO, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TWO, "tool_choice": {"type": "custom", "custom": {"name": "a"}}}, "tool_choice"),
        ({"tools": TWO, "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        ({"tools": TWO, "tool_choice": {"type": "function", "function": {"name": "c"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": TWO, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none"}}},
            "tool_choice.allowed_tools.mode",
        ),
        (
            {"tools": TWO, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice.allowed_tools.tools",
        ),
        ({"tools": TWO, "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ],
)
def test_what_cannot_be_is_refused_by_its_path(fields: dict[str, Any], param: str) -> None:
    response = ask(create_app(server_state(FakeEngine())), "POST", CHAT, json=body(**fields))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert param in error["message"]
