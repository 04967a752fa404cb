"""What a setting asks of the machine, and what there is."""

from __future__ import annotations

import pytest
import torch

from server.errors import SettingsError
from server.model.device import BF16_FROM_BYTES, choose_device, choose_dtype, choose_kv_dtype


def test_a_device_that_is_not_there_is_refused_and_auto_takes_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(SettingsError, match="device is 'cuda', but this machine has none"):
        choose_device("cuda")


@pytest.mark.parametrize(("allowed", "expected"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_bfloat16_is_chosen_where_torch_may_multiply_it(
    allowed: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ATEN_CPU_CAPABILITY=avx2`` forbids AVX-512, which the CPU still reports."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: allowed)
    assert choose_kv_dtype(torch.float32) == expected
    assert choose_dtype("auto", torch.device("cpu"), BF16_FROM_BYTES) == expected
