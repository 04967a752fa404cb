"""One admitted request and its sequences: everything it holds is taken here, and given back in ``close``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from server.adapters.content.manners import AdapterDefaults
from server.adapters.leases import Lease
from server.api.protocol import GenerationRequest
from server.api.sampling import check_token_ids, completion_length, end_ids, overlay, sampling_params, stop_strings
from server.api.shapes import Json
from server.api.state import ServerState
from server.engine.async_engine import OutputStream
from server.errors import InvalidRequest
from server.metrics import BASE
from server.sequence import FinishReason, StepOutput
from server.text.detokenizer import Detokenizer
from server.text.prompt import PromptRenderer

Render = Callable[[AdapterDefaults], list[list[int]]]

_log = logging.getLogger("quickchange.request")


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer: text that may be shown, the end, or both."""

    index: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: each prompt once, however many answers it has.

    ``cached_tokens`` are those of the prompts that no answer's sequence had to compute.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def as_json(self) -> Json:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(eq=False)
class Choice:
    """One sequence on its way to the client. Times are of ``time.perf_counter``."""

    index: int
    stream: OutputStream
    detokenizer: Detokenizer
    eos_ids: frozenset[int]
    num_tokens: int = 0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    finish_reason: FinishReason | None = None

    def take(self, output: StepOutput) -> Delta:
        """The step's output as text. A stop string ends the sequence, whatever the engine goes on to say."""
        text = ""
        if output.token is not None:
            self._count_token()
            ended = output.finish_reason is FinishReason.STOP and output.token.id in self.eos_ids
            text = "" if ended else self.detokenizer.push(output.token).text
        if output.finish_reason is not None:
            text += self.detokenizer.finish().text
        self.finish_reason = FinishReason.STOP if self.detokenizer.stopped else output.finish_reason
        if self.finish_reason is not None:
            self.stream.close()
        return Delta(self.index, text, self.finish_reason)

    def _count_token(self) -> None:
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.num_tokens += 1


_Output = tuple[Choice, StepOutput]


@dataclass(eq=False)
class Generation:
    """A request from its admission to its last token.

    ``start`` leases the adapters and queues the sequences, ``deltas`` are what they say, ``close`` aborts those
    alive, releases the lease, and counts. ``render`` makes the prompts' ids; ``prompt_field`` is where they came from.
    ``scope`` is whose it is: only prefixes of the same scope are reused.
    """

    state: ServerState
    request: GenerationRequest
    render: Render
    prompt_field: str
    request_id: str
    scope: bytes = b""
    lease: Lease | None = None
    _choices: list[Choice] = field(default_factory=list)
    _pumps: list[asyncio.Task[None]] = field(default_factory=list)
    _outputs: asyncio.Queue[_Output | Exception] = field(default_factory=asyncio.Queue)
    _peeked: _Output | None = None
    _prompt_tokens: int = 0
    _unfinished: str = "cancelled"
    _closed: bool = False
    _arrived: float = field(default_factory=time.perf_counter)

    @property
    def num_choices(self) -> int:
        """Answers the client gets."""
        return self.request.num_prompts * self.request.n

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            self._prompt_tokens, sum(choice.num_tokens for choice in self._choices), sum(self._cached_tokens())
        )

    async def start(self, *, patience: float) -> None:
        """Admit the request, and wait ``patience`` seconds for its first token.

        Raises every error that is known by then, so that it can be answered with a status of its own.
        """
        check_token_ids(self.request, self.state.prompts.vocab_size)
        self.state.engine.check_capacity(self.num_choices)
        self.lease = await self._acquire()
        defaults = self._defaults()
        prompts, tokenizer = await asyncio.to_thread(self._rendered, defaults)
        self._submit(prompts, defaults, tokenizer)
        self._pumps = [asyncio.create_task(self._pump(choice)) for choice in self._choices]
        self._peeked = await self._next(patience)

    async def deltas(self, *, patience: float | None = None) -> AsyncIterator[Delta | None]:
        """What the sequences say, as it comes; None whenever nothing came for ``patience`` seconds.

        Raises ``GenerationFailed`` or ``EngineUnavailable``, which end the request as a whole.
        """
        while any(choice.finish_reason is None for choice in self._choices):
            output = await self._next(patience)
            if output is None:
                yield None
            elif output[0].finish_reason is None:
                yield output[0].take(output[1])

    def close(self) -> None:
        """Give everything back: sequences still alive are aborted. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        for pump in self._pumps:
            pump.cancel()
        for choice in self._choices:
            choice.stream.close()
        if self._pumps:
            self._record()
        if self.lease is not None:
            self.lease.release()

    def _defaults(self) -> AdapterDefaults:
        base = self.state.base_defaults
        return base if self.lease is None else overlay(self.lease.defaults, base)

    async def _acquire(self) -> Lease | None:
        request = self.request
        if request.model != self.state.base_name:
            return await self.state.adapters.acquire(request.model, user=request.user, scale=request.lora_scale)
        if request.lora_scale not in (None, 1.0):
            raise InvalidRequest(
                "Invalid 'lora_scale': the base has no adapter to scale; name one in 'model'.", param="lora_scale"
            )
        return None

    def _rendered(self, defaults: AdapterDefaults) -> tuple[list[list[int]], PromptRenderer]:
        """Prompts and the tokenizer of the answers, which may have to be made first: in a thread."""
        return self.render(defaults), self.state.prompts.of(defaults)

    def _submit(self, prompts: list[list[int]], defaults: AdapterDefaults, tokenizer: PromptRenderer) -> None:
        self._prompt_tokens = sum(map(len, prompts))
        lengths = [self._completion_length(len(prompt), defaults) for prompt in prompts]
        stop = stop_strings(self.request, defaults)
        eos_ids = self.state.eos_ids | end_ids(defaults, stop, tokenizer) | frozenset(self.request.stop_token_ids or ())
        for prompt, max_tokens in zip(prompts, lengths, strict=True):
            for index in range(self.request.n):
                stream = self.state.engine.submit(
                    prompt,
                    params=sampling_params(self.request, defaults, index=index),
                    max_tokens=max_tokens,
                    adapters=() if self.lease is None else self.lease.uses,
                    eos_ids=eos_ids,
                    scope=self.scope,
                )
                detokenizer = Detokenizer(tokenizer.decode, stop, min_tokens=self.request.min_tokens or 0)
                self._choices.append(Choice(len(self._choices), stream, detokenizer, eos_ids))

    def _completion_length(self, prompt_tokens: int, defaults: AdapterDefaults) -> int:
        return completion_length(
            prompt_tokens,
            asked=self.request.max_completion,
            default=defaults.max_tokens or self.state.default_max_tokens,
            limit=self.state.engine.max_model_len,
            param=self.prompt_field,
        )

    async def _pump(self, choice: Choice) -> None:
        try:
            async for output in choice.stream:
                self._outputs.put_nowait((choice, output))
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            self._outputs.put_nowait(error)

    async def _next(self, patience: float | None) -> _Output | None:
        """The next output of any sequence, or None if none came in time. Raises what broke a sequence off."""
        if self._peeked is not None:
            output, self._peeked = self._peeked, None
            return output
        try:
            async with asyncio.timeout(patience):
                item = await self._outputs.get()
        except TimeoutError:
            return None
        if isinstance(item, Exception):
            self._unfinished = "failed"
            raise item
        return item

    def _record(self) -> None:
        """Count the request, and write its line in the log."""
        metrics, label, usage = self.state.metrics, self._label, self.usage
        reasons = list(self._finish_reasons())
        for reason in reasons:
            metrics.requests.labels(label, reason).inc()
        metrics.prompt_tokens.labels(label).inc(usage.prompt_tokens)
        metrics.cached_tokens.labels(label).inc(usage.cached_tokens)
        metrics.generated_tokens.labels(label).inc(usage.completion_tokens)
        duration = time.perf_counter() - self._arrived
        metrics.request_duration.observe(duration)
        if (first := self._time_to_first_token()) is not None:
            metrics.time_to_first_token.observe(first)
        for choice in self._choices:
            if choice.num_tokens > 1:
                mean = (choice.last_token_at - choice.first_token_at) / (choice.num_tokens - 1)
                metrics.time_per_output_token.observe(mean)
        self._write_log_line(reasons, duration, first)

    def _write_log_line(self, reasons: list[str], duration: float, first: float | None) -> None:
        _log.info(
            "request_id=%s adapter=%s finish=%s prompt_tokens=%d cached_tokens=%d "
            "completion_tokens=%d "
            "first_token_ms=%s duration_ms=%.0f",
            self.request_id,
            BASE if self.lease is None else self.lease.label,
            ",".join(reasons),
            self.usage.prompt_tokens,
            self.usage.cached_tokens,
            self.usage.completion_tokens,
            "-" if first is None else f"{first * 1000:.0f}",
            duration * 1000,
        )

    @property
    def _label(self) -> str:
        return BASE if self.lease is None else self.lease.metrics_label

    def _finish_reasons(self) -> Iterator[str]:
        for choice in self._choices:
            yield self._unfinished if choice.finish_reason is None else choice.finish_reason.value

    def _cached_tokens(self) -> Iterator[int]:
        """For each prompt, whose answers stand side by side, the least that any of them found computed."""
        for first in range(0, len(self._choices), self.request.n):
            yield min(choice.stream.num_cached for choice in self._choices[first : first + self.request.n])

    def _time_to_first_token(self) -> float | None:
        times = [choice.first_token_at for choice in self._choices if choice.num_tokens]
        return min(times) - self._arrived if times else None
