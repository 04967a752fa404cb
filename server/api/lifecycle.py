"""Whether the server takes requests, and how many it is answering: what probes tell and a stopping server waits for."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.auth.routes import PROBES
from server.api.errors import reply_to
from server.errors import ShuttingDown

_STILL_SERVED = PROBES | {"/metrics", "/version"}


class Lifecycle:
    """``started``: the adapters are read; ``draining``: running requests end, new ones are refused.

    ``num_requests`` are requests without an answer or in the middle of it, ``num_begun`` all that ever came; probes do
    not count.
    """

    def __init__(self) -> None:
        self.started = False
        self.draining = False
        self.num_requests = 0
        self.num_begun = 0


class DrainMiddleware:
    """Counts requests, and refuses those that come while the server drains."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _STILL_SERVED:
            await self._app(scope, receive, send)
            return
        if self._lifecycle.draining:
            reply = reply_to(ShuttingDown(), request_id=scope["state"]["request_id"])
            reply.headers["Connection"] = "close"
            await reply.response(scope)(scope, receive, send)
            return
        self._lifecycle.num_requests += 1
        self._lifecycle.num_begun += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._lifecycle.num_requests -= 1
