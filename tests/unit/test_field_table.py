"""``docs/api.md`` says of every field of OpenAI's chat request what the server does with it, and it does that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.api.app import create_app
from server.api.ignored_fields import IGNORED_HEADER
from server.api.protocol import ChatRequest
from server.api.protocol.generation import StreamOptions
from server.api.protocol.messages import FunctionCall, Message, TextPart, ToolCall
from server.api.protocol.model import RequestModel, known_names
from tests.fakes import BASE, FakeEngine, ask, server_state

TESTS = Path(__file__).parents[1]
SPECIFIED: dict[str, list[str]] = json.loads((TESTS / "contract" / "openai_chat_fields.json").read_text())
"""The fields of the specification, by level: those of the body under the empty name."""
LEVELS: dict[str, type[RequestModel]] = {
    "": ChatRequest,
    "messages": Message,
    "messages.content": TextPart,
    "messages.tool_calls": ToolCall,
    "messages.tool_calls.function": FunctionCall,
    "stream_options": StreamOptions,
}
FIELDS = [(level, name) for level, model in LEVELS.items() for name in sorted({*SPECIFIED[level], *known_names(model)})]


def treatment(level: str, name: str) -> str:
    """What the server does with a field."""
    model = LEVELS[level]
    if name in model.model_fields:
        return "honoured"
    if name in model.neutral:
        neutral = " or ".join(f"`{json.dumps(value)}`" for value in model.neutral[name])
        return f"refused, but for {neutral}" if neutral else "refused"
    return "no effect"


def fields_table() -> str:
    """The table of docs/api.md."""
    lines = ["| field | |", "|---|---|"]
    lines += [f"| `{'.'.join(filter(None, field))}` | {treatment(*field)} |" for field in FIELDS]
    return "\n".join(lines)


def bodies(level: str, name: str, value: object) -> Iterator[dict[str, Any]]:
    """A chat request with a field at its level."""
    function = {"name": "f", "arguments": "{}"}
    call = {"id": "1", "type": "function", "function": function}
    part = {"type": "text", "text": "x"}
    message = {"role": "assistant", "content": [part], "tool_calls": [call]}
    options: dict[str, Any] = {}
    body: dict[str, Any] = {"model": BASE, "messages": [message], "stream_options": options}
    objects = {"": body, "messages": message, "messages.content": part, "messages.tool_calls": call}
    objects |= {"messages.tool_calls.function": function, "stream_options": options}
    objects[level][name] = value
    yield body


def test_the_documentation_has_a_row_for_every_field() -> None:
    text = (TESTS.parent / "docs" / "api.md").read_text(encoding="utf-8")
    printed = text.partition("<!-- fields -->")[2].partition("<!-- /fields -->")[0].strip()
    assert printed == fields_table()


@pytest.mark.parametrize(("level", "name"), [field for field in FIELDS if treatment(*field) != "honoured"])
def test_a_field_is_treated_as_its_row_says(level: str, name: str) -> None:
    app = create_app(server_state(FakeEngine()))
    path = ".".join(filter(None, (level, name)))
    [body] = bodies(level, name, {"any": "thing"})
    response = ask(app, "POST", "/v1/chat/completions", json=body)
    if treatment(level, name) == "no effect":
        assert response.status_code == 200
        assert response.headers[IGNORED_HEADER] == path
        return
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"].replace("[0]", "") == path
    for value in LEVELS[level].neutral[name]:
        [body] = bodies(level, name, value)
        assert ask(app, "POST", "/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(("level", "name"), [field for field in FIELDS if treatment(*field) == "honoured"])
def test_a_field_that_is_honoured_is_judged(level: str, name: str) -> None:
    """A value of the wrong type is refused, so the field is read."""
    app = create_app(server_state(FakeEngine()))
    [body] = bodies(level, name, -3.5)
    response = ask(app, "POST", "/v1/chat/completions", json=body)
    if name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "lora_scale"):
        [body] = bodies(level, name, "x")
        response = ask(app, "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert name in response.json()["error"]["param"]
