"""What a request asks of the engine, where it leaves things to the adapter, and the adapter to the base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TypeVar

from server.adapters.content.manners import AdapterDefaults
from server.api.protocol import GenerationRequest
from server.errors import ContextLengthExceeded, InvalidRequest
from server.sequence import SamplingParams
from server.text.prompt import PromptRenderer

Number = TypeVar("Number", int, float)


def overlay(defaults: AdapterDefaults, below: AdapterDefaults) -> AdapterDefaults:
    """``defaults``, and ``below`` where they say nothing; what ends an answer of both."""
    chosen = {item.name: getattr(defaults, item.name) for item in fields(AdapterDefaults)}
    filled = {name: getattr(below, name) if value is None else value for name, value in chosen.items()}
    ends = {name: (*getattr(defaults, name), *getattr(below, name)) for name in ("stop", "end_tokens", "eos")}
    return AdapterDefaults(**{**filled, **ends})


def sampling_params(request: GenerationRequest, defaults: AdapterDefaults, *, index: int) -> SamplingParams:
    """How answer ``index`` of a prompt is sampled; each of several answers has a seed of its own."""
    top_k = _first(request.top_k, defaults.top_k, 0)
    return SamplingParams(
        temperature=float(_first(request.temperature, defaults.temperature, 1.0)),
        top_p=float(_first(request.top_p, defaults.top_p, 1.0)),
        top_k=max(top_k, 0),
        min_p=float(_first(request.min_p, defaults.min_p, 0.0)),
        seed=None if request.seed is None else request.seed + index,
        processors=request.processors,
    )


def stop_strings(request: GenerationRequest, defaults: AdapterDefaults) -> tuple[str, ...]:
    """The request's stop strings and the adapter's, each once."""
    return tuple(dict.fromkeys([*(request.stop or ()), *defaults.stop]))


def end_ids(defaults: AdapterDefaults, stop: Iterable[str], prompts: PromptRenderer) -> frozenset[int]:
    """Tokens that end an answer beside the base's: the adapter's, and stop strings that are special tokens.

    A special token has no text in an answer, so that as a stop string it would never be seen.
    """
    ids = [prompts.token_id(text) for text in stop]
    ids += [prompts.end_token_id(token) for token in (*defaults.end_tokens, *defaults.eos)]
    return frozenset(token_id for token_id in ids if token_id is not None)


def check_token_ids(request: GenerationRequest, vocab_size: int) -> None:
    """Raises ``InvalidRequest`` where a request names a token that the base does not have."""
    biased = [token for token, _ in request.logit_bias or ()]
    for param, token_ids in (("logit_bias", biased), ("stop_token_ids", request.stop_token_ids or ())):
        beyond = [token for token in token_ids if token >= vocab_size]
        if beyond:
            raise InvalidRequest(
                f"Invalid '{param}': token ids should be below {vocab_size}, and {beyond[0]} is not.", param=param
            )


def completion_length(
    prompt_tokens: int, *, asked: int | None, default: int, limit: int, param: str = "messages"
) -> int:
    """Tokens a completion may have. Raises ``ContextLengthExceeded`` if it does not fit behind the prompt."""
    room = limit - prompt_tokens
    wanted = asked if asked is not None else max(1, min(default, room))
    if wanted > room:
        raise ContextLengthExceeded(limit=limit, prompt_tokens=prompt_tokens, completion_tokens=wanted, param=param)
    return wanted


def _first(asked: Number | None, default: Number | None, otherwise: Number) -> Number:
    return next(value for value in (asked, default, otherwise) if value is not None)
