"""The fields that chat and completions share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.known_fields import IGNORED, INSTEAD, NEUTRAL
from server.api.protocol.model import Integer, RequestModel, Text, well_formed
from server.api.protocol.structured import CONSTRAINTS, ConstrainedRequest
from server.errors import UnsupportedParameter

MAX_STOP_LENGTH = 1024
MAX_SALT_LENGTH = 256
MAX_TOKEN_IDS = 1024
MAX_BIAS = 100
MAX_ANSWERS = 128
MAX_PROMPT_LOGPROBS = 20


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


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


TokenId = Annotated[Integer, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
Biases = Annotated[tuple[tuple[int, float], ...], PlainValidator(_parse_biases)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(well_formed)]


@dataclass(frozen=True)
class Processed:
    """Marks a field as the value of the logits processor of the same name; ``neutral`` turns it off."""

    neutral: object


class StreamOptions(RequestModel):
    """Options of a stream."""

    ignored = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(ConstrainedRequest):
    """The fields that chat and completions share."""

    ignored = IGNORED
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    model: Annotated[str, Field(min_length=1), AfterValidator(well_formed)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: Integer | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**63)
    lora_scale: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    user: Text | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=MAX_SALT_LENGTH)] | None = None
    n: Integer = Field(1, ge=1, le=MAX_ANSWERS)
    stop: Annotated[list[StopString], Field(max_length=16), BeforeValidator(_as_list)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)] | None = None
    frequency_penalty: Annotated[Penalty | None, Processed(neutral=0)] = None
    presence_penalty: Annotated[Penalty | None, Processed(neutral=0)] = None
    repetition_penalty: Annotated[RepetitionPenalty | None, Processed(neutral=1)] = None
    logit_bias: Annotated[Biases | None, Processed(neutral=())] = None
    min_tokens: Annotated[Integer | None, Field(ge=0, lt=2**31), Processed(neutral=0)] = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    prompt_logprobs: Integer | None = Field(None, ge=0, le=MAX_PROMPT_LOGPROBS)

    @classmethod
    def refuse(cls, name: str) -> None:
        instead = INSTEAD.get(name)
        hint = "" if instead is None else f": {instead}"
        raise UnsupportedParameter(name, f"Unsupported parameter: '{name}' is not supported by this server{hint}.")

    @model_validator(mode="after")
    def _min_tokens_fit(self) -> Self:
        if self.min_tokens and self.max_completion is not None and self.min_tokens > self.max_completion:
            message = f"it is greater than the {self.max_completion} tokens that the answer may have"
            raise PydanticCustomError("min_tokens", message, {"field": "min_tokens"})
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_are_not_streamed(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            message = "it is only allowed when 'stream' is false"
            raise PydanticCustomError("prompt_logprobs", message, {"field": "prompt_logprobs"})
        return self

    @property
    def is_constrained(self) -> bool:
        """Whether a field may constrain the answers."""
        return not self.model_fields_set.isdisjoint(CONSTRAINTS)

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
    def num_prompt_logprobs(self) -> int | None:
        """As ``num_logprobs``, for each token of the prompt."""
        return self.prompt_logprobs

    @property
    def num_prompts(self) -> int:
        """Prompts of the request; each gets ``n`` answers."""
        return 1

    @property
    def num_candidates(self) -> int:
        """Answers that are generated to each prompt; the ``n`` best are returned."""
        return self.n

    @property
    def max_completion(self) -> int | None:
        """The requested maximum of tokens of each answer."""
        return self.max_tokens

    @property
    def continues_text(self) -> bool:
        """Whether an answer continues the text of its prompt, so that a space at its beginning is part of it."""
        return False

    @property
    def default_length(self) -> int | None:
        """The maximum of tokens of an answer where neither request nor adapter sets one; None: the server's."""
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of a stream has the usage so far."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


@cache
def processed_fields() -> dict[str, Processed]:
    """The fields that are values of logits processors."""
    marks = {}
    for name, field in GenerationRequest.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, Processed):
                marks[name] = mark
    return marks
