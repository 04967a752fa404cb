"""What remains of a request that has ended: metrics, one log line, and a trace span. None of them has its content."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from server.api.auth.principal import ANONYMOUS_LABEL
from server.api.tracing import RequestTracer
from server.logs import Fields
from server.metrics import Metrics

_log = logging.getLogger("quickchange.request")


@dataclass(frozen=True)
class EndedChoice:
    """An answer: its finish label in metrics, tokens, and times (``time.perf_counter``).

    ``complete``: it ended by itself or by its length. ``loops``: it repeats itself to its end.
    """

    finish: str
    num_tokens: int
    first_token_at: float
    last_token_at: float
    complete: bool
    loops: bool


@dataclass(frozen=True)
class EndedRequest:
    """A request by its registered names and its numbers. ``adapter`` has the version, ``metrics_label`` does not."""

    adapter: str
    metrics_label: str
    choices: Sequence[EndedChoice]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @cached_property
    def finish_reasons(self) -> list[str]:
        return [choice.finish for choice in self.choices]

    def first_token_after(self, arrived: float) -> float | None:
        """Seconds to the first token of any answer; None without one."""
        times = [choice.first_token_at - arrived for choice in self.choices if choice.num_tokens]
        return min(times, default=None)


@dataclass(frozen=True)
class RequestLog:
    """Where a request is recorded. ``arrived`` is a time of ``time.perf_counter``.

    ``operation`` is the name in OpenTelemetry's conventions: ``chat``, ``text_completion`` or ``embeddings``.
    ``traceparent`` is the header of W3C's Trace Context, as the client sent it. ``key`` is the label of the API key.
    """

    metrics: Metrics
    request_id: str
    arrived: float
    operation: str = "chat"
    tracer: RequestTracer | None = None
    traceparent: str | None = None
    key: str = ANONYMOUS_LABEL

    def write(self, ended: EndedRequest) -> None:
        """Update the metrics, write the log line, and record the span."""
        duration = time.perf_counter() - self.arrived
        first_token = ended.first_token_after(self.arrived)
        self._count(ended)
        self._observe_times(ended, duration, first_token)
        _log.info(
            "%s",
            Fields(
                request_id=self.request_id,
                adapter=ended.adapter,
                finish=",".join(ended.finish_reasons),
                prompt_tokens=ended.prompt_tokens,
                cached_tokens=ended.cached_tokens,
                completion_tokens=ended.completion_tokens,
                first_token_ms=None if first_token is None else round(first_token * 1000),
                duration_ms=round(duration * 1000),
                key=self.key,
            ),
        )
        if self.tracer is not None:
            self.tracer.record(
                self.operation,
                model=ended.adapter,
                request_id=self.request_id,
                traceparent=self.traceparent,
                duration=duration,
                first_token=first_token,
                finish_reasons=ended.finish_reasons,
                input_tokens=ended.prompt_tokens,
                cached_tokens=ended.cached_tokens,
                output_tokens=ended.completion_tokens,
            )

    def _count(self, ended: EndedRequest) -> None:
        label, metrics = ended.metrics_label, self.metrics
        for choice in ended.choices:
            metrics.requests.labels(label, choice.finish).inc()
            if choice.complete:
                metrics.answer_tokens.labels(label).observe(choice.num_tokens)
            if choice.loops:
                metrics.repetitive_answers.labels(label).inc()
        metrics.prompt_tokens.labels(label).inc(ended.prompt_tokens)
        metrics.cached_tokens.labels(label).inc(ended.cached_tokens)
        metrics.generated_tokens.labels(label).inc(ended.completion_tokens)
        metrics.key_tokens.labels(self.key, "prompt").inc(ended.prompt_tokens)
        metrics.key_tokens.labels(self.key, "completion").inc(ended.completion_tokens)

    def _observe_times(self, ended: EndedRequest, duration: float, first_token: float | None) -> None:
        self.metrics.request_duration.observe(duration)
        if first_token is not None:
            self.metrics.time_to_first_token.observe(first_token)
        for choice in ended.choices:
            if choice.num_tokens > 1:
                mean = (choice.last_token_at - choice.first_token_at) / (choice.num_tokens - 1)
                self.metrics.time_per_output_token.observe(mean)
