"""``quickchange serve``: settings, folders and address are checked before torch is imported and the base is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from base_files.locate import base_on_disk
from server.cli.access import build_access
from server.cli.allocation import keep_freed_memory
from server.cli.command_line import parse_settings
from server.cli.folders import check_folders
from server.cli.listening import bound_sockets
from server.cli.reload import Reloader
from server.cli.tls import check_certificate


def main(arguments: Sequence[str]) -> int:
    """Serve until stopped. Raises ``StartError``."""
    settings = parse_settings("serve", arguments)
    base_on_disk(settings.base_model)
    check_folders(settings)
    check_certificate(settings)
    with bound_sockets(settings.host, settings.port) as sockets:
        access = build_access(settings, sockets)
        reloader = Reloader(settings, access)
        reloader.listen()
        keep_freed_memory()
        from server.cli.serve import run_server  # imports torch, which takes seconds

        return run_server(settings, sockets, access, reloader)
