"""The engines that benchmarks drive do what they say; nothing is timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from base_files.source import FolderBase
from benchmarks import sampling
from benchmarks.parts.engines import Ask, InProcessEngine, Peft, Stock, in_process_engine
from benchmarks.parts.random_adapters import write_adapters
from benchmarks.parts.step_timers import Stack, timing
from benchmarks.random_base import SHAPES, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("tiny", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_adapters(FolderBase(base), tmp_path_factory.mktemp("adapters"), ["x", "y"], rank=2)


@pytest.fixture(scope="module")
def engine(base: Path, adapters: list[Path]) -> Iterator[InProcessEngine]:
    made = in_process_engine(str(base), adapters, dtype="float32", max_num_seqs=4, max_len=64)
    yield made
    made.close()


def test_a_random_base_has_a_token_for_every_row_of_its_embedding(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert len(tokenizer) == SHAPES["tiny"]["vocab_size"]
    assert tokenizer.decode(tokenizer("def test(self): return 1")["input_ids"]) == "def test(self): return 1"
    ends = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False)
    assert ends == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


def test_a_closed_loop_answers_all_in_full(engine: InProcessEngine) -> None:
    asks = [Ask((5, 6, 7), 4 + number, adapter) for number, adapter in enumerate([None, 0, 1, 0, 1])]
    _, tokens = engine.run_counted(asks, 2)
    assert tokens == sum(ask.num_tokens for ask in asks)
    assert engine.engine.idle


def test_holding_none_leaves_the_base_as_it_was(engine: InProcessEngine) -> None:
    kinds = {type(module).__module__.split(".")[0] for module in engine.base.model.modules()}
    assert "server" in kinds
    engine.hold(0)
    linears = [module for module in engine.base.model.modules() if type(module).__module__.startswith("server.lora")]
    assert linears == []
    engine.hold(2)
    assert engine.seconds_to_first_token(Ask((5, 6), 2, 1)) > 0


def test_timers_claim_every_kind_and_leave_nothing_behind(engine: InProcessEngine) -> None:
    engine.hold(2)
    stack = Stack()
    with timing(engine, stack):
        engine.run([Ask((5, 6, 7), 3, 0)], 1)
    seen = {kind for kind, seconds in stack.own.items() if seconds > 0}
    assert seen >= {"linears", "LoRA", "attention", "norms", "embedding", "head", "sampling", "scheduling", "rest"}
    before = dict(stack.own)
    engine.run([Ask((5, 6, 7), 3, 0)], 1)
    assert stack.own == before


@pytest.mark.parametrize("mixed", [False, True])
def test_peft_runs_the_same_asks(base: Path, adapters: list[Path], mixed: bool) -> None:
    peft = Peft(str(base), adapters, dtype="float32", mixed=mixed)
    assert peft.run([Ask((5, 6, 7), 3, 0), Ask((8, 9, 7), 3, 1)], 2) > 0
    assert torch.is_grad_enabled()


def test_so_does_stock_generate_on_any_device(base: Path) -> None:
    stock = Stock(str(base), device=torch.device("cpu"), dtype="float32")
    assert stock.run([Ask((5, 6, 7), 3), Ask((8, 9, 7), 3), Ask((8, 9, 5), 3)], 2) > 0


def test_choosing_tokens_is_timed_for_every_setting_by_itself_and_within_steps(
    engine: InProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CONTEXT", 8)
    monkeypatch.setattr(engine.engine, "sampler", engine.engine.sampler)
    within = sampling.in_engine(engine, 2, 4 * len(sampling.SETTINGS))
    for step in (sampling.on_random_logits(2, 600, 0.5), within):
        times = sampling.measure(step, 1)
        assert times.keys() == sampling.SETTINGS.keys()
        assert all(0 < choosing <= whole for choosing, whole in times.values())
    assert len(engine.engine.scheduler.running) == 2, "they decode to the last step that is timed"
    while not engine.engine.idle:
        engine.step()
