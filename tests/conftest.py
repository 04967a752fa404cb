"""For every test: no network, no setting from the developer's own environment, and no thread that spins."""

from __future__ import annotations

import os

import pytest

# Read when huggingface_hub is first imported, so before any fixture: a test that would download fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when torch is first imported. Threads that wait for each other spin by default, and where another process has
# their core, two small threads are a hundred times slower than one.
os.environ["OMP_WAIT_POLICY"] = "passive"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("QUICKCHANGE_") and name != "QUICKCHANGE_TEST_DATA":
            monkeypatch.delenv(name)
