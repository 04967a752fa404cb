"""Compressed request bodies: decompressed while they arrive, within the limit of bodies that are not compressed."""

from __future__ import annotations

import zlib

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import http_reply
from server.errors import InvalidRequest

CHUNK_BYTES = 64 * 1024
"""Most bytes that are decompressed at once."""
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
ACCEPTED = "gzip, deflate"


class EncodedBodyMiddleware:
    """Pure ASGI middleware; the application sees the body as it was before it was compressed."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = _encoding_of(scope)
        if encoding in ("identity", ""):
            await self._app(scope, receive, send)
        elif encoding in _WINDOW_BITS:
            hidden = (b"content-encoding", b"content-length")
            headers = [(name, value) for name, value in scope["headers"] if name not in hidden]
            body = _DecompressedBody(receive, encoding, self._max_body_bytes)
            await self._app({**scope, "headers": headers}, body.receive, send)
        else:
            reply = http_reply(415, {"accept-encoding": ACCEPTED}, "A compressed body must be gzip or deflate.")
            await reply.response(scope)(scope, receive, send)


def _encoding_of(scope: Scope) -> str:
    """``identity`` where the header is absent. It is looked up in every request, so without an object for it."""
    names = (value for name, value in scope.get("headers", ()) if name == b"content-encoding")
    return next(names, b"identity").decode("latin-1").strip().lower()


class _DecompressedBody:
    """``receive`` of a request with a compressed body."""

    def __init__(self, receive: Receive, encoding: str, max_bytes: int) -> None:
        self._receive = receive
        self._encoding = encoding
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._has_data = False
        self._decompressor = zlib.decompressobj(_WINDOW_BITS[encoding])
        self._is_last = False

    async def receive(self) -> Message:
        """Up to ``CHUNK_BYTES`` more of the body. Raises ``InvalidRequest``, and a 413."""
        data = self._decompressor.unconsumed_tail
        if not data and not self._is_last:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            data, self._is_last = message.get("body", b""), not message.get("more_body", False)
        elif not data:
            return await self._receive()
        self._has_data = self._has_data or bool(data)
        body = self._decompress(data)
        self._num_bytes += len(body)
        if self._num_bytes > self._max_bytes:
            raise HTTPException(413)
        has_more = bool(self._decompressor.unconsumed_tail) or not self._is_last
        if not has_more and self._has_data and not self._decompressor.eof:
            raise self._invalid("it ends early")
        return {"type": "http.request", "body": body, "more_body": has_more}

    def _decompress(self, data: bytes) -> bytes:
        try:
            body = self._decompressor.decompress(data, CHUNK_BYTES)
        except zlib.error:
            raise self._invalid("its data is damaged, or not compressed") from None
        if self._decompressor.unused_data:
            raise self._invalid("there is more behind its end")
        return body

    def _invalid(self, reason: str) -> InvalidRequest:
        message = f"The request body cannot be decompressed as {self._encoding}: {reason}."
        return InvalidRequest(message, code="invalid_encoding")
