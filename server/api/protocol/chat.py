"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.messages import Message
from server.api.protocol.model import Integer
from server.api.protocol.tools import ToolFields

MAX_CHAT_LOGPROBS = 20
MAX_VARIABLES = 32
MAX_DEPTH = 16
"""Objects and arrays inside of one another."""

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _items(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list) else []


class ChatRequest(ToolFields):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_CHAT_LOGPROBS)
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_VARIABLES)] = Field(default_factory=dict)
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _variables_are_flat(self) -> Self:
        level: list[Any] = [self.chat_template_kwargs]
        for _ in range(MAX_DEPTH):
            level = [item for value in level for item in _items(value)]
        if level:
            message = f"it should be nested at most {MAX_DEPTH} deep"
            raise PydanticCustomError("nested", message, {"field": "chat_template_kwargs"})
        return self

    @model_validator(mode="after")
    def _opens_or_continues(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            message = "it should be false with 'continue_final_message', which continues the last message"
            raise PydanticCustomError("prompt", message, {"field": "add_generation_prompt"})
        return self

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with the beginning of an answer."""
        return not self.continue_final_message and self.add_generation_prompt is not False

    @property
    def continues_text(self) -> bool:
        """Whether the answer continues the last message."""
        return self.continue_final_message

    @model_validator(mode="after")
    def _continues_the_assistant(self) -> Self:
        last = self.messages[-1]
        if self.continue_final_message and (last.role != "assistant" or not last.text or last.tool_calls):
            message = "the last one should be the assistant's and have text, because 'continue_final_message' is true"
            raise PydanticCustomError("messages", message, {"field": "messages"})
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                "top_logprobs", "it is only allowed when 'logprobs' is true", {"field": "top_logprobs"}
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        """``top_logprobs`` if ``logprobs`` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_completion(self) -> int | None:
        """``max_completion_tokens``, the newer name, before ``max_tokens``."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
