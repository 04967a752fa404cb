"""Cross-origin requests of web pages: off, but for the origins that the operator allows.

https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.request_ids import request_id_of

ANY_ORIGIN = "*"
_METHODS = "GET, HEAD, POST, DELETE"
_MAX_AGE = "600"
_EXPOSED, _EXPOSED_PREFIX = frozenset({"x-request-id", "retry-after", "x-should-retry"}), "x-quickchange-"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_-]{1,64}( *, *[A-Za-z0-9_-]{1,64}){0,63}")


class CorsMiddleware:
    """Outermost, so that errors of all other middleware carry the headers too.

    Cookies are never allowed, as the API has none. A page may send any header: which ones an SDK sends changes with
    its version, and none but the key has power here.
    """

    def __init__(self, app: ASGIApp, *, origins: frozenset[str]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._origins:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        allowed = self._allowed_origin(headers.get("origin"))
        if allowed is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await Response(status_code=204, headers=_preflight(headers, allowed))(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(MutableHeaders(scope=message), allowed)
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _allowed_origin(self, origin: str | None) -> str | None:
        """The value of ``Access-Control-Allow-Origin``, if the request gets one."""
        if origin is None:
            return None
        if ANY_ORIGIN in self._origins:
            return ANY_ORIGIN
        return origin if origin.lower() in self._origins else None

    def _add_headers(self, headers: MutableHeaders, allowed: str | None) -> None:
        if ANY_ORIGIN not in self._origins:
            headers.add_vary_header("Origin")
        if allowed is not None:
            exposed = [name for name in headers if name in _EXPOSED or name.startswith(_EXPOSED_PREFIX)]
            headers["Access-Control-Allow-Origin"] = allowed
            headers["Access-Control-Expose-Headers"] = ", ".join(dict.fromkeys(exposed))


def _preflight(headers: Headers, allowed: str) -> Mapping[str, str]:
    answer = {
        "Access-Control-Allow-Origin": allowed,
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Max-Age": _MAX_AGE,
        "Vary": "Origin, Access-Control-Request-Headers",
        "x-request-id": request_id_of(headers),
    }
    requested = headers.get("access-control-request-headers", "")
    if _HEADER_NAMES.fullmatch(requested):
        answer["Access-Control-Allow-Headers"] = requested
    if headers.get("access-control-request-private-network") == "true":  # from a public page to this machine
        answer["Access-Control-Allow-Private-Network"] = "true"
    return answer
