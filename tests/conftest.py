"""For every test: no network, no setting from the developer's own environment, and no thread that spins."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

from cpu_kernels.tiers import VARIABLE, TierRefused, use_tier
from tests.instruction_sets import Selection

# Read when huggingface_hub is first imported, so before any fixture: a test that would download fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when torch is first imported. Threads that wait for each other spin by default, and where another process has
# their core, two small threads are a hundred times slower than one.
os.environ["OMP_WAIT_POLICY"] = "passive"
# Also before torch: make test CPU=avx2 keeps every process of the run to this instruction set.
try:
    use_tier(os.environ.get(VARIABLE))
except TierRefused as refused:
    raise pytest.UsageError(str(refused)) from None

_TOLD = pytest.StashKey[str | None]()
"""The line on instruction sets; with pytest-xdist it comes from a worker, as only those collect tests."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need what this CPU lacks."""
    selection = Selection(items)
    config.stash[_TOLD] = selection.told()
    items[:] = selection.kept
    if selection.dropped:
        config.hook.pytest_deselected(items=selection.dropped)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, None, None]:
    """Name at the end the instruction sets that were tested, and those that need another CPU."""
    yield
    if line := config.stash.get(_TOLD, None):
        terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker's line goes to the process that prints."""
    output: dict[str, object] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["instruction_sets"] = session.config.stash.get(_TOLD, None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take a worker's line."""
    node.config.stash[_TOLD] = getattr(node, "workeroutput", {}).get("instruction_sets")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("QUICKCHANGE_") and name not in ("QUICKCHANGE_TEST_DATA", VARIABLE):
            monkeypatch.delenv(name)
