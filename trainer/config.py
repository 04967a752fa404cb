"""The recipe of a training run: ``TrainConfig``, read from YAML, with ``--set key=value`` overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapter_format.sidecar import SamplingDefaults
from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE
from trainer.errors import RecipeError

OPENING = "{opening}"
LenientPath = Annotated[Path, Field(strict=False)]
Text = Annotated[str, Field(min_length=1)]


class TrainerSettings(BaseSettings):
    """Settings that trainer and server share: environment (``QUICKCHANGE_*``) or ``.env``."""

    model_config = SettingsConfigDict(
        env_prefix="QUICKCHANGE_", env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True
    )

    base_model: str = Field(default=EMBEDDED_BASE, min_length=1, description=f"The frozen base: {BASE_MODEL_HELP}.")
    adapters_dir: Path = Field(default=Path("adapters"), description="The folder whose sub-folders are adapters.")
    cpu: str | None = Field(default=None, description="The instruction set to keep to; by default the CPU's best.")


class _RecipePart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class MessagesSource(_RecipePart):
    """Conversations, one JSON object with ``messages`` per line; a folder means all its ``.jsonl`` files."""

    format: Literal["messages"]
    path: LenientPath


class TextSource(_RecipePart):
    """Books or other prose in UTF-8, cut into passages; a folder means all its ``.txt`` files."""

    format: Literal["text"]
    path: LenientPath
    prompts: list[Text] = Field(
        default_factory=list,
        description="User turns, one drawn per passage; the passage is the answer. '{opening}' becomes the passage's "
        "first sentences, and the answer is then the rest.",
    )
    passage_tokens: int = Field(
        default=256, ge=16, description="Length of a passage; paragraphs stay whole where they fit."
    )
    raw_share: float = Field(
        default=0.0, ge=0, le=1, description="Share of passages trained as plain text, without a template."
    )
    clean: bool = Field(
        default=True, description="Keep the prose alone: no Gutenberg header, headings or line breaks in paragraphs."
    )

    @model_validator(mode="after")
    def _has_a_use_for_every_passage(self) -> Self:
        if not self.prompts and self.raw_share < 1:
            raise ValueError("prompts is empty: give at least one, or set raw_share to 1 to train plain text alone")
        return self


class GeneratorSource(_RecipePart):
    """Conversations from a Python function without arguments, which the recipe runs."""

    generator: str = Field(
        pattern=r"^[\w.]+:\w+$",
        description="'package.module:function', which returns conversations as the JSON lines hold them.",
    )


def _kind_of_source(value: object) -> str | None:
    if isinstance(value, Mapping):
        return "generator" if "generator" in value else value.get("format")
    return "generator" if isinstance(value, GeneratorSource) else getattr(value, "format", None)


Source = Annotated[
    Annotated[MessagesSource, Tag("messages")]
    | Annotated[TextSource, Tag("text")]
    | Annotated[GeneratorSource, Tag("generator")],
    Discriminator(
        _kind_of_source,
        custom_error_type="unknown_source",
        custom_error_message="a source has 'path' and 'format: messages' or 'format: text', or 'generator'",
    ),
]


class LoraSettings(_RecipePart):
    """LoRA's hyperparameters."""

    r: int = Field(default=8, ge=1, le=256, description="Rank.")
    alpha: float = Field(
        default=16.0, gt=0, description="The update is scaled by alpha / r, with rslora by alpha / sqrt(r)."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of LoRA inputs dropped while training.")
    target_modules: Literal["all-linear"] | list[Text] = Field(
        default="all-linear", description="Module names that get LoRA, or every linear but the head."
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r) (Kalajdzievski 2023).")
    save_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Number format of the published weights. bfloat16 halves the file; the weights are rounded before "
        "the last evaluation.",
    )


class TrainConfig(_RecipePart):
    """One adapter: its base, its data, how it is trained, and the generation defaults that it is served with."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="The adapter's name in requests.")
    description: str = Field(default="", description="One line for the card.")
    base_model: Text = Field(description=f"{BASE_MODEL_HELP}. Without it, QUICKCHANGE_BASE_MODEL.")
    data_root: LenientPath | None = Field(
        default=None, description="What data paths are relative to; without it, the recipe's folder."
    )
    data: list[Source] = Field(min_length=1, description="Sources, trained together.")
    lora: LoraSettings = Field(default_factory=LoraSettings)
    max_length: int = Field(default=512, ge=8, description="Longest example in tokens; longer ones are cut at the end.")
    epochs: int | None = Field(
        default=None, ge=1, description="Passes over the data; training ends at epochs or max_steps."
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps; training ends at epochs or max_steps."
    )
    batch_tokens: int = Field(default=4096, ge=1, description="Tokens of one optimizer step.")
    micro_batch_tokens: int = Field(
        default=2048, ge=1, description="Tokens, padding included, of one forward and backward pass."
    )
    lr: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps in which the rate rises from zero."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the rate falls after that."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Longer gradients are scaled down to this norm.")
    seed: int = Field(default=1, ge=0, description="Of the split, the order, LoRA's A matrices and dropout.")
    eval_share: float = Field(
        default=0.05, ge=0, lt=1, description="Share held out: each book's end, any of the conversations."
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between two evaluations; without it, only before and after."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="bfloat16 is autocast over float32 weights; auto takes it where the CPU multiplies it natively.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="Threads for matrix products; without it, one for each performance core."
    )
    system_prompt: Text | None = Field(
        default=None,
        description="System turn of conversations without one, in training and, by the sidecar, in serving.",
    )
    stop: list[Text] = Field(default_factory=list, max_length=16, description="Strings at which an answer ends.")
    sampling: SamplingDefaults = Field(default_factory=SamplingDefaults)
    samples: list[Text] = Field(default_factory=list, description="Questions whose answers are shown on the card.")

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("neither epochs nor max_steps: give one, or training has no end")
        return self


def load_recipe(path: Path, overrides: Sequence[str] = (), *, base_model: str) -> TrainConfig:
    """The recipe at ``path`` with ``overrides`` (``key.sub=yaml value``).

    ``base_model`` is the default of a recipe that names none. ``data_root`` of the result is absolute. Raises
    ``RecipeError`` with every problem, one per line.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this is {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    raw.setdefault("base_model", base_model)
    try:
        config = TrainConfig.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(details)}" for details in error.errors())
        raise RecipeError(f"{path}:\n{problems}") from error
    root = (path.parent / (config.data_root or Path())).absolute()
    return config.model_copy(update={"data_root": root})


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but ``1e-4`` is a number, as in YAML 1.2."""


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b.c=value`` in ``raw``; a number in the path is an index of a list."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override}: write key=value, for example --set lora.r=4")
    *path, last = key.split(".")
    target: Any = raw
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
        for part in path:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        target[int(last) if isinstance(target, list) else last] = value
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not YAML: {error}") from error
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(f"--set {override}: the recipe has no such key: {error}") from error


_SECTIONS: dict[str, type[BaseModel]] = {
    "": TrainConfig,
    "lora": LoraSettings,
    "sampling": SamplingDefaults,
    "messages": MessagesSource,
    "text": TextSource,
    "generator": GeneratorSource,
}


def _explain(details: ErrorDetails) -> str:
    """``field: what is wrong (got value)`` and, for an unknown key, the known ones."""
    location = list(details["loc"])
    section = str(location[-2]) if len(location) > 1 else ""
    if len(location) > 2 and location[0] == "data":
        del location[2]  # the union's tag, which is not a key of the recipe
    field = ".".join(str(part) for part in location)
    if details["type"] == "missing":
        return f"{field}: is missing; add it"
    if details["type"] == "extra_forbidden":
        return f"{field}: unknown key (got {details['input']!r}); {_known_keys(field.split('.')[-1], section)}"
    message = details["msg"].removeprefix("Value error, ")
    if not field or isinstance(details["input"], dict):
        return f"{field}: {message}" if field else message
    return f"{field}: {message} (got {details['input']!r})"


def _known_keys(key: str, section: str) -> str:
    known = list(_SECTIONS[section].model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
