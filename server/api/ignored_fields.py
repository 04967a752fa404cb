"""Names the fields of a body that had no effect: in a response header, or with ``--strict-fields`` in an error."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

from fastapi import Request

from server.api.limits.bodies import by_size, raw_body
from server.api.protocol.model import Location, RequestModel, fields_without_effect
from server.api.state import ServerState
from server.api.validation import param_path
from server.errors import InvalidRequest

IGNORED_HEADER = "x-quickchange-ignored"
MAX_NAMES = 20
_NAME = re.compile(r"[A-Za-z0-9_.]{1,100}")


class IgnoredFields(NamedTuple):
    """Fields without effect: how many, and the first of their names, of those that a header can have."""

    number: int
    names: list[str]

    @classmethod
    def of(cls, locations: Iterable[Location]) -> Self:
        number, names = 0, dict[str, None]()
        for location in locations:
            number += 1
            name = ".".join(step for step in location if isinstance(step, str))
            if len(names) < MAX_NAMES and _NAME.fullmatch(name):
                names[name] = None
        return cls(number, list(names))


async def note_ignored_fields(body: RequestModel, http: Request, state: ServerState) -> None:
    """Count the fields of the request without effect, and name them in the response.

    Raises ``InvalidRequest`` for an unknown one if the server is strict.
    """
    raw = await raw_body(http)
    if state.strict_fields:
        await by_size(http, _refuse_unknown, raw, body)
    note_ignored(await by_size(http, _ignored, raw, body), http, state)


def note_ignored(ignored: IgnoredFields, http: Request, state: ServerState) -> None:
    """Count fields without effect, and name them in the response."""
    state.metrics.ignored_fields.inc(ignored.number)
    names: dict[str, None] = http.scope["state"].setdefault("ignored_fields", {})
    for name in ignored.names[: MAX_NAMES - len(names)]:
        names[name] = None


def ignored_header(request_state: dict[str, Any]) -> str:
    """The value of the header; empty where every field had an effect."""
    return ", ".join(request_state.get("ignored_fields", ()))


def _ignored(raw: object, body: RequestModel) -> IgnoredFields:
    return IgnoredFields.of(fields_without_effect(raw, body, known=True))


def _refuse_unknown(raw: object, body: RequestModel) -> None:
    for location in fields_without_effect(raw, body, known=False):
        param = param_path(("body", *location))
        raise InvalidRequest(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
