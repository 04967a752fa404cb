"""Generation defaults of an adapter: prompt, sampling, stop strings, end tokens.

They come from the sidecar, or from the companion files that trainers write beside PEFT's: ``tokenizer_config.json``,
``chat_template.jinja`` and ``generation_config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapter_format.sidecar import SamplingDefaults, Sidecar
from server.adapters.content.added_tokens import AddedToken
from server.adapters.content.templates import default_template

MAX_END_TOKENS = 16


@dataclass(frozen=True)
class GenerationDefaults:
    """Values for parameters that a request leaves out. ``stop``, ``end_tokens`` and ``eos`` add to the request's.

    ``end_tokens`` (of the sidecar) and ``eos`` (of companion files) are texts or ids of tokens that end a turn, besides
    the base's. Tokens of ``eos`` that the base lacks are ignored. ``chat_template_kwargs`` are variables of the chat
    template. ``tool_format`` names the format of tool calls. ``added_tokens`` are all those of the adapter's tokenizer;
    empty if they are the base's.
    """

    stop: tuple[str, ...] = ()
    system_prompt: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    tool_format: str | None = None
    end_tokens: tuple[str | int, ...] = ()
    eos: tuple[str | int, ...] = ()
    added_tokens: tuple[AddedToken, ...] = ()


@dataclass(frozen=True)
class CompanionFiles:
    """Parsed companion files of PEFT's two; ``template`` is the text of ``chat_template.jinja``."""

    template: str | None
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]

    @property
    def chat_template(self) -> str | None:
        """The chat template of either file; of several named ones the default."""
        if self.template:
            return self.template
        found = self.tokenizer.get("chat_template")
        return default_template(found) if isinstance(found, str | list) else None


def merge_defaults(sidecar: Sidecar | None, companions: CompanionFiles) -> GenerationDefaults:
    """The sidecar's values; those of the companion files where the sidecar has none."""
    generation = companions.generation
    recommended = generation if generation.get("do_sample") is True else {}
    sampling = sidecar.sampling if sidecar is not None and sidecar.sampling is not None else SamplingDefaults()
    end_tokens = None if sidecar is None else sidecar.end_tokens
    return GenerationDefaults(
        stop=tuple(sidecar.stop or ()) if sidecar is not None else (),
        system_prompt=None if sidecar is None else sidecar.system_prompt,
        temperature=_first_given(sampling.temperature, _number(recommended, "temperature", 0, 2)),
        top_p=_first_given(sampling.top_p, _number(recommended, "top_p", 1e-9, 1)),
        top_k=_first_given(sampling.top_k, _count(recommended, "top_k")),
        min_p=_first_given(sampling.min_p, _number(recommended, "min_p", 0, 1)),
        max_tokens=_first_given(sampling.max_tokens, _count(generation, "max_new_tokens")),
        chat_template=_first_given(None if sidecar is None else sidecar.chat_template, companions.chat_template),
        chat_template_kwargs=None if sidecar is None else sidecar.chat_template_kwargs,
        tool_format=None if sidecar is None else sidecar.tool_format,
        end_tokens=tuple(end_tokens or ()),
        eos=_eos(companions) if end_tokens is None else (),
    )


def _first_given(value: Any, fallback: Any) -> Any:
    return fallback if value is None else value


def _number(source: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = source.get(name)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    return float(value) if fits and value is not None else None


def _count(source: Mapping[str, Any], name: str) -> int | None:
    value = source.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31 else None


def token_text(token: Any) -> Any:
    """The text of a token in ``tokenizer_config.json``, which is a string or an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _eos(companions: CompanionFiles) -> tuple[str | int, ...]:
    text = token_text(companions.tokenizer.get("eos_token"))
    ids = companions.generation.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    tokens: list[str | int] = [text] if isinstance(text, str) and text.isprintable() and text else []
    tokens += [number for number in listed if type(number) is int and number >= 0]
    return tuple(tokens[:MAX_END_TOKENS])
