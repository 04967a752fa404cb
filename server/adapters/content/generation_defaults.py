"""How an adapter wants to be talked to: what applies where a request says nothing.

From our sidecar, or from what trainers leave beside PEFT's files: ``tokenizer_config.json``, ``chat_template.jinja``
and ``generation_config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapter_format.sidecar import SamplingDefaults, Sidecar
from server.adapters.content.added_tokens import AddedToken
from server.adapters.content.templates import default_template


@dataclass(frozen=True)
class GenerationDefaults:
    """What applies where a request says nothing; ``stop``, ``end_tokens`` and ``eos`` add to what else ends an answer.

    ``end_tokens`` (the sidecar's) and ``eos`` (the companions') are texts of tokens and ids of tokens that end a turn
    beside the base's own. Of ``eos`` those that the base does not have are passed over. ``chat_template_kwargs`` are
    variables of the chat template. ``added_tokens`` are all of the adapter's tokenizer, where they are not the base's.
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
    end_tokens: tuple[str | int, ...] = ()
    eos: tuple[str | int, ...] = ()
    added_tokens: tuple[AddedToken, ...] = ()


@dataclass(frozen=True)
class CompanionFiles:
    """What was found beside PEFT's files, parsed; ``template`` is the text of ``chat_template.jinja``."""

    template: str | None
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]

    @property
    def chat_template(self) -> str | None:
        """The conversation's template, from whichever file has it; of several named ones the default."""
        if self.template:
            return self.template
        found = self.tokenizer.get("chat_template")
        return default_template(found) if isinstance(found, str | list) else None


def merge_defaults(sidecar: Sidecar | None, companions: CompanionFiles) -> GenerationDefaults:
    """The sidecar's word first, the companions' where it is silent."""
    generation = companions.generation
    advised = generation if generation.get("do_sample") is True else {}
    sampling = sidecar.sampling if sidecar is not None and sidecar.sampling is not None else SamplingDefaults()
    end_tokens = None if sidecar is None else sidecar.end_tokens
    return GenerationDefaults(
        stop=tuple(sidecar.stop or ()) if sidecar is not None else (),
        system_prompt=None if sidecar is None else sidecar.system_prompt,
        temperature=_said(sampling.temperature, _number(advised, "temperature", 0, 2)),
        top_p=_said(sampling.top_p, _number(advised, "top_p", 1e-9, 1)),
        top_k=_said(sampling.top_k, _count(advised, "top_k")),
        min_p=_said(sampling.min_p, _number(advised, "min_p", 0, 1)),
        max_tokens=_said(sampling.max_tokens, _count(generation, "max_new_tokens")),
        chat_template=_said(None if sidecar is None else sidecar.chat_template, companions.chat_template),
        chat_template_kwargs=None if sidecar is None else sidecar.chat_template_kwargs,
        end_tokens=tuple(end_tokens or ()),
        eos=_eos(companions) if end_tokens is None else (),
    )


def _said(first: Any, second: Any) -> Any:
    return second if first is None else first


def _number(source: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = source.get(name)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    return float(value) if fits and value is not None else None


def _count(source: Mapping[str, Any], name: str) -> int | None:
    value = source.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31 else None


def token_text(token: Any) -> Any:
    """The text of a token in ``tokenizer_config.json``, where it stands as it is or with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _eos(companions: CompanionFiles) -> tuple[str | int, ...]:
    text = token_text(companions.tokenizer.get("eos_token"))
    ids = companions.generation.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    found: list[str | int] = [text] if isinstance(text, str) and text.isprintable() and text else []
    found += [one for one in listed if isinstance(one, int) and not isinstance(one, bool) and one >= 0]
    return tuple(found[:16])
