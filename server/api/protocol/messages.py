"""The messages of a conversation, as clients write and replay them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.model import RequestModel, Text, well_formed


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": well_formed(value)}]
    if not isinstance(value, list):
        raise PydanticCustomError("string_or_list_type", "it should be a string or an array of content parts")
    return value


def _text_only(value: object) -> object:
    """A text part; a part with a refusal, which only an assistant writes, is a text too."""
    if not isinstance(value, dict) or value.get("type") in (None, "text"):
        return value
    if value["type"] == "refusal":
        return {**value, "type": "text", "text": value.get("refusal")}
    raise PydanticCustomError("unsupported", "only text content is supported by this server", {"field": "type"})


def _as_json(value: object) -> object:
    """Arguments as JSON in a string; some clients send the object itself."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class TextPart(RequestModel):
    """A text part of a message's content."""

    ignored = frozenset({"annotations", "cache_control", "prompt_cache_breakpoint", "refusal"})

    type: Literal["text"] = "text"
    text: Text


class FunctionCall(RequestModel):
    """The function of a tool call; ``arguments`` is JSON in a string."""

    name: Text
    arguments: Annotated[Text, BeforeValidator(_as_json)]


class ToolCall(RequestModel):
    """A tool call in an earlier turn of the assistant."""

    ignored = frozenset({"index"})
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"custom": ()}

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(RequestModel):
    """One turn of a conversation.

    ``refusal`` is content of the assistant's. ``function_call`` and the role ``function`` are the names of
    ``tool_calls`` and ``tool`` before there were several calls in a turn.
    """

    ignored = frozenset({"annotations", "reasoning_details"})
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"audio": (), "images": ([],)}

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Annotated[list[Annotated[TextPart, BeforeValidator(_text_only)]], BeforeValidator(_as_parts)] | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "", {"field": "content"})
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("missing", "", {"field": "tool_call_id"})
        if self.role == "function" and self.name is None:
            raise PydanticCustomError("missing", "", {"field": "name"})
        return self

    @model_validator(mode="after")
    def _only_the_assistant_calls(self) -> Self:
        for field in ("tool_calls", "function_call", "refusal"):
            if self.role != "assistant" and getattr(self, field):
                raise PydanticCustomError("role", "only messages of the assistant have it", {"field": field})
        return self

    @property
    def text(self) -> str:
        """The text of all parts and of the refusal, a line each; empty where the content is ``null``."""
        texts = [part.text for part in self.content or ()]
        if self.refusal is not None:
            texts.append(self.refusal)
        return "\n".join(texts)


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """The conversation as ``PromptRenderer.chat`` takes it: roles, calls and reasoning under their newest names.

    A call of the old form gets an id from its place, and the next message of role ``function`` answers it.
    """
    plain: list[dict[str, Any]] = []
    last_id = "call_0"
    for place, message in enumerate(messages):
        turn: dict[str, Any] = {"role": message.role, "content": message.text}
        calls = [call.model_dump() for call in message.tool_calls or ()]
        if message.function_call is not None:
            last_id = f"call_{place}"
            calls.append({"id": last_id, "type": "function", "function": message.function_call.model_dump()})
        if message.role == "function":
            turn |= {"role": "tool", "tool_call_id": last_id}
        optional = {
            "name": message.name,
            "tool_calls": calls,
            "tool_call_id": message.tool_call_id,
            "reasoning_content": message.reasoning_content or message.reasoning,
        }
        plain.append(turn | {name: value for name, value in optional.items() if value})
    return plain
