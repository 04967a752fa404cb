"""A request whose sequences are in the engine: their outputs, as text, by one queue, until it is closed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from server.adapters.adapter_cache import Lease
from server.api.protocol import GenerationRequest
from server.engine.async_engine import SubmittedSequence
from server.metrics import BASE, Metrics
from server.sequence import FinishReason, StepOutput
from server.text.detokenizer import Detokenizer, TextPiece, TokenStart

_log = logging.getLogger("quickchange.request")


@dataclass(frozen=True)
class TextDelta:
    """What a step added to a choice: text that may be shown, the tokens it is made of, the end."""

    index: int
    text: str = ""
    tokens: tuple[TokenStart, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: each prompt once, however many answers it has.

    ``cached_tokens`` are those of the prompts that no answer's sequence had to compute.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def as_json(self) -> dict[str, object]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(eq=False)
class Choice:
    """One answer: its sequence, and how far its text is. Times are of ``time.perf_counter``."""

    index: int
    sequence: SubmittedSequence
    detokenizer: Detokenizer
    eos_ids: frozenset[int]
    num_tokens: int = 0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    finish_reason: FinishReason | None = None

    def take(self, output: StepOutput) -> TextDelta:
        """The step's output as text. A stop string ends the sequence, whatever the engine goes on to say."""
        piece, rest = TextPiece(""), TextPiece("")
        if output.token is not None:
            self._count_token()
            is_eos = output.finish_reason is FinishReason.STOP and output.token.id in self.eos_ids
            if not is_eos:
                piece = self.detokenizer.push(output.token)
        if output.finish_reason is not None:
            rest = self.detokenizer.finish()
        self.finish_reason = FinishReason.STOP if self.detokenizer.stopped else output.finish_reason
        if self.finish_reason is not None:
            self.sequence.close()
        return TextDelta(self.index, piece.text + rest.text, piece.tokens + rest.tokens, self.finish_reason)

    def _count_token(self) -> None:
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.num_tokens += 1


@dataclass(frozen=True)
class RequestLog:
    """What is told of a request when it has ended: metrics, and one line in the log."""

    metrics: Metrics
    request_id: str
    arrived: float

    def write(self, lease: Lease | None, choices: Sequence[Choice], usage: Usage, *, unfinished: str) -> None:
        """Count the request, and write its line; ``unfinished`` is the reason of choices that did not end."""
        reasons = [unfinished if choice.finish_reason is None else choice.finish_reason.value for choice in choices]
        duration = time.perf_counter() - self.arrived
        first_tokens = [choice.first_token_at - self.arrived for choice in choices if choice.num_tokens]
        first_token = min(first_tokens, default=None)
        self._count(BASE if lease is None else lease.metrics_label, reasons, usage)
        self._observe_times(choices, duration, first_token)
        _log.info(
            "request_id=%s adapter=%s finish=%s prompt_tokens=%d cached_tokens=%d completion_tokens=%d "
            "first_token_ms=%s duration_ms=%.0f",
            self.request_id,
            BASE if lease is None else lease.label,
            ",".join(reasons),
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            "-" if first_token is None else f"{first_token * 1000:.0f}",
            duration * 1000,
        )

    def _count(self, label: str, reasons: Sequence[str], usage: Usage) -> None:
        for reason in reasons:
            self.metrics.requests.labels(label, reason).inc()
        self.metrics.prompt_tokens.labels(label).inc(usage.prompt_tokens)
        self.metrics.cached_tokens.labels(label).inc(usage.cached_tokens)
        self.metrics.generated_tokens.labels(label).inc(usage.completion_tokens)

    def _observe_times(self, choices: Sequence[Choice], duration: float, first_token: float | None) -> None:
        self.metrics.request_duration.observe(duration)
        if first_token is not None:
            self.metrics.time_to_first_token.observe(first_token)
        for choice in choices:
            if choice.num_tokens > 1:
                mean = (choice.last_token_at - choice.first_token_at) / (choice.num_tokens - 1)
                self.metrics.time_per_output_token.observe(mean)


_Output = tuple[int, StepOutput]


@dataclass(eq=False)
class ActiveRequest:
    """``choices`` are its answers; ``close`` ends those that are alive, releases the lease, and writes the log."""

    body: GenerationRequest
    lease: Lease | None
    log: RequestLog
    num_prompt_tokens: int
    choices: list[Choice] = field(default_factory=list)
    _outputs: asyncio.Queue[tuple[int, StepOutput | Exception]] = field(default_factory=asyncio.Queue)
    _first: _Output | None = None
    _unfinished: str = "cancelled"
    _closed: bool = False

    def sink(self, index: int) -> Callable[[StepOutput | Exception], None]:
        """Where the engine puts the outputs of choice ``index``."""
        return lambda output: self._outputs.put_nowait((index, output))

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        cached = [choice.sequence.num_cached for choice in self.choices]
        n = self.body.n
        num_cached = sum(min(cached[first : first + n]) for first in range(0, len(cached), n))
        return Usage(self.num_prompt_tokens, sum(choice.num_tokens for choice in self.choices), num_cached)

    async def wait_for_first_output(self, timeout: float) -> None:
        """Wait for it ``timeout`` seconds at most. Raises what is wrong by then, as ``deltas`` does."""
        self._first = await self._next(timeout)

    async def deltas(self, *, timeout: float | None = None) -> AsyncIterator[TextDelta | None]:
        """What is added to the choices, as it comes; None whenever nothing came for ``timeout`` seconds.

        Raises ``GenerationFailed`` or ``EngineUnavailable``, which end the request as a whole.
        """
        while any(choice.finish_reason is None for choice in self.choices):
            item = await self._next(timeout)
            if item is None:
                yield None
                continue
            index, output = item
            if self.choices[index].finish_reason is None:
                yield self.choices[index].take(output)

    async def _next(self, timeout: float | None) -> _Output | None:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            async with asyncio.timeout(timeout):
                index, output = await self._outputs.get()
        except TimeoutError:
            return None
        if isinstance(output, Exception):
            self._unfinished = "failed"
            raise output
        return index, output

    def close(self) -> None:
        """Give everything back. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        for choice in self.choices:
            choice.sequence.close()
        if self.lease is not None:
            self.lease.release()
        self.log.write(self.lease, self.choices, self.usage, unfinished=self._unfinished)
