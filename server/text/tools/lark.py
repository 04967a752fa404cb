"""Pieces of llguidance's variant of Lark, in which the grammars of calls are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NOTHING = '""'


def literal(text: str) -> str:
    """A text, to the letter."""
    return json.dumps(text, ensure_ascii=False)


def json_schema(schema: Mapping[str, Any]) -> str:
    """A JSON value of ``schema``."""
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


class Spelling:
    """Texts in which special tokens are written as such. ``token_id`` is None for a text that is no special token."""

    def __init__(self, token_id: Callable[[str], int | None], markers: Sequence[str]) -> None:
        ids = {marker: token_id(marker) for marker in markers}
        self._ids = {marker: number for marker, number in ids.items() if number is not None}

    def sequence(self, text: str) -> str:
        """The expression for ``text``; of the empty text, that for nothing."""
        parts = []
        while text:
            places = [(place, marker) for marker in self._ids if (place := text.find(marker)) >= 0]
            place, marker = min(places, default=(len(text), ""))
            if place:
                parts.append(literal(text[:place]))
            if marker:
                parts.append(f"<[{self._ids[marker]}]>")
            text = text[place + len(marker) :]
        return " ".join(parts) or NOTHING

    def is_token(self, text: str) -> bool:
        """Whether a text is one special token."""
        return text in self._ids
