"""The middleware that finds the principal of a request, and denies what it may not do before the body is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.auth.keys import KeyRing, without_keys
from server.api.auth.principal import NOBODY, AccessScope, Principal
from server.api.auth.routes import required_scope
from server.api.errors import reply_to
from server.errors import AdminOff, InsufficientPermissions, InvalidKey, QuickchangeError


@dataclass
class Access:
    """The keys in force, which a reload replaces, and whether the server listens on loopback only."""

    keys: KeyRing = field(default_factory=KeyRing)
    on_loopback: bool = True


class AuthMiddleware:
    """Pure ASGI middleware: ``scope["state"]["principal"]`` is set for every request that goes on."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket, which no route accepts
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            principal = self._authorize(scope)
        except QuickchangeError as error:
            reply = reply_to(error, request_id=scope["state"]["request_id"])
            await reply.response(scope)(scope, receive, send)
            return
        scope["state"]["principal"] = principal
        await self._app(scope, receive, send)

    def _authorize(self, scope: Scope) -> Principal:
        """The principal of an allowed request. Raises ``InvalidKey``, ``InsufficientPermissions``, ``AdminOff``."""
        keys = self._access.keys
        needed = required_scope(scope["method"], scope["path"], on_loopback=self._access.on_loopback)
        credential = credential_of(scope["headers"])
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


def _anonymous(credential: bytes | None, needed: AccessScope | None, keys: KeyRing) -> Principal:
    principal = without_keys(credential)
    if needed is None or principal.allows(needed):
        return principal
    raise InvalidKey if keys.has_admin else AdminOff


def credential_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key of ``Authorization: Bearer KEY``, else that of Anthropic's ``x-api-key``.

    A header that is sent twice, or with another scheme, is a wrong key: what was sent, which no key equals.
    """
    values: dict[bytes, list[bytes]] = {b"authorization": [], b"x-api-key": []}
    for name, value in headers:
        if name.lower() in values:
            values[name.lower()].append(value.strip())
    authorization, api_key = values.values()
    if len(authorization) > 1 or len(api_key) > 1:
        return b"\n".join([*authorization, *api_key])
    if not authorization:
        return api_key[0] if api_key else None
    scheme, _, key = authorization[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else authorization[0]
