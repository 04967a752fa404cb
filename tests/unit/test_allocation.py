"""How the process keeps its memory. What it gains is measured, in docs/performance.md."""

from __future__ import annotations

import os

import pytest

from server.cli.allocation import keep_freed_memory


def test_what_the_operator_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    keep_freed_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


def test_a_c_library_without_these_settings_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    keep_freed_memory()
