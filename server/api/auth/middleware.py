"""The middleware that finds the principal of a request, and denies what it may not do before the body is read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.auth.access import Access
from server.api.auth.keys import KeyRing, without_keys
from server.api.auth.principal import NOBODY, AccessScope, Principal
from server.api.auth.routes import required_scope
from server.api.errors import reply_to
from server.errors import (
    AdminOff,
    ConcurrencyLimitExceeded,
    InsufficientPermissions,
    InvalidKey,
    QuickchangeError,
    RateLimitExceeded,
)
from server.metrics import Metrics


class AuthMiddleware:
    """Pure ASGI middleware: ``scope["state"]["principal"]`` is set for every request that goes on."""

    def __init__(self, app: ASGIApp, *, access: Access, metrics: Metrics) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics
        access.on_new_keys = self._show_keys
        self._show_keys(access.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:  # a WebSocket, which no route accepts
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = required_scope(scope["method"], scope["path"], on_loopback=self._access.on_loopback)
        credential = credential_of(scope["headers"])
        try:
            principal = self._authorize(credential, needed)
        except InvalidKey as error:
            await _refuse(await self._slowed(error, credential, scope), scope, receive, send)
            return
        except QuickchangeError as error:
            await _refuse(error, scope, receive, send)
            return
        scope["state"]["principal"] = principal
        if needed is None:
            await self._app(scope, receive, send)
        else:
            await self._answer_within_limits(principal, scope, receive, send)

    async def _answer_within_limits(self, principal: Principal, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self._access.limits
        try:
            limits.begin(principal)
        except (RateLimitExceeded, ConcurrencyLimitExceeded) as error:
            self._metrics.key_refusals.labels(principal.label, error.limit_name).inc()
            await _refuse(error, scope, receive, send)
            return
        self._metrics.key_requests.labels(principal.label).inc()
        try:
            await self._app(scope, receive, send)
        finally:
            limits.end(principal)

    def _show_keys(self, keys: KeyRing) -> None:
        self._metrics.set_keys({key.principal.label for key in keys.keys})

    async def _slowed(self, error: InvalidKey, credential: bytes | None, scope: Scope) -> QuickchangeError:
        """The error to answer with, after the delay for a wrong key. A request without a key does not wait."""
        if credential is None:
            return error
        client = scope.get("client")
        try:
            delay = self._access.wrong_keys.delay(client[0] if client else "")
        except QuickchangeError as refused:
            return refused
        if delay:
            await asyncio.sleep(delay)
        return error

    def _authorize(self, credential: bytes | None, needed: AccessScope | None) -> Principal:
        """The principal of an allowed request. Raises ``InvalidKey``, ``InsufficientPermissions``, ``AdminOff``."""
        keys = self._access.keys
        principal = None if credential is None else keys.find(credential)
        if principal is None and keys.is_open:
            return _anonymous(credential, needed, keys)
        if needed is None:
            return principal or NOBODY
        if principal is None:
            raise InvalidKey
        if not principal.allows(needed):
            raise InsufficientPermissions(needed)
        return principal


async def _refuse(error: QuickchangeError, scope: Scope, receive: Receive, send: Send) -> None:
    reply = reply_to(error, request_id=scope["state"]["request_id"])
    await reply.response(scope)(scope, receive, send)


def _anonymous(credential: bytes | None, needed: AccessScope | None, keys: KeyRing) -> Principal:
    principal = without_keys(credential)
    if needed is None or principal.allows(needed):
        return principal
    raise InvalidKey if keys.has_admin else AdminOff


def credential_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key of ``Authorization: Bearer KEY``, else that of Anthropic's ``x-api-key``.

    A header that is sent twice, or with another scheme, is a wrong key: the result has a line break, which no key has.
    """
    values: dict[bytes, list[bytes]] = {b"authorization": [], b"x-api-key": []}
    for name, value in headers:
        found = values.get(name.lower())
        if found is not None:
            found.append(value.strip())
    authorization, api_key = values.values()
    if len(authorization) > 1 or len(api_key) > 1:
        return b"\n".join([b"", *authorization, *api_key])
    if not authorization:
        return api_key[0] if api_key else None
    scheme, _, key = authorization[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b"\n" + authorization[0]
