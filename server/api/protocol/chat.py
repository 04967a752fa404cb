"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.messages import Message
from server.api.protocol.model import Integer
from server.api.protocol.rendering import RenderingFields
from server.api.protocol.tools import ToolFields

MAX_CHAT_LOGPROBS = 20


class ChatRequest(ToolFields, RenderingFields):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_CHAT_LOGPROBS)

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
