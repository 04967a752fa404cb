"""The sockets that the server listens on."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from server.errors import SettingsError

_LOCALHOST = ("127.0.0.1", "::1")
"""Both, whatever the machine's resolver says: clients try ``::1`` first, and wait where nothing listens there."""
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""The errors of a machine without IPv6."""


@contextlib.contextmanager
def bound_sockets(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets for all addresses of a host, on one port, that do not listen yet; they are closed after the block.

    Raises ``SettingsError`` if the address is in use or not local.
    """
    with contextlib.ExitStack() as opened:
        try:
            sockets = _bind_all(host, port, opened)
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port"
            ) from None
        yield sockets


def _bind_all(host: str, port: int, opened: contextlib.ExitStack) -> list[socket.socket]:
    names = _LOCALHOST if host.lower() == "localhost" else (host,)
    found = [item for name in names for item in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in addresses:
        try:
            bound = opened.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            # With the protocol named, asyncio turns Nagle's algorithm off, which delays the body of an answer by 40 ms.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and len(addresses) > 1:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind((address[0], port, *address[2:]))
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            missing = error
            continue
        sockets.append(bound)
        port = bound.getsockname()[1]  # port 0: the others take the one that the first got
    if not sockets and missing is not None:
        raise missing
    return sockets
