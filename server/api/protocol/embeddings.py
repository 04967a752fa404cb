"""The body of ``POST /v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.model import Integer, RequestModel, Text, well_formed
from server.api.protocol.prompts import Prompt, parse_prompts

MAX_INPUTS = 2048


class EmbeddingRequest(RequestModel):
    """``input`` is converted to a list of texts or of lists of token ids."""

    model: Annotated[str, Field(min_length=1), AfterValidator(well_formed)]
    input: Annotated[list[Prompt], PlainValidator(parse_prompts)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Integer | None = Field(None, ge=1, lt=2**31)
    truncate_prompt_tokens: Integer | None = Field(None, ge=-1, lt=2**31)
    lora_scale: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    user: Text | None = None

    @model_validator(mode="after")
    def _inputs_are_bounded(self) -> Self:
        if len(self.input) > MAX_INPUTS:
            raise PydanticCustomError("too_long", f"it should have at most {MAX_INPUTS} items", {"field": "input"})
        if any(not item for item in self.input):
            raise PydanticCustomError("too_short", "it should have no empty text", {"field": "input"})
        return self

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            message = "it should be -1, for what fits, or the number of tokens to keep"
            raise PydanticCustomError("truncation", message, {"field": "truncate_prompt_tokens"})
        return self
