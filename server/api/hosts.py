"""The allow-list of host names, which keeps web pages out that make a name of theirs mean this server's address.

A page from ``evil.example`` whose name suddenly resolves to 127.0.0.1 (DNS rebinding) reads a local server as its own
origin. Its requests still have ``Host: evil.example``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.auth.routes import PROBES
from server.api.errors import reply_to
from server.errors import HostNotAllowed

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253}?)\.?(:[0-9]{1,5})?")


class HostMiddleware:
    """Refuses requests with a malformed ``Host``, or with one that is not in ``hosts``, where it is not None.

    Probes are answered under any name: they have no content, and Kubernetes asks by the address of a pod.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_allowed(scope):
            reply = reply_to(HostNotAllowed(), request_id=scope["state"]["request_id"])
            await reply.response(scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"host"]
        if not values:  # HTTP/1.0
            return self._hosts is None or scope["path"] in PROBES
        name = host_name(values[0].decode("latin-1"))
        if name is None or len(values) > 1:
            return False
        return self._hosts is None or name in self._hosts or scope["path"] in PROBES


def host_name(value: str) -> str | None:
    """The name in lower case of a ``Host`` header, without the port; None if it is malformed."""
    match = _HOST.fullmatch(value.lower())
    return None if match is None else match[1]


def allowed_hosts(configured: Iterable[str], bound: str, *, on_loopback: bool) -> frozenset[str] | None:
    """The host names that are answered; None for any, where the server is not on loopback and none is configured."""
    names = tuple(configured)
    if not names and not on_loopback:
        return None
    bound_name = f"[{bound}]" if ":" in bound else bound
    return frozenset(name.lower() for name in (*LOOPBACK_NAMES, bound_name, *names))
