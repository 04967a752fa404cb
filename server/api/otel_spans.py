"""Spans by OpenTelemetry's SDK; imported only where tracing is on."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.metrics import BASE

_log = logging.getLogger("quickchange")
PROVIDER = "quickchange"
_SECOND = 1_000_000_000


class OtelTracer:
    """A ``RequestTracer`` over a tracer provider, which it shuts down at the end. ``base`` is the base's name."""

    def __init__(self, provider: TracerProvider, *, base: str, version: str) -> None:
        self._provider = provider
        self._base = base
        self._tracer = provider.get_tracer(PROVIDER, version)
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        operation: str,
        *,
        model: str,
        request_id: str,
        traceparent: str | None,
        duration: float,
        first_token: float | None,
        finish_reasons: Sequence[str],
        input_tokens: int,
        cached_tokens: int,
        output_tokens: int,
    ) -> None:
        model = self._base if model == BASE else model
        ended = time.time_ns()
        started = ended - int(duration * _SECOND)
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=self._propagator.extract({} if traceparent is None else {"traceparent": traceparent}),
            kind=SpanKind.SERVER,
            start_time=started,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": PROVIDER,
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                "gen_ai.response.finish_reasons": list(finish_reasons),
                "gen_ai.usage.input_tokens": input_tokens,
                "gen_ai.usage.cache_read.input_tokens": cached_tokens,
                "gen_ai.usage.output_tokens": output_tokens,
                "http.request.header.x-request-id": request_id,
            },
        )
        if first_token is not None:
            span.set_attribute("gen_ai.server.time_to_first_token", first_token)
            span.add_event("first_token", timestamp=started + int(first_token * _SECOND))
        if "failed" in finish_reasons:
            span.set_attribute("error.type", "generation_failed")
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended)

    def close(self) -> None:
        self._provider.shutdown()


class OutageExporter(SpanExporter):
    """An exporter that logs one line when spans cannot be sent, and one when they can again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter, self._endpoint = exporter, endpoint
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._fails:
            _log.warning("trace spans cannot be sent to %s and are dropped; requests are not affected", self._endpoint)
        if self._fails and not fails:
            _log.info("trace spans are sent to %s again", self._endpoint)
        self._fails = fails
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
