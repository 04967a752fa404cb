"""Request bodies. An unknown field, or one that would change the answer but is not supported, is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.errors import UnsupportedParameter

MAX_CHOICES = 128
MAX_STOP_LENGTH = 1024
MAX_SALT_LENGTH = 256
MAX_TOKEN_IDS = 1024
MAX_BIAS = 100
MAX_CHAT_LOGPROBS, MAX_COMPLETION_LOGPROBS = 20, 5

# Accepted with any value: they have no effect on the answer.
IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "verbosity",
    }
)
# Not supported: accepted only with a value that has no effect.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "it is not valid Unicode: it holds half a surrogate pair") from None
    return text


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _none_if_false(value: object) -> object:
    return None if value is False else value


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": _well_formed(value)}]
    if not isinstance(value, list):
        raise PydanticCustomError("string_or_list_type", "it should be a string or an array of content parts")
    return value


def _text_only(value: object) -> object:
    if isinstance(value, dict) and value.get("type") not in (None, "text"):
        raise PydanticCustomError("unsupported", "only text content is supported by this server", {"field": "type"})
    return value


def _is_neutral(value: object, neutral: tuple[Any, ...]) -> bool:
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def _parse_prompt(value: object) -> list[str | list[int]]:
    """``str``, ``[str]``, ``[int]`` or ``[[int]]`` as a list of prompts."""
    if isinstance(value, str):
        return [_well_formed(value)]
    if isinstance(value, list):
        if not value:
            raise PydanticCustomError("too_short", "it should have at least one item")
        if all(isinstance(item, str) for item in value):
            return [_well_formed(item) for item in value]
        if _are_ids(value):
            return [value]
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return value
    raise PydanticCustomError(
        "prompt_type", "it should be a string, an array of strings, an array of token ids, or an array of such arrays"
    )


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in items)


def _parse_biases(value: object) -> tuple[tuple[int, float], ...]:
    """``{"50256": -100}`` as token ids and numbers."""
    if not isinstance(value, dict):
        raise PydanticCustomError("object_type", "it should be an object of token ids and numbers")
    if len(value) > MAX_TOKEN_IDS:
        raise PydanticCustomError("too_long", f"it should have at most {MAX_TOKEN_IDS} entries")
    return tuple(_parse_bias(key, bias) for key, bias in value.items())


def _parse_bias(key: object, bias: object) -> tuple[int, float]:
    if not isinstance(key, str) or re.fullmatch(r"0|[1-9][0-9]{0,9}", key) is None:
        raise PydanticCustomError("token_id", "its keys should be token ids, and {key} is not", {"key": _shown(key)})
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
        message = f"the bias of token {key} should be a number from -{MAX_BIAS} to {MAX_BIAS}"
        raise PydanticCustomError("bias", message)
    return int(key), float(bias)


def _shown(key: object) -> str:
    return repr(key)[:40]


Text = Annotated[str, AfterValidator(_well_formed)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
Biases = Annotated[tuple[tuple[int, float], ...], PlainValidator(_parse_biases)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_well_formed)]


@dataclass(frozen=True)
class Processed:
    """Marks a field as the value of the logits processor of the same name; ``neutral`` turns it off."""

    neutral: object


class _Strict(BaseModel):
    """JSON types are not converted, ``null`` means absent, and unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_without_effect(cls, raw: object) -> object:
        if not isinstance(raw, dict):
            raise PydanticCustomError("object_type", "it should be a JSON object")
        present = {key: value for key, value in raw.items() if value is not None and key not in cls.ignored}
        return {key: value for key, value in present.items() if not _is_neutral(value, cls.neutral.get(key, ()))}


class TextPart(_Strict):
    """A text part of a message's content."""

    type: Literal["text"]
    text: Text


class FunctionCall(_Strict):
    """The function of a tool call; ``arguments`` is JSON in a string."""

    name: Text
    arguments: Text


class ToolCall(_Strict):
    """A tool call in an earlier turn of the assistant."""

    id: Text
    type: Literal["function"]
    function: FunctionCall


class Message(_Strict):
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


class StreamOptions(_Strict):
    """Options of a stream."""

    ignored = frozenset({"include_obfuscation"})
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"continuous_usage_stats": (False,)}

    include_usage: bool = False


class GenerationRequest(_Strict):
    """The fields that chat and completions share."""

    ignored = IGNORED
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    model: Annotated[str, Field(min_length=1), AfterValidator(_well_formed)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    lora_scale: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    user: Text | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=MAX_SALT_LENGTH)] | None = None
    n: int = Field(1, ge=1, le=8)
    stop: Annotated[list[StopString], Field(max_length=16), BeforeValidator(_as_list)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)] | None = None
    frequency_penalty: Annotated[Penalty | None, Processed(neutral=0)] = None
    presence_penalty: Annotated[Penalty | None, Processed(neutral=0)] = None
    repetition_penalty: Annotated[RepetitionPenalty | None, Processed(neutral=1)] = None
    logit_bias: Annotated[Biases | None, Processed(neutral=())] = None
    min_tokens: Annotated[int | None, Field(ge=0, lt=2**31), Processed(neutral=0)] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported_fields(cls, raw: object) -> object:
        if isinstance(raw, dict):
            for field, neutral in cls.neutral.items():
                value = raw.get(field)
                if value is not None and not _is_neutral(value, neutral):
                    raise UnsupportedParameter(field)
        return raw

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "it is only allowed when 'stream' is true", {"field": "stream_options"}
            )
        return self

    @model_validator(mode="after")
    def _min_tokens_fit(self) -> Self:
        if self.min_tokens and self.max_completion is not None and self.min_tokens > self.max_completion:
            message = f"it is greater than the {self.max_completion} tokens that the answer may have"
            raise PydanticCustomError("min_tokens", message, {"field": "min_tokens"})
        return self

    @property
    def processors(self) -> tuple[tuple[str, Any], ...]:
        """Names and values of the requested logits processors."""
        asked = []
        for name, mark in processed_fields().items():
            value = getattr(self, name)
            if value is not None and value != mark.neutral:
                asked.append((name, value))
        return tuple(asked)

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens to return with each token; None without log probabilities, as here."""
        return None

    @property
    def num_prompts(self) -> int:
        """Prompts of the request; each gets ``n`` answers."""
        return 1

    @property
    def max_completion(self) -> int | None:
        """The requested maximum of tokens of each answer."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_CHAT_LOGPROBS)

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


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``. ``prompt`` is converted to a list of texts or of lists of token ids."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**NEUTRAL, "top_logprobs": (0,)}

    prompt: Annotated[list[str | list[int]], PlainValidator(_parse_prompt)]
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_COMPLETION_LOGPROBS), BeforeValidator(_none_if_false)] = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if len(self.prompt) * self.n > MAX_CHOICES:
            message = f"prompts times 'n' should be at most {MAX_CHOICES}"
            raise PydanticCustomError("too_long", message, {"field": "prompt"})
        return self

    @property
    def num_logprobs(self) -> int | None:
        """``logprobs`` is the number; 0 asks for the chosen tokens alone."""
        return self.logprobs

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)


@cache
def processed_fields() -> dict[str, Processed]:
    """The fields that are values of logits processors."""
    marks = {}
    for name, field in GenerationRequest.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, Processed):
                marks[name] = mark
    return marks
