"""``quickchange.json``: what an adapter says of itself. Its schema is ``tests/contract/sidecar.schema.json``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError

Text = Annotated[StrictStr, Field(min_length=1)]
Digest = Annotated[StrictStr, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Count = Annotated[StrictInt, Field(ge=0)]
Number = StrictFloat | StrictInt


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SidecarBase(_Part):
    """The base it was trained on; the fingerprint is what counts, the name is for people."""

    name: Text
    fingerprint: Digest


class SidecarSampling(_Part):
    """Sampling to use where a request says nothing."""

    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: StrictInt | None = Field(None, ge=1)
    min_p: Number | None = Field(None, ge=0, le=1)
    max_tokens: StrictInt | None = Field(None, ge=1)


class SidecarTraining(_Part):
    """How it was made; for people."""

    data_digest: Digest
    num_examples: Count
    num_trained_tokens: Count
    epochs: Number = Field(ge=0)
    steps: Count
    seed: Count
    recipe: dict[str, Any]
    duration_s: Number = Field(ge=0)
    versions: dict[str, StrictStr]


class SidecarMetrics(_Part):
    """Losses in nats per trained token; for people."""

    train_loss: Number = Field(ge=0)
    eval_loss: Number | None = Field(ge=0)
    base_eval_loss: Number | None = Field(ge=0)
    eval_perplexity: Number | None = Field(ge=1)
    base_eval_perplexity: Number | None = Field(ge=1)


class Sidecar(_Part):
    """The whole file. A key that is not here is refused: what it asks for would not happen."""

    schema_version: StrictInt = Field(ge=1, le=1)
    base: SidecarBase
    created: StrictStr = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    chat_template: Text | None = None
    system_prompt: Text | None = None
    stop: Annotated[list[Text], Field(max_length=16)] | None = None
    sampling: SidecarSampling | None = None
    training: SidecarTraining | None = None
    metrics: SidecarMetrics | None = None
    quality: dict[str, Any] | None = None


def parse_sidecar(data: Any) -> Sidecar:
    """The checked sidecar. Raises ``ValueError`` naming field and value."""
    try:
        return Sidecar.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"quickchange.json: {field} is {first['input']!r:.80}: {first['msg']}") from None
