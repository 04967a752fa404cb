"""What a setting asks of the machine, and what there is."""

from __future__ import annotations

import pytest
import torch

from server.errors import SettingsError
from server.model.device import choose_device


def test_a_device_that_is_not_there_is_refused_and_auto_takes_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(SettingsError, match="device is 'cuda', but this machine has none"):
        choose_device("cuda")
