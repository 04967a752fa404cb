"""The tools of a chat request: in its prompt, and in what its answers look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from server.api.protocol import ChatRequest
from server.text.answer_format import PLAIN, AnswerFormat
from server.text.grammar.schema import Source
from server.text.prompt import PromptRenderer
from server.text.reasoning import reasoning_format
from server.text.tools.families import FORMATS, HARMONY, tool_format
from server.text.tools.prompt import tool_variables, with_described_tools
from server.text.tools.tool import Tool, ToolFormat

Messages = Sequence[Mapping[str, Any]]


class ToolPrompt(NamedTuple):
    """Messages that a template can render, and the variables in which it takes tools."""

    messages: Messages
    variables: Mapping[str, Any]


def format_of_tools(template: str | None, named: str | None) -> ToolFormat:
    """The format that a sidecar names, or else that of the chat template."""
    return FORMATS[named] if named is not None else tool_format(template)


def with_tools(
    body: ChatRequest, messages: Messages, template: str, format: ToolFormat, renderer: PromptRenderer
) -> ToolPrompt:
    """What a template is given. ``none`` shows no tools to the model, so that it does not call any."""
    tools = [tool.as_json() for tool in body.tools] if body.callable_tools else []
    if not tools:
        return ToolPrompt(messages, {})
    names = tool_variables(template)
    if not names:
        takes_system_turn = renderer.takes_system_turn(template)
        described = with_described_tools(messages, tools, template, format, takes_system_turn=takes_system_turn)
        return ToolPrompt(described, {})
    return ToolPrompt(messages, dict.fromkeys(names, tools))


def answer_format(
    body: ChatRequest, ids: Sequence[int], renderer: PromptRenderer, template: str | None, format: ToolFormat
) -> AnswerFormat:
    """What the answers to a prompt of ``ids`` look like."""
    tools = tuple(_tool(place, definition.function) for place, definition in body.callable_tools)
    reasoning = reasoning_format(template)
    if reasoning is None and not tools and format is not HARMONY:
        return PLAIN
    opened = reasoning is not None and renderer.ends_inside(ids, reasoning.begin, reasoning.end)
    used = format if tools or format is HARMONY else None
    return AnswerFormat(reasoning, opened, used, tools, body.must_call, body.several_calls)


def _tool(place: int, function: Any) -> Tool:
    field = f"tools[{place}].function.parameters"
    source = Source(field, f"the tool '{function.name}'")
    parameters = function.parameters or {"type": "object", "properties": {}}
    return Tool(function.name, source, function.description or "", parameters, function.strict)
