"""Lists in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def first(names: Sequence[str], separator: str = ", ") -> str:
    """The first three, and how many more."""
    shown = separator.join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
