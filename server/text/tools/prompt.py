"""Tools in a prompt: handed to the chat template, or described in a turn for a template without them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError

from server.text.tools.tool import ToolFormat

_TEXT = """\
You can call functions. Each line is a function that there is, in JSON:
{tools}

To call a function, answer with a call in this form:
{call}
The result comes in the next message. If no function helps, answer without a call."""


@lru_cache(maxsize=64)
def tool_variables(template: str) -> frozenset[str]:
    """The variables in which a chat template takes tools: ``tools`` and ``xml_tools``, as far as it has them."""
    with suppress(TemplateError):
        names = {text for _, kind, text in Environment().lex(template) if kind == "name"}
        return frozenset(names & {"tools", "xml_tools"})
    return frozenset()


def with_described_tools(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    template: str,
    format: ToolFormat,
    *,
    takes_system_turn: bool = True,
) -> list[Mapping[str, Any]]:
    """Messages whose system turn describes the tools, for a template that has no variable for them.

    A template that takes no system turn has the description in the first user turn.
    """
    functions = [tool["function"] for tool in tools]
    if "message['tools']" in template:  # Phi's: the system turn has them as JSON
        return _with_system(messages, "", tools=json.dumps(functions, ensure_ascii=False))
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    call = format.opening + format.text("NAME", {"ARGUMENT": "VALUE"}) + format.closing
    text = _TEXT.format(tools=lines, call=call)
    return _with_system(messages, text) if takes_system_turn else _with_user(messages, text)


def _with_system(messages: Sequence[Mapping[str, Any]], text: str, **more: Any) -> list[Mapping[str, Any]]:
    """Messages with ``text`` at the end of the first system turn, which is added if there is none."""
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text, **more}, *messages]
    first, *others = messages
    content = "\n\n".join(part for part in (_content_text(first), text) if part)
    return [{**first, "content": content, **more}, *others]


def _with_user(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    """Messages with ``text`` at the beginning of the first turn, if it is the user's, or else in one before it."""
    if not messages or messages[0]["role"] != "user":
        return [{"role": "user", "content": text}, *messages]
    first, *others = messages
    return [{**first, "content": f"{text}\n\n{_content_text(first)}"}, *others]


def _content_text(message: Mapping[str, Any]) -> str:
    """The content of a message as one text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content or ())
