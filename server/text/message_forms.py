"""Names and reasoning of earlier turns, as text where the chat template does not show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from server.text.reasoning import FORMATS, ReasoningFormat

Messages = Sequence[Mapping[str, Any]]

_PROBE = "probed value"
_NAMED_ROLES = ("system", "developer", "user", "assistant")


def shows(key: str, render: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Whether a template shows this key of a message, or a turn of ``system``, tried with one. Never raises."""
    if key == "system":
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hello"}]
    elif key == "name":
        messages = [{"role": "user", "content": "Hello", "name": _PROBE}]
    else:
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", key: _PROBE}]
    with suppress(Exception):  # a template is a program: any exception is possible
        return _PROBE in render(messages)
    return False


def with_names_as_text(messages: Messages) -> list[dict[str, Any]]:
    """A name before the content of its message: ``Ada: Hello``. The name of a tool stays with its result."""
    written = []
    for message in messages:
        turn = dict(message)
        if turn.get("name") and turn["role"] in _NAMED_ROLES:
            turn["content"] = f"{turn.pop('name')}: {turn.get('content') or ''}"
        written.append(turn)
    return written


def with_reasoning_as_text(messages: Messages, format: ReasoningFormat | None) -> list[dict[str, Any]]:
    """Reasoning before the content of its message, between the markers of ``format``, by default ``<think>``."""
    markers = format or FORMATS[0]
    written = []
    for message in messages:
        turn = dict(message)
        if reasoning := turn.pop("reasoning_content", None):
            block = f"{markers.begin}\n{reasoning}\n{markers.end}{markers.behind}"
            turn["content"] = f"{block}{turn.get('content') or ''}"
        written.append(turn)
    return written
