"""Why llguidance refuses a grammar, in the server's own words: its messages quote the request."""

from __future__ import annotations

import re

_REASONS = (
    ("oneOf", "options of 'oneOf' that may match the same document are not supported: use 'anyOf'"),
    ("not disjoint", "keys that match several of 'patternProperties' are not supported"),
    ("look-around", "look-around in a regular expression is not supported"),
    ("lookaround", "look-around and word boundaries in a regular expression are not supported"),
    ("Unable to determine if regex is empty", "the limits of a string in it are too complex together"),
    ("nsatisfiable", "no document can follow it"),
    ("NoExtension", "no document can follow it"),
    ("multipleOf", "this 'multipleOf' is not supported"),
    ("does not exist", "a '$ref' in it leads nowhere"),
    ("Unable to merge", "'allOf' of these schemas is not supported"),
    ("range", "limits of a number in it are not supported"),
    ("deeply nested", "it is nested too deeply"),
    ("recursion limit", "it is nested too deeply"),
    ("too large", "it is too large, written out"),
    ("too big", "it is too large, written out"),
    ("too many", "it is too large, written out"),
    ("TooComplex", "it is too complex"),
    ("fuel", "it is too complex"),
    ("unknown special token", "it names a special token that the model does not have"),
    ("unknown name", "it uses a rule that it does not define"),
    ("invalid regex", "a regular expression in it is not valid"),
    ("regex parse error", "a regular expression in it is not valid"),
)
_PLACE = re.compile(r"\A(?:ERROR: )?at (\d{1,7})\((\d{1,7})\)")


def reason_of(error: str, *, with_place: bool) -> str:
    """The reason behind a message of llguidance; ``with_place``: with the line and column of a grammar's text."""
    reason = next((words for sign, words in _REASONS if sign in error), "it is not valid, or not supported")
    place = _PLACE.match(error) if with_place else None
    return reason if place is None else f"{reason} (line {place[1]}, column {place[2]})"
