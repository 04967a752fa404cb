"""Calls of tools in APIs whose arguments are an object instead of JSON text."""

from __future__ import annotations

import json

from server.api.formats.wire import Json


def call_arguments(text: str) -> Json | None:
    """The arguments of a call; None for those of a call that was cut off, which is left out of a whole answer."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None
