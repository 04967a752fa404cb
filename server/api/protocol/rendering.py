"""The fields that tell how a conversation becomes a prompt."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.generation import GenerationRequest

MAX_VARIABLES = 32
MAX_DEPTH = 16
"""Objects and arrays inside of one another."""

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class RenderingFields(GenerationRequest):
    """Variables of the chat template, and whether the prompt opens an answer or continues one."""

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


def _items(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list) else []
