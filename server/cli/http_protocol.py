"""uvicorn's HTTP protocol with limits on connections, and errors of the contract for what is no HTTP.

uvicorn itself keeps a connection for ever whose client sends nothing, or the headers of a request byte by byte.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import time
import uuid
from functools import cache

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.errors import error_body

_log = logging.getLogger("quickchange.api")
HEADER_SECONDS = 20.0
"""Time from a connection, or from the first byte of a further request, to the end of the request's headers."""
WRITE_SECONDS = 120.0
"""Time in which a client that leaves an answer unread must read some of it."""
MOST_CONNECTIONS = 4096
BACKLOG = 256
"""Connections that are accepted at once, before the first of them is judged."""
_RESERVED_FILES = 2 * BACKLOG
"""Descriptors for anything but connections (adapters, models, logs), and for those that are about to be refused."""
_LOG_SECONDS = 10.0
_BODY = json.dumps(
    error_body("There are too many connections.", type="service_unavailable_error", code="server_overloaded")
)
_TOO_MANY = (
    "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\nconnection: close\r\n"
    f"content-length: {len(_BODY)}\r\n\r\n{_BODY}"
).encode()
MESSAGE = "The request is not valid HTTP, or its headers are too long."


@cache
def max_connections() -> int:
    """Connections at the same time, below the process's limit of open files, which is raised as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + _RESERVED_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(MOST_CONNECTIONS, soft - min(_RESERVED_FILES, soft // 2)))


class _RefusedConnections:
    """Logs connections above the limit, one line in ``_LOG_SECONDS``."""

    def __init__(self) -> None:
        self._number, self._logged = 0, -_LOG_SECONDS

    def count(self) -> None:
        self._number += 1
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            _log.warning("%d connections refused: %d are open, the most there may be", self._number, max_connections())
            self._number, self._logged = 0, now


_refused = _RefusedConnections()


class ContractH11Protocol(H11Protocol):
    """HTTP/1.1 by h11. A connection is closed unless the headers of a request arrive in ``HEADER_SECONDS``.

    It is cut if the client does not read for ``WRITE_SECONDS`` what it has asked for, which ends its generation.
    """

    _headers_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            _refused.count()
            transport.write(_TOO_MANY)
            transport.close()
            return
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if not self._awaits_headers:
            self._cancel_headers_timer()
        elif self._headers_timer is None:
            self._await_headers()

    def pause_writing(self) -> None:
        """The transport's buffer is full."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The transport's buffer is nearly empty."""
        self._cancel_write_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_headers_timer()
        self._cancel_write_timer()
        super().connection_lost(exc)

    @property
    def _awaits_headers(self) -> bool:
        """Whether a request must begin: none has, or the rest of the body of a refused one is still to come."""
        is_answered = self.cycle is not None and self.cycle.response_complete
        return self.conn.their_state is h11.IDLE or (is_answered and self.conn.their_state is h11.SEND_BODY)

    def _await_headers(self) -> None:
        self._headers_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _cancel_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Reply to a request that cannot be parsed, and close the connection; ``msg`` is uvicorn's and not shown."""
        request_id = uuid.uuid4().hex
        _log.info("request_id=%s is not valid HTTP", request_id)
        body = json.dumps(error_body(MESSAGE, type="invalid_request_error", code="invalid_http")).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("x-request-id", request_id),
            ("connection", "close"),
        ]
        start = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (start, h11.Data(body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
