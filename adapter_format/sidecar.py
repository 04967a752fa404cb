"""The sidecar, ``quickchange.json``: what an adapter folder says beyond PEFT's files.

``tests/contract/sidecar.schema.json`` says the same for programs in other languages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapter_format.files import SIDECAR_FILE

VERSIONS = (1, 2)
MAX_DEPTH = 32
"""Objects and lists inside of one another."""

RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
        "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
        "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip
"""What a request or the server itself hands to a chat template and to transformers' ``apply_chat_template``."""

_OF_VERSION_1 = ("quality",)
_OF_VERSION_2 = ("end_tokens", "chat_template_kwargs", "tool_format", "verdict", "base.fingerprint_v2", "base.sample")

Text = Annotated[str, Field(min_length=1)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Count = Annotated[StrictInt, Field(ge=0)]
SampledValues = Annotated[str, Field(pattern=r"^[A-Z0-9_]{2,8} [0-9]{1,9}(x[0-9]{1,9})? [A-Za-z0-9+/]{1,172}={0,2}$")]
ToolFormatName = Literal[
    "apertus", "cohere", "deepseek_v3", "deepseek_v31", "glm4", "granite", "harmony", "hermes", "hermes_compact",
    "hunyuan", "llama3", "mistral", "mistral_list", "nemotron", "olmo3", "phi4", "qwen3_coder", "seed_oss",
]  # fmt: skip
Status = Literal["pass", "warn", "fail"]


def _not_reserved(name: str) -> str:
    if name in RESERVED_VARIABLES:
        raise PydanticCustomError("reserved", "this name is the server's own: a default cannot replace it")
    return name


Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(_not_reserved)]


class _SidecarPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class BaseSample(_SidecarPart):
    """What tells whether another format holds the same base; ``base_files.weights_sample`` writes and reads it.

    ``vocabulary`` is a digest of the tokens, null if unknown. Each of ``tensors`` has a type, a shape and some values.
    """

    architecture: Annotated[dict[Text, StrictBool | StrictInt | float | str], Field(max_length=64)]
    vocabulary: Digest | None
    tensors: Annotated[dict[Text, SampledValues], Field(max_length=64)]


class BaseReference(_SidecarPart):
    """The base the adapter was trained on: a name for people, fingerprints and a sample for programs.

    ``fingerprint`` is of version 1. One of the two is there.
    """

    name: Text
    fingerprint: Digest | None = None
    fingerprint_v2: Digest | None = None
    sample: BaseSample | None = None

    @model_validator(mode="after")
    def _has_a_fingerprint(self) -> Self:
        if self.fingerprint is None and self.fingerprint_v2 is None:
            raise PydanticCustomError("missing", "it needs fingerprint_v2 or fingerprint")
        return self

    @property
    def best_fingerprint(self) -> str:
        """That of the latest version."""
        found = self.fingerprint_v2 or self.fingerprint
        assert found is not None
        return found


class SamplingDefaults(_SidecarPart):
    """Sampling a request gets where it does not say."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)


class TrainingRecord(_SidecarPart):
    """How the adapter was made; for people. ``data_digest`` is over the token ids and labels, so it is the base's too.

    ``num_trained_tokens`` are those with a loss, over all epochs.
    """

    data_digest: Digest
    num_examples: Count
    num_trained_tokens: Count
    epochs: float = Field(ge=0)
    steps: Count
    seed: Count
    recipe: dict[str, Any]
    duration_s: float = Field(ge=0)
    versions: dict[str, str]


class TrainingMetrics(_SidecarPart):
    """Mean losses in nats per trained token, for people; null where nothing was held out."""

    train_loss: float = Field(ge=0)
    eval_loss: float | None = Field(ge=0)
    base_eval_loss: float | None = Field(ge=0)
    eval_perplexity: float | None = Field(ge=1)
    base_eval_perplexity: float | None = Field(ge=1)


class Check(_SidecarPart):
    """One thing that was measured of the adapter, with figures of its own."""

    model_config = ConfigDict(extra="allow")

    status: Status


class Verdict(_SidecarPart):
    """What its trainer found the adapter to be worth."""

    status: Status
    checks: dict[Text, Check] = Field(default_factory=dict)


class Sidecar(_SidecarPart):
    """The whole file. A key that is not here is refused: what it asks for would not happen.

    Version 2 is written, 1 is read for good. ``quality`` is of version 1; ``end_tokens``, ``chat_template_kwargs``,
    ``tool_format``, ``verdict``, ``base.fingerprint_v2`` and ``base.sample`` are of version 2. ``end_tokens`` are texts
    or ids of tokens. ``tool_format`` is how the adapter writes tool calls, if not as its chat template says.
    """

    schema_version: StrictInt = Field(ge=VERSIONS[0], le=VERSIONS[-1])
    base: BaseReference
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    chat_template: Text | None = None
    chat_template_kwargs: dict[Variable, Any] | None = None
    tool_format: ToolFormatName | None = None
    system_prompt: Text | None = None
    stop: Annotated[list[Text], Field(max_length=16)] | None = None
    end_tokens: Annotated[list[Text | Count], Field(max_length=16)] | None = None
    sampling: SamplingDefaults | None = None
    training: TrainingRecord | None = None
    metrics: TrainingMetrics | None = None
    quality: dict[str, Any] | None = None
    verdict: Verdict | None = None

    @model_validator(mode="after")
    def _has_the_keys_of_its_version(self) -> Self:
        given = self.model_fields_set | {f"base.{name}" for name in self.base.model_fields_set}
        later = _OF_VERSION_2 if self.schema_version == 1 else _OF_VERSION_1
        if wrong := [name for name in later if name in given]:
            raise PydanticCustomError(
                "version",
                f"{wrong[0]} is no key of schema_version {self.schema_version}: drop it, or write the other version",
            )
        return self

    def to_json(self) -> str:
        """The file's text, without the optional keys that were left out."""
        return self.model_dump_json(indent=2, exclude_unset=True) + "\n"


def _check_value(name: str, value: Any) -> None:
    """Raises ``ValueError`` for what a model's details could not show: deep nesting, and text that is no Unicode."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if wrong := next((part for part in level if isinstance(part, str) and not _is_unicode(part)), None):
            raise ValueError(f"{SIDECAR_FILE}: {name} has {wrong!r:.80}: half of a surrogate pair is no character")
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise ValueError(f"{SIDECAR_FILE}: {name} is nested more than {MAX_DEPTH} deep: make it flat")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value, *value.values())
    return value if isinstance(value, list) else ()


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def parse_sidecar(data: Any) -> Sidecar:
    """The checked sidecar. Raises ``ValueError`` naming field and value."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is int and version > VERSIONS[-1]:
        raise ValueError(
            f"{SIDECAR_FILE}: schema_version is {version}; this server reads {' and '.join(map(str, VERSIONS))}: "
            "update it, or train the adapter with a trainer of its version"
        )
    try:
        sidecar = Sidecar.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{SIDECAR_FILE}: {field} is {first['input']!r:.80}: {first['msg']}") from None
    for name, value in data.items():
        _check_value(name, value)
    return sidecar
