"""The tier that needs real tools: what is missing fails the test that needs it, by name. Nothing is skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serving import ROOT, ServerProcess, running_server


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """The path of a program, by its name."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.fail(f"{name} is not installed, and this test needs it (CONTRIBUTING.md says where it is from)")
        return path

    return find


@pytest.fixture(scope="session")
def books() -> Path:
    """The folder of plain-text books that ``QUICKCHANGE_TEST_DATA`` names."""
    folder = os.environ.get("QUICKCHANGE_TEST_DATA")
    if not folder or not any(Path(folder).glob("*.txt")):
        pytest.fail(f"QUICKCHANGE_TEST_DATA is {folder!r}: it must name a folder of plain-text books, *.txt")
    return Path(folder)


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """The embedded base with the repository's adapters."""
    with running_server("--adapters-dir", str(ROOT / "adapters")) as running:
        yield running
