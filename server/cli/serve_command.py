"""``quickchange serve``: what can be wrong with a start is told at once, before torch is imported and a base loaded."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from base_files.locate import base_on_disk
from server.cli.allocation import keep_freed_memory
from server.cli.command_line import parse_settings
from server.cli.folders import check_folders
from server.errors import SettingsError


def main(arguments: Sequence[str]) -> int:
    """Serve until stopped. Raises a ``StartError`` where that cannot be."""
    settings = parse_settings("serve", arguments)
    base_on_disk(settings.base_model)
    check_folders(settings)
    with bind(settings.host, settings.port) as bound:
        keep_freed_memory()
        from server.cli.serve import run_server  # torch, and seconds

        return run_server(settings, bound)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound, not listening yet. Raises ``SettingsError`` where the address is taken or not ours."""
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port"
        ) from None
    return bound
