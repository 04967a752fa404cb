"""Who may send requests to the server: its keys, from the settings, and the addresses that it listens on."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from server.api.auth.key_file import read_key_file
from server.api.auth.keys import ApiKey, KeyRing, admin_key, single_key
from server.api.auth.middleware import Access
from server.errors import SettingsError
from server.settings import Settings


def build_access(settings: Settings, sockets: Sequence[socket.socket]) -> Access:
    """Raises ``SettingsError``, also if other machines could send requests and no key is needed."""
    keys = read_keys(settings)
    on_loopback = all(_is_loopback(each.getsockname()[0]) for each in sockets)
    if keys.is_open and not on_loopback and not settings.allow_unauthenticated:
        raise SettingsError(
            f"--host {settings.host} lets other machines send requests, and no API key is set: set QUICKCHANGE_API_KEY "
            "or --api-keys FILE (`quickchange keys new` makes keys), or listen on 127.0.0.1, or let everybody in with "
            "--allow-unauthenticated"
        )
    return Access(keys, on_loopback=on_loopback)


def read_keys(settings: Settings) -> KeyRing:
    """All keys; the server is open if there are none, or an admin key alone. Raises ``SettingsError``."""
    keys: list[ApiKey] = []
    if settings.api_keys is not None:
        try:
            keys += read_key_file(settings.api_keys)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SettingsError(f"the key file {settings.api_keys} cannot be used: {reason}") from None
    if settings.api_key is not None:
        keys.append(single_key(settings.api_key.get_secret_value()))
    is_open = settings.api_keys is None and settings.api_key is None
    if settings.admin_key is not None:
        keys.append(admin_key(settings.admin_key.get_secret_value()))
    return KeyRing(tuple(keys), is_open=is_open)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
