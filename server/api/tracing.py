"""A trace span for each request, by OpenTelemetry's conventions for generative AI (semantic conventions 1.37).

A span is made when its request has ended, so tracing costs nothing while tokens are computed. It has names and
numbers, never the content of messages or answers. Needs the extra ``otel``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from server.errors import SettingsError

EXPORT_SECONDS = 3
"""Seconds for one export; at its end the server waits no longer for a collector that is not there."""


class RequestTracer(Protocol):
    """Records requests that have ended."""

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
        """A request that ends now; ``duration`` and ``first_token`` are seconds since it arrived."""

    def close(self) -> None:
        """Export what is buffered."""


def otlp_tracer(endpoint: str, *, base: str, version: str) -> RequestTracer:
    """A tracer that exports to an OpenTelemetry collector, by OTLP over HTTP in batches, in a thread of its own.

    ``endpoint`` is the collector's URL, such as ``http://localhost:4318``. Raises ``SettingsError`` without the extra.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from server.api.otel_spans import PROVIDER, OtelTracer, OutageExporter
    except ImportError as error:
        raise SettingsError(
            f"--otlp-endpoint needs OpenTelemetry, which is not installed ({error.name}): "
            "pip install 'quickchange[otel]'"
        ) from None
    resource = Resource.create({"service.name": PROVIDER, "service.version": version, "gen_ai.base_model": base})
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(OutageExporter(exporter, endpoint)))
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # several lines for each batch that is not taken
    return OtelTracer(provider, base=base, version=version)
