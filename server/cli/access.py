"""Who may send requests to the server: its keys, from the settings, and the addresses that it listens on."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from server.api.auth.access import Access
from server.api.auth.key_file import read_key_file
from server.api.auth.keys import ApiKey, KeyRing, admin_key, single_key
from server.api.cors import ANY_ORIGIN
from server.api.hosts import allowed_hosts, host_name
from server.errors import SettingsError
from server.settings import Settings

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


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
    hosts = allowed_hosts(_host_names(settings), settings.host, on_loopback=on_loopback)
    return Access(keys, on_loopback=on_loopback, hosts=hosts, origins=_origins(settings, keys))


def _host_names(settings: Settings) -> list[str]:
    """Raises ``SettingsError`` for what cannot be the name in a ``Host`` header."""
    for name in settings.allowed_host or ():
        if host_name(name) != name.lower():
            raise SettingsError(f"--allowed-host {name!r:.100} is no host name: write it without scheme and port")
    return [name.lower() for name in settings.allowed_host or ()]


def _origins(settings: Settings, keys: KeyRing) -> frozenset[str]:
    """Raises ``SettingsError`` for what is no origin, and for any origin where no key is needed."""
    origins = settings.allow_origin or ()
    if ANY_ORIGIN in origins and keys.is_open and not settings.allow_unauthenticated:
        raise SettingsError(
            "--allow-origin '*' lets every web page that you visit use this server, and no API key is set: name the "
            "origins, or set QUICKCHANGE_API_KEY or --api-keys, or let every page in with --allow-unauthenticated"
        )
    return frozenset(_origin(origin) for origin in origins)


def _origin(text: str) -> str:
    """An origin as browsers write it: in lower case, without the default port of its scheme."""
    match = _ORIGIN.fullmatch(text.lower())
    if text != ANY_ORIGIN and match is None:
        raise SettingsError(
            f"--allow-origin {text!r:.100} is no origin: write SCHEME://HOST or SCHEME://HOST:PORT, without a path"
        )
    if match is None:
        return text
    scheme, host, port = match.groups()
    return f"{scheme}://{host}{'' if port == _DEFAULT_PORTS.get(scheme) else port or ''}"


def read_keys(settings: Settings) -> KeyRing:
    """All keys; the server is open if there are none, or an admin key alone. Raises ``SettingsError``.

    A key that is set twice is the admin key, else that of the file: ``api_key`` lifts no limit of the file.
    """
    keys: list[ApiKey] = []
    if settings.admin_key is not None:
        keys.append(admin_key(settings.admin_key.get_secret_value()))
    if settings.api_keys is not None:
        try:
            keys += read_key_file(settings.api_keys)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SettingsError(f"the key file {settings.api_keys} cannot be used: {reason}") from None
    if settings.api_key is not None:
        keys.append(single_key(settings.api_key.get_secret_value()))
    is_open = settings.api_keys is None and settings.api_key is None
    return KeyRing(tuple(keys), is_open=is_open)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
