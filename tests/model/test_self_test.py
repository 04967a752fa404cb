"""Operations in C are tried at start, and one that is wrong on this machine is torch's."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from cpu_kernels import native_kernel, self_test
from cpu_kernels.kernels import Kernels
from cpu_kernels.native_ops import NativeOps
from cpu_kernels.self_test import agrees, numbers
from cpu_kernels.torch_ops import TorchOps


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    agrees.cache_clear()
    yield
    agrees.cache_clear()


def test_every_operation_in_c_has_a_case_and_agrees_with_torch(caplog: pytest.LogCaptureFixture) -> None:
    assert {name: agrees(name) for name in NativeOps.KERNELS} == dict.fromkeys(NativeOps.KERNELS, True)
    assert set(self_test.CASES) == set(NativeOps.KERNELS) and caplog.records == []


def test_an_operation_that_is_wrong_here_is_torchs_and_the_log_names_it_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = NativeOps.silu_and_mul
    monkeypatch.setattr(NativeOps, "silu_and_mul", lambda self, gate, up: 1.001 * right(self, gate, up))
    for _ in range(2):
        kernels = Kernels(native=True, jit=False).ready()
        assert isinstance(getattr(kernels.silu_and_mul, "__self__", None), TorchOps)
        assert isinstance(getattr(kernels.gelu_and_mul, "__self__", None), NativeOps)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "kernel in C for silu_and_mul differs from PyTorch's by" in record.getMessage()
    assert "PyTorch's operation is used" in record.getMessage()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_operations_on_the_librarys_own_threads_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    """As on macOS, where torch's OpenMP library cannot be joined."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    gate, up = numbers(512, 300), numbers(512, 300, phase=1.0)
    expected = NativeOps(native_kernel.Launcher()).silu_and_mul(gate, up)
    monkeypatch.setattr(native_kernel, "openmp", lambda: None)
    own = NativeOps(native_kernel.Launcher())
    for _ in range(20):
        assert torch.equal(own.silu_and_mul(gate, up), expected)
