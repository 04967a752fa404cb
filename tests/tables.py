"""Tests over tables, of which ``make test`` runs one case of each kind and ``make test-full`` the others, too.

A case marked ``wide`` only widens a table: another family with an adapter that others proved, another size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

wide = pytest.mark.wide


def one_of_each(rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters: rows with a value that no row before has in its column as they are, the others ``wide``.

    So every value stands in one row at least that ``make test`` runs.
    """
    seen: set[tuple[int, Any]] = set()
    parameters = []
    for row in rows:
        values = set(enumerate(row))
        parameters.append(pytest.param(*row, marks=[wide] if values <= seen else []))
        seen |= values
    return parameters


def only(kept: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Parameters: the names in ``kept`` as they are, the others ``wide``."""
    kept, names = list(kept), list(names)
    assert set(kept) <= set(names), set(kept) - set(names)
    return [pytest.param(name, marks=[] if name in kept else [wide]) for name in names]
