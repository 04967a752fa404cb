"""The body of ``POST /v1/responses``: the parts of OpenAI's API that need no stored state.

Bounds of sampling parameters are those of a chat request, which the body is translated to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from server.api.protocol.kinds import as_list_of, kind_of, only
from server.api.protocol.model import Integer, RequestModel, Text

LOGPROBS = "message.output_text.logprobs"


class ResponsesText(RequestModel):
    """Text in a message, a function's output or reasoning."""

    ignored = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: Text


_MESSAGE_TEXT = only("input_text", "output_text", "text")
Texts = Annotated[list[Annotated[ResponsesText, _MESSAGE_TEXT]], as_list_of("input_text")]
ReasoningTexts = list[Annotated[ResponsesText, only("reasoning_text", "summary_text", "text")]]


class InputMessage(RequestModel):
    """A turn of the conversation."""

    ignored = frozenset({"id", "phase", "status"})

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts


class FunctionCallItem(RequestModel):
    """A call that the model made in an earlier response; ``arguments`` is JSON in a string."""

    ignored = frozenset({"caller", "id", "namespace", "status"})

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class FunctionOutputItem(RequestModel):
    """What a function returned."""

    ignored = frozenset({"caller", "id", "name", "namespace", "status"})

    type: Literal["function_call_output"]
    call_id: Text
    output: Texts


class ReasoningItem(RequestModel):
    """Reasoning of an earlier response, whose text is its ``content``, or else its ``summary``."""

    ignored = frozenset({"encrypted_content", "id", "status"})

    type: Literal["reasoning"]
    summary: ReasoningTexts = Field(default_factory=list)
    content: ReasoningTexts = Field(default_factory=list)


ResponsesItem = InputMessage | FunctionCallItem | FunctionOutputItem | ReasoningItem
_InputItem = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[FunctionCallItem, Tag("(function_call)")]
    | Annotated[FunctionOutputItem, Tag("(function_call_output)")]
    | Annotated[ReasoningItem, Tag("(reasoning)")],
    Discriminator(kind_of),
    only("message", "function_call", "function_call_output", "reasoning", default="message"),
]


def _as_items(value: object) -> object:
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesTool(RequestModel):
    """A function that the model may call."""

    ignored = frozenset({"allowed_callers", "async", "defer_loading", "output_schema"})

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(RequestModel):
    """How the text is written; ``format`` is free text, any JSON object, or JSON by a schema."""

    format: dict[str, Any] | None = None
    verbosity: Text | None = None


class ReasoningOptions(RequestModel):
    """How much the model reasons. Its text is in the response whatever ``summary`` asks for."""

    ignored = frozenset({"context", "generate_summary", "mode", "summary"})

    effort: Text | None = None


class ResponsesStreamOptions(RequestModel):
    """Options of a stream, which have no effect."""

    ignored = frozenset({"include_obfuscation"})


class ResponsesRequest(RequestModel):
    """``POST /v1/responses``. Nothing is stored, whatever ``store`` says."""

    ignored = frozenset(
        {
            "max_tool_calls",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "store",
        }
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }

    model: Text
    input: Annotated[list[_InputItem], BeforeValidator(_as_items)]
    instructions: Text | None = None
    stream: bool = False
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Annotated[ResponsesTool, only("function")]] = Field(default_factory=list)
    tool_choice: Text | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Text] = Field(default_factory=list)
    top_logprobs: Integer | None = None
    metadata: dict[str, Any] | None = None
    user: Text | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    seed: Integer | None = None
    stop: Text | list[Text] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    cache_salt: Text | None = None
    lora_scale: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
