"""For every test: no network, no setting from the developer's own environment, and no thread that spins."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from tests.instruction_sets import Selection

# Read when huggingface_hub is first imported, so before any fixture: a test that would download fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when torch is first imported. Threads that wait for each other spin by default, and where another process has
# their core, two small threads are a hundred times slower than one.
os.environ["OMP_WAIT_POLICY"] = "passive"

_SELECTION = pytest.StashKey[Selection[pytest.Item]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need what this CPU lacks."""
    selection = config.stash[_SELECTION] = Selection(items)
    items[:] = selection.kept
    if selection.dropped:
        config.hook.pytest_deselected(items=selection.dropped)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, None, None]:
    """Name at the end the instruction sets that were tested, and those that need another CPU."""
    yield
    selection = config.stash.get(_SELECTION, None)
    if selection is not None and (line := selection.told()):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("QUICKCHANGE_") and name != "QUICKCHANGE_TEST_DATA":
            monkeypatch.delenv(name)
