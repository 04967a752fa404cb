"""``quickchange serve``: settings, folders and address are checked before torch is imported and the base is loaded."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from base_files.locate import base_on_disk
from server.cli.allocation import keep_freed_memory
from server.cli.command_line import parse_settings
from server.cli.folders import check_folders
from server.errors import SettingsError


def main(arguments: Sequence[str]) -> int:
    """Serve until stopped. Raises ``StartError``."""
    settings = parse_settings("serve", arguments)
    base_on_disk(settings.base_model)
    check_folders(settings)
    with bind(settings.host, settings.port) as bound:
        keep_freed_memory()
        from server.cli.serve import run_server  # imports torch, which takes seconds

        return run_server(settings, bound)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises ``SettingsError`` if the address is in use or not local."""
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
