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
from server.sequence import Batch, SamplingParams, Segment, Sequence
from tests.instruction_sets import PRODUCTS, needs
from tests.model.architectures import SERVED
from tests.model.families import build
from tests.model.harness import Ask, host, prompts
from tests.model.int8_bases import load_micro
from tests.tiny_models import build_tiny_base


def entries() -> set[str]:
    """Attention functions of this project in transformers' table, of models that are not garbage already."""
    gc.collect()
    return {name for name in AttentionInterface() if name.startswith("quickchange_")}


def load(folder: Path, quantization: str = "none") -> Base:
    return load_base(
        str(folder), name="tiny", device="cpu", dtype="float32", max_model_len=64, quantization=quantization
    )


def decode(runner: ModelRunner, num_steps: int = 4) -> None:
    for position in range(num_steps):
        sequence = Sequence(position, (5,) * 20, 20, SamplingParams())
        runner.run(Batch((Segment(sequence, 0, position, 1),)))


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_base_that_is_closed_frees_its_entry_and_its_keys_and_values(tmp_path: Path, quantization: str) -> None:
    """Once both lived as long as the process, for every base that was ever loaded in it.

    Those of an int8 base lived as long as its runner, whose layer graphs held them.
    """
    before = entries()
    base = load(build_tiny_base(tmp_path), quantization)
    assert entries() - before == {base.attention.name}
    runner = ModelRunner.of(base, num_slots=2)
    cache, pages = weakref.ref(runner.attention_backend.cache), weakref.ref(runner.attention_backend.cache._pages)
    decode(runner)
    base.close()
    assert entries() == before
    assert cache() is None and pages() is None
    assert runner.attention.backend is None
    base.close()


@needs(*PRODUCTS)
@pytest.mark.parametrize("is_replaced", [False, True])
def test_layer_graphs_and_their_arena_go_with_the_base_or_when_another_runner_comes(is_replaced: bool) -> None:
    """The 64 MiB of the arena lived as long as the runner."""
    base = load_micro("int8")
    runner = ModelRunner.of(base, num_slots=2)
    decode(runner)
    graphs = runner.graphs
    assert graphs is not None and graphs.num_replayed > 0
    memory, cache = weakref.ref(graphs._arena._memory), weakref.ref(runner.attention_backend.cache)
    other = ModelRunner.of(base, num_slots=2) if is_replaced else None
    if other is None:
        base.close()
    gc.collect()
    assert memory() is None and cache() is None and not graphs._graphs


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
