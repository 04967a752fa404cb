"""The bodies of ``POST /tokenize`` and ``POST /detokenize``, with vLLM's fields."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.model import RequestModel, Text, well_formed

Name = Annotated[str, Field(min_length=1), AfterValidator(well_formed)]


class TokenizeRequest(RequestModel):
    """A text in ``prompt``, or a conversation in ``messages``, whose fields are those of a chat request.

    Without ``model`` it is the base.
    """

    model: Name | None = None
    prompt: Text | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None

    @model_validator(mode="after")
    def _either_prompt_or_messages(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            message = "it is needed unless there are 'messages', and should be absent where there are"
            raise PydanticCustomError("prompt_or_messages", message, {"field": "prompt"})
        if self.messages is not None and self.add_special_tokens:
            message = "it should be false with 'messages': the chat template writes the special tokens"
            raise PydanticCustomError("special_tokens", message, {"field": "add_special_tokens"})
        for name in self.chat_fields:
            if self.prompt is not None:
                raise PydanticCustomError("chat_only", "it is only allowed with 'messages'", {"field": name})
        return self

    @property
    def chat_fields(self) -> dict[str, Any]:
        """The fields of a conversation beside its messages."""
        names = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class DetokenizeRequest(RequestModel):
    """Token ids of a model, by default of the base."""

    model: Name | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
