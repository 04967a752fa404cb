"""Checks of the server's internal state. Unlike ``assert``, they run under ``python -O`` as well."""

from __future__ import annotations


class IntegrityError(Exception):
    """Inconsistent internal state. It is a bug of the server, so it is not in the tree of ``errors``."""


def ensure(condition: bool, problem: str) -> None:
    """Raise ``IntegrityError`` with the problem unless the condition holds."""
    if not condition:
        raise IntegrityError(problem)
