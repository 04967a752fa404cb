"""One thread: results of tests do not depend on the machine's cores, and small matrices are faster that way."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import transformers

from server.model.fused_ops import RotaryEmbedding
from tests.model import engines


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _rotations_are_put_back() -> Iterator[None]:
    """Hosting a model replaces the rotation in transformers' code; with a routine it has no gradients, for a trainer's.

    A test of the trainer failed after those of some modules here.
    """
    yield
    for name, module in list(sys.modules.items()):
        rotation = vars(module).get("apply_rotary_pos_emb") if name.startswith("transformers.models.") else None
        if isinstance(rotation, RotaryEmbedding):
            vars(module)["apply_rotary_pos_emb"] = rotation.stock


@pytest.fixture(autouse=True)
def _books_of_engines_are_right() -> Iterator[None]:
    engines.made.clear()
    yield
    for engine in engines.made:
        engine.scheduler.check_integrity()
