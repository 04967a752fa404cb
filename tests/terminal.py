"""A stream that says it is a terminal."""

from __future__ import annotations

import io


class Terminal(io.StringIO):
    """Input typed by hand, or output that a person watches."""

    def isatty(self) -> bool:
        return True
