"""For every test: no network, and no setting from the developer's own environment."""

from __future__ import annotations

import os

import pytest

# Read when huggingface_hub is first imported, so before any fixture: a test that would download fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("QUICKCHANGE_") and name != "QUICKCHANGE_TEST_DATA":
            monkeypatch.delenv(name)
