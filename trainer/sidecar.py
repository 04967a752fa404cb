"""``quickchange.json``: what an adapter folder says beyond PEFT's two files.

``tests/contract/sidecar.schema.json`` says the same for programs in other packages.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from trainer.config import Sampling

FILE_NAME = "quickchange.json"
Text = Annotated[str, Field(min_length=1)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Loss = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class BaseReference(_Part):
    """The base the adapter was trained on: a name for people, a fingerprint for programs."""

    name: Text
    fingerprint: Digest


class TrainingRecord(_Part):
    """How the adapter came to be. ``data_digest`` is over the token ids and labels, so it is the base's too."""

    data_digest: Digest
    num_examples: Count
    num_trained_tokens: Count = Field(description="Tokens with a loss, over all epochs.")
    epochs: float = Field(ge=0)
    steps: Count
    seed: Count
    recipe: dict[str, Any]
    duration_s: float = Field(ge=0)
    versions: dict[str, str]


class Metrics(_Part):
    """Mean losses in nats per trained token; null where nothing was held out."""

    train_loss: Loss
    eval_loss: Loss | None
    base_eval_loss: Loss | None
    eval_perplexity: float | None = Field(ge=1)
    base_eval_perplexity: float | None = Field(ge=1)


class Sidecar(_Part):
    """The whole file. Optional keys are left out where they say nothing."""

    schema_version: int = Field(ge=1, le=1)
    base: BaseReference
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", description="UTC.")
    chat_template: Text | None = Field(default=None, description="Jinja; instead of the base's.")
    system_prompt: Text | None = Field(default=None, description="System turn of conversations without one.")
    stop: list[Text] | None = Field(default=None, max_length=16)
    sampling: Sampling | None = None
    training: TrainingRecord | None = None
    metrics: Metrics | None = None
    quality: dict[str, Any] | None = Field(default=None, description="A verdict and what it rests on; free form.")

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2, exclude_unset=True) + "\n"
