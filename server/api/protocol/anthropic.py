"""The bodies of Anthropic's ``POST /v1/messages`` and ``/v1/messages/count_tokens``.

Bounds of sampling parameters are those of a chat request, which a body is translated to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from server.api.protocol.kinds import as_list_of, kind_of, only
from server.api.protocol.model import Integer, RequestModel, Text
from server.errors import InvalidRequest


class TextBlock(RequestModel):
    """Text of a turn, of the system prompt or of a tool's result."""

    ignored = frozenset({"cache_control", "citations", "parsed_output"})

    type: Literal["text"]
    text: Text


Texts = Annotated[list[Annotated[TextBlock, only("text")]], as_list_of("text")]


class ThinkingBlock(RequestModel):
    """Reasoning of an earlier turn; any ``signature`` is taken."""

    ignored = frozenset({"signature"})

    type: Literal["thinking"]
    thinking: Text


class RedactedThinkingBlock(RequestModel):
    """Reasoning that only Anthropic can read: it is left out."""

    ignored = frozenset({"data"})

    type: Literal["redacted_thinking"]


class ToolUseBlock(RequestModel):
    """A call that the model made in an earlier turn."""

    ignored = frozenset({"cache_control", "caller"})

    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any]


class ToolResultBlock(RequestModel):
    """What a tool returned; that it is an error, its text tells the model."""

    ignored = frozenset({"cache_control", "is_error"})

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Texts = Field(default_factory=list)


ContentBlock = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
_ContentBlock = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ThinkingBlock, Tag("(thinking)")]
    | Annotated[RedactedThinkingBlock, Tag("(redacted_thinking)")]
    | Annotated[ToolUseBlock, Tag("(tool_use)")]
    | Annotated[ToolResultBlock, Tag("(tool_result)")],
    Discriminator(kind_of),
    only("text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]


class AnthropicMessage(RequestModel):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[_ContentBlock], as_list_of("text")]


class AnthropicTool(RequestModel):
    """A tool that the client runs."""

    ignored = frozenset(
        {"allowed_callers", "cache_control", "defer_loading", "eager_input_streaming", "input_examples"}
    )

    type: Literal["custom"]
    name: Text
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class AnthropicToolChoice(RequestModel):
    """Whether and which tools the model calls; ``name`` belongs to ``tool``."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool = False


class ThinkingOptions(RequestModel):
    """Whether the model reasons, where its chat template lets a request choose."""

    ignored = frozenset({"budget_tokens", "display"})

    type: Literal["enabled", "disabled", "adaptive"]


class OutputOptions(RequestModel):
    """The form of the answer: ``format`` is JSON by a schema, ``effort`` how much the model reasons."""

    effort: Text | None = None
    format: dict[str, Any] | None = None


class MessagesMetadata(RequestModel):
    """Who asks."""

    user_id: Text | None = None


def _refuse_thread(value: object) -> object:
    """By the code at which Anthropic's tool runner sends the whole conversation instead."""
    raise InvalidRequest(
        "Unsupported parameter: 'thread': this server holds no conversation; send all of its messages.",
        param="thread",
        code="thread_unsupported_request",
    )


class AnthropicPrompt(RequestModel):
    """``POST /v1/messages/count_tokens``: what becomes the prompt."""

    ignored = frozenset(
        {
            "betas",
            "cache_control",
            "context_management",
            "diagnostics",
            "inference_geo",
            "service_tier",
            "speed",
            "user_profile_id",
            "workspace_id",
        }
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"container": (), "mcp_servers": ([],)}

    model: Text
    messages: list[AnthropicMessage]
    system: Texts | None = None
    tools: list[Annotated[AnthropicTool, only("custom", default="custom")]] = Field(default_factory=list)
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None
    output_format: dict[str, Any] | None = None
    thread: Annotated[None, BeforeValidator(_refuse_thread)] = None


class MessagesRequest(AnthropicPrompt):
    """``POST /v1/messages``."""

    max_tokens: Integer
    stream: bool = False
    stop_sequences: list[Text] = Field(default_factory=list)
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    metadata: MessagesMetadata | None = None
