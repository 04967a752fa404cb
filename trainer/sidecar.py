"""``quickchange.json``: what an adapter folder says beyond PEFT's two files.

``tests/contract/sidecar.schema.json`` says the same for programs in other packages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.config import Sampling

FILE_NAME = "quickchange.json"
Text = Annotated[str, Field(min_length=1)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Loss = Annotated[float, Field(ge=0)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Status = Literal["pass", "warn", "fail"]
RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
        "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
        "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip
VERSION_1_KEYS, VERSION_2_KEYS = {"quality"}, {"end_tokens", "chat_template_kwargs", "verdict"}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class BaseReference(_Part):
    """The base the adapter was trained on: a name for people, fingerprints for programs.

    ``fingerprint`` is of version 1, for sidecars that were written before there was another.
    """

    name: Text
    fingerprint: Digest | None = None
    fingerprint_v2: Digest | None = None

    @model_validator(mode="after")
    def _has_a_fingerprint(self) -> Self:
        if self.fingerprint is None and self.fingerprint_v2 is None:
            raise ValueError("it needs fingerprint_v2 or fingerprint")
        return self


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


class Check(_Part):
    """One thing that was measured of the adapter, with figures of its own."""

    model_config = ConfigDict(extra="allow")

    status: Status


class Verdict(_Part):
    """What the adapter is worth, and what that rests on."""

    status: Status
    checks: dict[Text, Check] = Field(default_factory=dict)


class Sidecar(_Part):
    """The whole file. Optional keys are left out where they say nothing. Version 2 is written, 1 can be read."""

    schema_version: int = Field(ge=1, le=2)
    base: BaseReference
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", description="UTC.")
    chat_template: Text | None = Field(default=None, description="Jinja; instead of the base's.")
    chat_template_kwargs: dict[Variable, Any] | None = Field(default=None, description="Variables of the template.")
    system_prompt: Text | None = Field(default=None, description="System turn of conversations without one.")
    stop: list[Text] | None = Field(default=None, max_length=16)
    end_tokens: list[Text | Count] | None = Field(
        default=None, max_length=16, description="Tokens, by text or id, that end a turn beside the base's own."
    )
    sampling: Sampling | None = None
    training: TrainingRecord | None = None
    metrics: Metrics | None = None
    quality: dict[str, Any] | None = Field(default=None, description="Free form, in version 1 only.")
    verdict: Verdict | None = None

    @model_validator(mode="after")
    def _has_the_keys_of_its_version(self) -> Self:
        wrong = self.model_fields_set & (VERSION_2_KEYS if self.schema_version == 1 else VERSION_1_KEYS)
        if self.schema_version == 1 and "fingerprint_v2" in self.base.model_fields_set:
            wrong.add("base.fingerprint_v2")
        if wrong:
            raise ValueError(f"schema_version {self.schema_version} has no {', '.join(sorted(wrong))}")
        if reserved := RESERVED_VARIABLES & (self.chat_template_kwargs or {}).keys():
            raise ValueError(f"chat_template_kwargs: {', '.join(sorted(reserved))} is the server's own")
        return self

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2, exclude_unset=True) + "\n"
