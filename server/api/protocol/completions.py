"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.generation import GenerationRequest
from server.api.protocol.known_fields import NEUTRAL
from server.api.protocol.model import Integer
from server.api.protocol.prompts import Prompt, parse_prompts

MAX_CHOICES = 128
MAX_CANDIDATES = 20
MAX_COMPLETION_LOGPROBS = 5
DEFAULT_LENGTH = 16
"""OpenAI's maximum of tokens of a completion where the request sets none."""


def _none_if_false(value: object) -> object:
    return None if value is False else value


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``. ``prompt`` is converted to a list of texts or of lists of token ids."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "add_generation_prompt": (True,),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "top_logprobs": (0,),
    }
    ignored = GenerationRequest.ignored | {"enable_thinking", "parallel_tool_calls", "reasoning_effort"}

    prompt: Annotated[list[Prompt], PlainValidator(parse_prompts)]
    logprobs: Annotated[Integer | None, Field(ge=0, le=MAX_COMPLETION_LOGPROBS), BeforeValidator(_none_if_false)] = None

    max_tokens: Integer | None = Field(None, ge=0, lt=2**31)
    best_of: Integer | None = Field(None, ge=1, le=MAX_CANDIDATES)
    echo: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if len(self.prompt) * self.num_candidates > MAX_CHOICES:
            message = f"prompts times 'n', or times 'best_of', should be at most {MAX_CHOICES}"
            raise PydanticCustomError("too_long", message, {"field": "prompt"})
        return self

    @model_validator(mode="after")
    def _best_of_includes_the_answers(self) -> Self:
        if self.best_of is None:
            return self
        if self.best_of < self.n:
            message = f"it should be at least the {self.n} answers that 'n' asks for"
            raise PydanticCustomError("best_of", message, {"field": "best_of"})
        if self.stream and self.best_of > self.n:
            message = "it should not be greater than 'n' in a stream, because the best answers are known at the end"
            raise PydanticCustomError("best_of", message, {"field": "best_of"})
        return self

    @property
    def num_logprobs(self) -> int | None:
        """``logprobs`` is the number; 0 asks for the chosen tokens alone."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """With ``echo``, ``logprobs`` is for the prompt too."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in asked if number is not None), default=None)

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    @property
    def num_candidates(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def continues_text(self) -> bool:
        return True

    @property
    def default_length(self) -> int | None:
        return DEFAULT_LENGTH
