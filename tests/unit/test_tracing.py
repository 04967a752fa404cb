"""Trace spans of requests, by OpenTelemetry's SDK and by OTLP to a collector; no span has content."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from queue import Queue
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.api.app import create_app
from server.api.otel_spans import OtelTracer, OutageExporter
from server.api.tracing import otlp_tracer
from tests.fakes import BASE, FakeEngine, Script, adapter, ask, server_state

CANARY = "canary-f3a9"
CHAT = {"messages": [{"role": "user", "content": f"hello {CANARY}"}]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans(*requests: tuple[str, dict[str, Any]], scripts: list[Script] | None = None) -> list[ReadableSpan]:
    """The spans of requests to a server over a fake engine."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    state = server_state(
        FakeEngine(scripts or [Script("the cat")]), adapter("poet"), tracer=OtelTracer(provider, base=BASE, version="1")
    )
    app = create_app(state)
    for path, body in requests:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "id-1"}
        ask(app, "POST", path, json=body, headers=headers)
    return list(exporter.get_finished_spans())


def test_a_span_has_the_names_and_numbers_of_its_request() -> None:
    (span,) = spans(("/v1/chat/completions", {**CHAT, "model": "poet"}))
    attributes = dict(span.attributes or {})
    assert span.name == "chat poet@poet-version"
    assert span.kind is SpanKind.SERVER
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "poet@poet-version"
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["http.request.header.x-request-id"] == "id-1"
    tokens = [attributes[f"gen_ai.usage.{kind}_tokens"] for kind in ("input", "output")]
    assert all(isinstance(number, int) and number > 0 for number in tokens)
    assert span.start_time is not None and span.end_time is not None
    (first,) = span.events
    assert span.start_time <= first.timestamp <= span.end_time


def test_a_span_belongs_to_the_trace_of_the_client() -> None:
    (span,) = spans(("/v1/completions", {"model": BASE, "prompt": "hello", "max_tokens": 4}))
    assert span.name == f"text_completion {BASE}"
    assert span.parent is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_request_is_an_error_span(stream: bool) -> None:
    (span,) = spans(("/v1/chat/completions", {**CHAT, "model": BASE, "stream": stream}), scripts=[Script(then="fail")])
    assert span.status.status_code is StatusCode.ERROR
    assert dict(span.attributes or {})["error.type"] == "generation_failed"


def test_no_span_has_text_of_the_request_or_the_answer() -> None:
    bodies = [{**CHAT, "model": "poet"}, {**CHAT, "model": "poet", "stop": [CANARY], "user": CANARY}]
    for span in spans(*(("/v1/chat/completions", body) for body in bodies), scripts=[Script(f"an answer {CANARY}")]):
        assert CANARY not in span.to_json()


@pytest.fixture
def collector() -> Iterator[tuple[str, Queue[ExportTraceServiceRequest]]]:
    """An OTLP collector: its URL, and what it was sent."""
    received: Queue[ExportTraceServiceRequest] = Queue()

    class Handler(BaseHTTPRequestHandler):
        """Takes ``POST /v1/traces``."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportTraceServiceRequest()
            request.ParseFromString(body)
            received.put(request)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()
    thread.join()


def test_spans_reach_a_collector_by_otlp(collector: tuple[str, Queue[ExportTraceServiceRequest]]) -> None:
    url, received = collector
    tracer = otlp_tracer(url, base=BASE, version="1.2.3")
    state = server_state(FakeEngine([Script("the cat")]), tracer=tracer)
    ask(create_app(state), "POST", "/v1/chat/completions", json={**CHAT, "model": BASE})
    asyncio.run(asyncio.to_thread(tracer.close))
    (resource,) = received.get(timeout=10).resource_spans
    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert (names["service.name"], names["service.version"]) == ("quickchange", "1.2.3")
    (scope,) = resource.scope_spans
    assert [span.name for span in scope.spans] == [f"chat {BASE}"]


def test_a_collector_that_is_gone_is_one_line_and_its_return_another(caplog: pytest.LogCaptureFixture) -> None:
    class Exporter(InMemorySpanExporter):
        """Takes spans while ``works``."""

        works = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.SUCCESS if self.works else SpanExportResult.FAILURE

    inner = Exporter()
    exporter = OutageExporter(inner, "http://collector:4318")
    with caplog.at_level("INFO", logger="quickchange"):
        for works in (False, False, True, True):
            inner.works = works
            exporter.export([])
    lost, back = [record.getMessage() for record in caplog.records]
    assert "cannot be sent to http://collector:4318" in lost
    assert "again" in back
