"""A base that is closed, or gone, holds no memory for keys and values, and no place in transformers' table."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
from transformers import AttentionInterface

from server.errors import BaseModelRefused
from server.model import admission
from server.model.admission import admit
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from tests.model.architectures import SERVED
from tests.model.families import build
from tests.model.harness import Ask, host, prompts
from tests.tiny_models import build_tiny_base


def entries() -> set[str]:
    """Attention functions of this project in transformers' table, of models that are not garbage already."""
    gc.collect()
    return {name for name in AttentionInterface() if name.startswith("quickchange_")}


def load(folder: Path) -> Base:
    return load_base(str(folder), name="tiny", device="cpu", dtype="float32", max_model_len=64)


def test_a_base_that_is_closed_frees_its_entry_and_its_keys_and_values(tmp_path: Path) -> None:
    """Once both lived as long as the process, for every base that was ever loaded in it."""
    before = entries()
    base = load(build_tiny_base(tmp_path))
    assert entries() - before == {base.attention.name}
    runner = ModelRunner.of(base, num_slots=2)
    cache, pages = weakref.ref(runner.attention_backend.cache), weakref.ref(runner.attention_backend.cache._pages)
    base.close()
    assert entries() == before
    assert cache() is None and pages() is None
    assert runner.attention.backend is None
    base.close()


def test_a_model_that_is_gone_takes_its_entry_with_it() -> None:
    before = entries()
    hosted = host(build("llama"))
    hosted.run([Ask(prompts(5)[0], 2)])
    cache = weakref.ref(hosted._cache)
    assert len(entries() - before) == 1
    del hosted
    assert entries() == before and cache() is None


def test_the_test_of_architectures_leaves_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    before = entries()
    admit(SERVED["Llama"](), name="llama")
    assert entries() == before
    monkeypatch.setattr(admission, "TOLERANCE", -1.0)
    with pytest.raises(BaseModelRefused):
        admit(SERVED["Llama"](), name="llama")
    assert entries() == before
