"""The id of a request, which every response has as ``x-request-id``."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id_of(headers: Headers) -> str:
    """The client's ``x-request-id`` if it is plain, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _PLAIN.fullmatch(given) else uuid.uuid4().hex
