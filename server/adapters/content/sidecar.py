"""``quickchange.json``: what an adapter says of itself. Its schema is ``tests/contract/sidecar.schema.json``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.adapters.content.signature import BaseSignature

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
_OF_VERSION_2 = ("end_tokens", "chat_template_kwargs", "verdict")

Text = Annotated[StrictStr, Field(min_length=1)]
Digest = Annotated[StrictStr, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Count = Annotated[StrictInt, Field(ge=0)]
Number = StrictFloat | StrictInt
Status = Literal["pass", "warn", "fail"]
BaseCheck = Literal["fingerprint_v2", "fingerprint", "shapes"]
"""How it is known that an adapter is of this base."""


def _not_reserved(name: str) -> str:
    if name in RESERVED_VARIABLES:
        raise PydanticCustomError("reserved", "this name is the server's own: a default cannot replace it")
    return name


Variable = Annotated[StrictStr, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(_not_reserved)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SidecarBase(_Part):
    """The base it was trained on; the fingerprints are what counts, the name is for people.

    ``fingerprint`` is of version 1. One of the two is there.
    """

    name: Text
    fingerprint: Digest | None = None
    fingerprint_v2: Digest | None = None

    @model_validator(mode="after")
    def _has_a_fingerprint(self) -> Self:
        if self.fingerprint is None and self.fingerprint_v2 is None:
            raise PydanticCustomError("missing", "it needs fingerprint_v2 or fingerprint")
        return self

    @property
    def best_fingerprint(self) -> str:
        """Of the latest version that is there."""
        found = self.fingerprint_v2 or self.fingerprint
        assert found is not None
        return found


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


class SidecarCheck(_Part):
    """One thing that was measured of it; what else stands here is for people."""

    model_config = ConfigDict(extra="allow")

    status: Status


class SidecarVerdict(_Part):
    """What its trainer found it to be worth."""

    status: Status
    checks: dict[Text, SidecarCheck] = Field(default_factory=dict)


class Sidecar(_Part):
    """The whole file. A key that is not here is refused: what it asks for would not happen.

    ``quality`` is of version 1; ``end_tokens``, ``chat_template_kwargs``, ``verdict`` and ``base.fingerprint_v2`` are
    of version 2.
    """

    schema_version: StrictInt = Field(ge=VERSIONS[0], le=VERSIONS[-1])
    base: SidecarBase
    created: StrictStr = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    chat_template: Text | None = None
    chat_template_kwargs: dict[Variable, Any] | None = None
    system_prompt: Text | None = None
    stop: Annotated[list[Text], Field(max_length=16)] | None = None
    end_tokens: Annotated[list[Text | Count], Field(max_length=16)] | None = None
    sampling: SidecarSampling | None = None
    training: SidecarTraining | None = None
    metrics: SidecarMetrics | None = None
    quality: dict[str, Any] | None = None
    verdict: SidecarVerdict | None = None

    @model_validator(mode="after")
    def _has_the_keys_of_its_version(self) -> Self:
        said = self.model_fields_set | {f"base.{name}" for name in self.base.model_fields_set}
        later = [*_OF_VERSION_2, "base.fingerprint_v2"] if self.schema_version == 1 else _OF_VERSION_1
        if wrong := [name for name in later if name in said]:
            raise PydanticCustomError(
                "version",
                f"{wrong[0]} is no key of schema_version {self.schema_version}: drop it, or write the other version",
            )
        return self


def base_check(sidecar: Sidecar | None, base: BaseSignature) -> BaseCheck:
    """How a sidecar shows that the base is the one it was trained on: by the latest fingerprint that both have.

    Without a sidecar only the tensors' shapes can tell. Raises ``ValueError`` where it is another base.
    """
    if sidecar is None:
        return "shapes"
    theirs = sidecar.base
    by_v2 = base.fingerprint_v2 is not None and theirs.fingerprint_v2 is not None
    if by_v2 and theirs.fingerprint_v2 == base.fingerprint_v2:
        return "fingerprint_v2"
    same_edges = theirs.fingerprint is not None and theirs.fingerprint == base.fingerprint
    if same_edges and not by_v2:
        return "fingerprint"
    raise ValueError(
        f"it was trained on another base ({theirs.name}, fingerprint {theirs.best_fingerprint[:19]}); this server runs "
        f"{base.name} ({base.fingerprint_of(2 if theirs.fingerprint_v2 else 1)[:19]})"
        + (", whose weights differ though its fingerprint of version 1 is the same" if same_edges else "")
        + ": start it with that base, or train the adapter again"
    )


def _check_value(name: str, value: Any) -> None:
    """Raises ``ValueError`` for what a model's details could not show: deep nesting, and text that is no Unicode."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if wrong := next((part for part in level if isinstance(part, str) and not _is_unicode(part)), None):
            raise ValueError(f"quickchange.json: {name} has {wrong!r:.80}: half of a surrogate pair is no character")
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise ValueError(f"quickchange.json: {name} is nested more than {MAX_DEPTH} deep: make it flat")


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
            f"quickchange.json: schema_version is {version}; this server reads {' and '.join(map(str, VERSIONS))}: "
            "update it, or train the adapter with a trainer of its version"
        )
    try:
        sidecar = Sidecar.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"quickchange.json: {field} is {first['input']!r:.80}: {first['msg']}") from None
    for name, value in data.items():
        _check_value(name, value)
    return sidecar
