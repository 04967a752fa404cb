"""Outermost middleware: request ids, limits on bodies, metrics of errors, and the response to bugs."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import Reply, http_reply, reply_to
from server.api.ignored_fields import IGNORED_HEADER, ignored_header
from server.api.request_ids import request_id_of
from server.errors import InvalidRequest
from server.metrics import Metrics

MAX_BODY_BYTES = 2 * 1024 * 1024

_log = logging.getLogger("quickchange.api")


class RequestMiddleware:
    """Pure ASGI middleware, which does not buffer responses."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request by its headers, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        exchange = _HttpExchange(request_id_of(headers), state, self._metrics, receive, send, self._max_body_bytes)
        state.update(request_id=exchange.request_id, arrived=time.perf_counter())
        if headers.get("x-stainless-retry-count", "0") != "0":
            self._metrics.client_retries.inc()
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal.response(scope)(scope, receive, exchange.send)
            return
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.started:
                raise
            _log.exception("request_id=%s failed", exchange.request_id)
            reply = reply_to(error, request_id=exchange.request_id)
            await reply.response(scope)(scope, receive, exchange.send)

    def _refusal(self, scope: Scope, headers: Headers) -> Reply | None:
        """The reply if the request is refused by its headers alone."""
        length = headers.get("content-length")
        is_chunked = "transfer-encoding" in headers
        if length is not None and is_chunked:  # a proxy may have seen another end of it (RFC 9112, 6.3)
            both = InvalidRequest("Send 'Content-Length' or 'Transfer-Encoding', not both.", code="invalid_framing")
            return replace(reply_to(both, request_id=scope["state"]["request_id"]), headers={"connection": "close"})
        if length is not None and length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            return http_reply(413)
        has_body = is_chunked or length not in (None, "", "0")
        if scope["method"] == "POST" and has_body and not _is_json(headers):
            return http_reply(415)
        return None


def _is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


class _HttpExchange:
    """``receive`` and ``send`` of one request."""

    def __init__(
        self,
        request_id: str,
        state: dict[str, Any],
        metrics: Metrics,
        receive: Receive,
        send: Send,
        max_body_bytes: int,
    ) -> None:
        self.request_id = request_id
        self.started = False
        self._state = state
        self._metrics = metrics
        self._receive = receive
        self._send = send
        self._bytes_left = max_body_bytes

    async def receive(self) -> Message:
        """Limit the size of the body, which may come without a content length."""
        message = await self._receive()
        self._bytes_left -= len(message.get("body", b""))
        if self._bytes_left < 0:
            raise HTTPException(413)
        return message

    async def send(self, message: Message) -> None:
        """Add the request id and the names of ignored fields, and count errors."""
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            if ignored := ignored_header(self._state):
                headers[IGNORED_HEADER] = ignored
            if message["status"] >= 400:
                self._metrics.http_errors.labels(str(message["status"])).inc()
        await self._send(message)
