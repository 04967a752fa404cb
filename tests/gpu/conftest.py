"""The tier that needs a GPU: without one every test fails, by name. Nothing is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.model.device_cases import Micro, loaded


@pytest.fixture(scope="session", autouse=True)
def _device() -> None:
    if not torch.cuda.is_available():
        pytest.fail(
            f"no CUDA device that torch {torch.__version__} can use: run make test-gpu on a machine that has one, with "
            "PYTHON=/path/to/an/interpreter whose torch is built for CUDA"
        )


@pytest.fixture(scope="session")
def cpu(_device: None) -> Iterator[Micro]:
    """The embedded base as the server has it on the CPU, in float32."""
    with loaded("cpu") as micro:
        yield micro


@pytest.fixture(scope="session")
def gpu(_device: None) -> Iterator[Micro]:
    """The same on the GPU."""
    with loaded("cuda") as micro:
        yield micro
