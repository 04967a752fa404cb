"""The messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.model import RequestModel, Text, well_formed


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": well_formed(value)}]
    if not isinstance(value, list):
        raise PydanticCustomError("string_or_list_type", "it should be a string or an array of content parts")
    return value


def _text_only(value: object) -> object:
    if isinstance(value, dict) and value.get("type") not in (None, "text"):
        raise PydanticCustomError("unsupported", "only text content is supported by this server", {"field": "type"})
    return value


class TextPart(RequestModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: Text


class FunctionCall(RequestModel):
    """The function of a tool call; ``arguments`` is JSON in a string."""

    name: Text
    arguments: Text


class ToolCall(RequestModel):
    """A tool call in an earlier turn of the assistant."""

    id: Text
    type: Literal["function"]
    function: FunctionCall


class Message(RequestModel):
    """One turn of a conversation."""

    ignored = frozenset({"annotations"})
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"tool_calls": ([],)}

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: (
        Annotated[
            list[Annotated[TextPart, BeforeValidator(_text_only)]], Field(min_length=1), BeforeValidator(_as_parts)
        ]
        | None
    ) = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("missing", "", {"field": "content"})
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("missing", "", {"field": "tool_call_id"})
        return self
