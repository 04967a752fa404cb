"""uvicorn's HTTP protocol, whose reply to what is no HTTP is an error of the contract with a request id."""

from __future__ import annotations

import json
import logging
import uuid

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.errors import error_body

_log = logging.getLogger("quickchange.api")
MESSAGE = "The request is not valid HTTP, or its headers are too long."


class ContractH11Protocol(H11Protocol):
    """HTTP/1.1 by h11."""

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
