"""Lines for a person at a terminal, into which strangers' words may be woven."""

from __future__ import annotations

_LABEL_CHARS = 13


def say(text: str) -> None:
    """Print a line; control characters, which could move the cursor or colour what follows, are spelled out."""
    print("".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text))


def say_row(label: str, text: str) -> None:
    say(f"  {label:<{_LABEL_CHARS}}{text}")
