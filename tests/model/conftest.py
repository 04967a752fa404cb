"""One thread: results of tests do not depend on the machine's cores, and small matrices are faster that way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

from tests.model import engines


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _engines_pass_their_integrity_check() -> Iterator[None]:
    engines.made.clear()
    yield
    for engine in engines.made:
        engine.scheduler.check_integrity()
