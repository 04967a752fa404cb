"""From a body to sequences in the engine: lease, sampling parameters and limits, and submission."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from fastapi import Request

from server.adapters.adapter_cache import Lease, joint_defaults
from server.adapters.content.generation_defaults import GenerationDefaults
from server.api.active_request import ActiveRequest, Choice, TokenRecord
from server.api.auth.principal import WITHOUT_KEYS, Principal
from server.api.protocol import GenerationRequest
from server.api.request_log import RequestLog
from server.api.state import ServerState, adapter_access
from server.errors import ContextLengthExceeded, InvalidRequest
from server.sequence import SamplingParams
from server.text.answer_format import PLAIN, AnswerFormat
from server.text.detokenizer import Detokenizer
from server.text.grammar.compiler import CompiledGrammar
from server.text.prompt import PromptRenderer
from server.text.prompt_text import PromptText
from server.text.token_texts import TokenTexts

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Prompts:
    """Token ids of each prompt, the renderer with the tokenizer, and the field of the body that has the prompts.

    ``answers`` is what the answers to them look like. ``texts`` are those of the prompts where the answers repeat them.
    ``unused_fields`` are fields of the request for which the chat template has no variable.
    The answers follow ``grammar``.
    """

    ids: list[list[int]]
    renderer: PromptRenderer
    field: str
    answers: AnswerFormat = PLAIN
    texts: Sequence[PromptText] = ()
    unused_fields: tuple[str, ...] = ()
    grammar: CompiledGrammar | None = None


@asynccontextmanager
async def leased(
    body: GenerationRequest, http: Request, state: ServerState
) -> AsyncIterator[tuple[Lease | None, GenerationDefaults]]:
    """A lease of the adapters that ``model`` names, None for the base, and the generation defaults.

    Room in the queue is reserved until the block ends, which submits. The lease is released here only if the block
    raises. Raises every error that can be found before rendering.
    """
    check_token_ids(body, state.prompts.vocab_size)
    num_sequences = body.num_prompts * body.num_candidates
    with state.engine.reserve(num_sequences, owner=queue_owner(http)) as reservation:
        http.state.reservation = reservation
        lease = await acquire(body.model, http, state, user=body.user, lora_scale=body.lora_scale)
        try:
            yield lease, state.base_defaults if lease is None else overlay(lease.defaults, state.base_defaults)
        except BaseException:
            if lease is not None:
                lease.release()
            raise


def queue_owner(http: Request) -> str | None:
    """Whose share of the queue a request takes; None for all of it, without keys."""
    principal: Principal = http.state.principal
    return None if principal is WITHOUT_KEYS else principal.id


async def named_defaults(
    model: str, http: Request, state: ServerState, *, user: str | None = None
) -> GenerationDefaults:
    """The generation defaults of the adapters that ``model`` names, which are not loaded, or of the base."""
    may_use = adapter_access(http)
    refs = state.adapters.resolve(model, user=user, may_use=may_use)
    if not refs:
        return state.base_defaults
    return overlay(joint_defaults(await state.adapters.find(refs, may_use)), state.base_defaults)


async def acquire(
    model: str, http: Request, state: ServerState, *, user: str | None = None, lora_scale: float | None = None
) -> Lease | None:
    """A lease of the adapters that ``model`` names, None for the base."""
    may_use = adapter_access(http)
    refs = state.adapters.resolve(model, user=user, scale=lora_scale, may_use=may_use)
    return await state.adapters.lease(refs, may_use) if refs else None


def submit(
    body: GenerationRequest,
    http: Request,
    state: ServerState,
    *,
    lease: Lease | None,
    defaults: GenerationDefaults,
    prompts: Prompts,
) -> ActiveRequest:
    """Queue the sequences of each prompt. Raises ``ContextLengthExceeded``, ``QueueFull``, ``EngineUnavailable``."""
    lengths = [
        completion_length(
            len(prompt_ids),
            asked=body.max_completion,
            default=defaults.max_tokens or body.default_length or state.default_max_tokens,
            limit=state.engine.max_model_len,
            param=prompts.field,
        )
        for prompt_ids in prompts.ids
    ]
    stop, eos_ids = _ends(body, defaults, prompts.renderer, state.eos_ids)
    if prompts.answers.required:
        stop = ()  # the end of the calls is the end of the answer
    principal: Principal = http.state.principal
    namespace = cache_namespace(principal.id, body.cache_salt)
    log = request_log(http, state, "chat" if prompts.field == "messages" else "text_completion")
    token_texts = _token_texts(body, prompts)
    request = ActiveRequest(body, lease, log, sum(map(len, prompts.ids)), token_texts, prompts.ids, prompts.texts)
    decode = prompts.renderer.decoder(prompts.answers.markers)
    with ExitStack() as submitted:
        for place, (prompt_ids, max_tokens) in enumerate(zip(prompts.ids, lengths, strict=True)):
            for number in range(body.num_candidates):
                index = len(request.choices)
                http.state.reservation.num_sequences -= 1
                params = sampling_params(body, defaults, index=number, max_tokens=max_tokens)
                params = replace(params, grammar=prompts.grammar)
                sequence = state.engine.submit(
                    prompt_ids,
                    params=params,
                    max_tokens=max_tokens,
                    adapters=() if lease is None else lease.uses,
                    eos_ids=eos_ids,
                    cache_namespace=namespace,
                    owner=http.state.principal.id,
                    sink=request.sink(index),
                )
                submitted.callback(sequence.close)
                detokenizer = _detokenizer(body, prompts, place, decode, stop)
                record = TokenRecord() if _needs_record(body, max_tokens) else None
                parser = prompts.answers.parser()
                request.choices.append(Choice(index, sequence, params, detokenizer, eos_ids, parser, record))
        submitted.pop_all()
    return request


def _token_texts(body: GenerationRequest, prompts: Prompts) -> TokenTexts | None:
    """The texts of tokens, where log probabilities are asked for."""
    if body.num_logprobs is None and body.num_prompt_logprobs is None:
        return None
    texts = prompts.renderer.token_texts
    if not body.continues_text or prompts.texts:  # where prompts are repeated, they have the first token
        return texts
    are_texts = (any(not texts.is_special(token_id) for token_id in ids) for ids in prompts.ids)
    return texts.continued() if all(are_texts) else texts


def request_log(http: Request, state: ServerState, operation: str) -> RequestLog:
    """Where a request is recorded; ``operation`` is its name in OpenTelemetry's conventions."""
    principal: Principal = http.state.principal
    return RequestLog(
        state.metrics,
        http.state.request_id,
        http.state.arrived,
        operation,
        tracer=state.tracer,
        traceparent=None if state.tracer is None else http.headers.get("traceparent"),
        key=principal.label,
    )


def _detokenizer(
    body: GenerationRequest,
    prompts: Prompts,
    place: int,
    decode: Callable[[Sequence[int]], str],
    stop: tuple[str, ...],
) -> Detokenizer:
    """That of an answer to prompt ``place``."""
    start = len(prompts.texts[place].text) if prompts.texts else 0
    context_ids = prompts.ids[place] if body.continues_text else ()
    return Detokenizer(decode, stop, min_tokens=body.min_tokens or 0, context_ids=context_ids, start=start)


def _needs_record(body: GenerationRequest, max_tokens: int) -> bool:
    is_chosen = body.num_candidates > body.n
    return body.return_token_ids or body.num_prompt_logprobs is not None or is_chosen or not max_tokens


def cache_namespace(owner: str | None, cache_salt: str | None) -> bytes:
    """A digest of the request's principal and of its salt.

    KV prefixes are shared only within a namespace, so that timing cannot reveal another client's prompts.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (owner, cache_salt):
        data = b"" if part is None else part.encode("utf-8", "surrogateescape")
        digest.update(b"%d:%d:" % (part is not None, len(data)) + data)
    return digest.digest()


def overlay(defaults: GenerationDefaults, below: GenerationDefaults) -> GenerationDefaults:
    """``defaults`` with unset values of ``below``, and with stop strings and end tokens of both."""
    unset = [field.name for field in fields(GenerationDefaults) if getattr(defaults, field.name) is None]
    return replace(
        defaults,
        stop=(*defaults.stop, *below.stop),
        end_tokens=(*defaults.end_tokens, *below.end_tokens),
        eos=(*defaults.eos, *below.eos),
        **{name: getattr(below, name) for name in unset},
    )


def sampling_params(
    request: GenerationRequest, defaults: GenerationDefaults, *, index: int, max_tokens: int | None = None
) -> SamplingParams:
    """Sampling parameters of answer ``index`` of a prompt; each answer has a seed of its own."""
    top_k = _first(request.top_k, defaults.top_k, 0)
    return SamplingParams(
        temperature=float(_first(request.temperature, defaults.temperature, 1.0)),
        top_p=float(_first(request.top_p, defaults.top_p, 1.0)),
        top_k=max(top_k, 0),
        min_p=float(_first(request.min_p, defaults.min_p, 0.0)),
        seed=None if request.seed is None else request.seed + index,
        processors=request.processors,
        num_logprobs=_num_logprobs(request),
        num_prompt_logprobs=_num_prompt_logprobs(request, index, max_tokens),
    )


def _num_logprobs(request: GenerationRequest) -> int | None:
    """Log probabilities of the answer, also where they only choose the best of several."""
    is_chosen = request.num_candidates > request.n
    return 0 if request.num_logprobs is None and is_chosen else request.num_logprobs


def _num_prompt_logprobs(request: GenerationRequest, index: int, max_tokens: int | None) -> int | None:
    """The first answer to a prompt has the prompt's log probabilities, in a stream each of them.

    An answer without tokens ends with the prompt, and so asks for them, too.
    """
    asked = request.num_prompt_logprobs
    if asked is not None and (index == 0 or request.stream):
        return asked
    return 0 if max_tokens == 0 else None


def stop_strings(request: GenerationRequest, defaults: GenerationDefaults) -> tuple[str, ...]:
    """The stop strings of request and adapter without duplicates."""
    return tuple(dict.fromkeys([*(request.stop or ()), *defaults.stop]))


def end_ids(defaults: GenerationDefaults, stop: Iterable[str], prompts: PromptRenderer) -> frozenset[int]:
    """End tokens beside the base's: the adapter's, and stop strings that are special tokens.

    A special token has no text in an answer, so the detokenizer cannot find it as a stop string.
    """
    ids = [prompts.token_id(text) for text in stop]
    ids += [prompts.end_token_id(token) for token in (*defaults.end_tokens, *defaults.eos)]
    return frozenset(token_id for token_id in ids if token_id is not None)


def _ends(
    request: GenerationRequest, defaults: GenerationDefaults, prompts: PromptRenderer, base_ids: frozenset[int]
) -> tuple[tuple[str, ...], frozenset[int]]:
    """Stop strings and end tokens of a request; with ``ignore_eos`` only those that it names itself."""
    if request.ignore_eos:
        defaults, base_ids = replace(defaults, stop=(), end_tokens=(), eos=()), frozenset()
    stop = stop_strings(request, defaults)
    return stop, base_ids | end_ids(defaults, stop, prompts) | frozenset(request.stop_token_ids or ())


def check_token_ids(request: GenerationRequest, vocab_size: int) -> None:
    """Raises ``InvalidRequest`` if a request names a token id that the base does not have."""
    biased = [token for token, _ in request.logit_bias or ()]
    for param, token_ids in (("logit_bias", biased), ("stop_token_ids", request.stop_token_ids or ())):
        unknown = [token for token in token_ids if token >= vocab_size]
        if unknown:
            raise InvalidRequest(
                f"Invalid '{param}': token ids should be below {vocab_size}, and {unknown[0]} is not.", param=param
            )


def completion_length(
    prompt_tokens: int, *, asked: int | None, default: int, limit: int, param: str = "messages"
) -> int:
    """Maximum tokens of a completion, cut to the room behind the prompt.

    Raises ``ContextLengthExceeded`` if the prompt leaves room for none.
    """
    available = limit - prompt_tokens
    length = min(default if asked is None else asked, max(available, 1))
    if length > available:
        raise ContextLengthExceeded(limit=limit, prompt_tokens=prompt_tokens, completion_tokens=length, param=param)
    return length


def _first(asked: Number | None, default: Number | None, otherwise: Number) -> Number:
    return next(value for value in (asked, default, otherwise) if value is not None)
