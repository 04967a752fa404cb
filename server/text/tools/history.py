"""Earlier calls and their results in a prompt, in the form in which a chat template takes them.

Templates differ: arguments are an object or JSON text, content that is absent is read as text, or has to be null, or
both are dropped in silence. So a template is tried once with a call, and what it makes of that tells the form. A
template that has no form gets calls and results as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from server.text.tools.tool import ToolFormat

Messages = Sequence[Mapping[str, Any]]

_NAME, _VALUE, _RESULT = "probed_function", "probed value", "probed result"


class CallForm(NamedTuple):
    """How a template takes a turn with calls; ``no_content`` is the message's content where it has none."""

    no_content: Mapping[str, str | None]
    arguments_as_text: bool

    def applied(self, messages: Messages) -> list[dict[str, Any]]:
        """Messages in this form."""
        return [self._applied(message) if message.get("tool_calls") else dict(message) for message in messages]

    def _applied(self, message: Mapping[str, Any]) -> dict[str, Any]:
        calls = [_with_text(call) if self.arguments_as_text else call for call in message["tool_calls"]]
        others = {key: value for key, value in message.items() if key != "content"}
        content = {"content": message["content"]} if message.get("content") else self.no_content
        return {**others, **content, "tool_calls": calls}


_NO_CONTENTS: Sequence[Mapping[str, str | None]] = ({}, {"content": ""}, {"content": None})
FORMS = tuple(CallForm(no_content, as_text) for as_text in (False, True) for no_content in _NO_CONTENTS)


def find_form(render: Callable[[list[dict[str, Any]]], str]) -> CallForm | None:
    """The form in which a template shows a call and its result; None if it shows them in none. Never raises."""
    for form in FORMS:
        with suppress(Exception):  # a template is a program: any exception is possible
            text = render(form.applied(_probe()))
            if _NAME in text and _VALUE in text and _RESULT in text:
                return form
    return None


def _probe() -> Messages:
    function = {"name": _NAME, "arguments": {"key": _VALUE}}
    return [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "tool_calls": [{"id": "call00000", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call00000", "name": _NAME, "content": _RESULT},
    ]


def with_calls_as_text(messages: Messages, format: ToolFormat) -> list[dict[str, Any]]:
    """Calls as the model would write them, and results in user turns between ``<tool_response>`` tags.

    Results that follow each other, and a user turn behind them, are one turn.
    """
    written: list[dict[str, Any]] = []
    joins = False
    for message in messages:
        is_result = message["role"] in ("tool", "function")
        turn = _as_text(message, format)
        if joins and turn["role"] == "user":
            turn = {**turn, "content": f"{written.pop()['content']}\n{turn['content']}"}
        written.append(turn)
        joins = is_result
    return written


def _as_text(message: Mapping[str, Any], format: ToolFormat) -> dict[str, Any]:
    if message["role"] in ("tool", "function"):
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    if not message.get("tool_calls"):
        return dict(message)
    calls = [format.text(call["function"]["name"], _arguments(call)) for call in message["tool_calls"]]
    text = format.opening + (format.separator or "\n").join(calls) + format.closing
    content = "\n".join(part for part in (message.get("content"), text) if part)
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": content}


def _arguments(call: Mapping[str, Any]) -> Any:
    """As an object; text that is no JSON stays text."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            return json.loads(arguments)
    return arguments


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": function}
