"""Who runs when: the scheduler and the engine's step on a scripted runner, without a model."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
import torch

from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model.sampler import Sampler
from server.sequence import Batch, FinishReason, KVOperation, LoRARequest, SampledToken, SamplingParams, Sequence
from tests.model.engines import finish, token_ids, tracked

VOCAB = 50
GREEDY = SamplingParams(temperature=0)


class ScriptedRunner:
    """Says for the n-th token of a sequence what ``script`` says; remembers every batch and what was in the slots."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.computed: dict[int, tuple[int, int]] = {}
        self.num_sampled: list[int] = []
        self.fails = False

    @staticmethod
    def script(sequence_id: int, number: int) -> int:
        """The token that is likeliest."""
        return (sequence_id * 7 + number * 3) % (VOCAB - 1)

    def run(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        """Logits with one token far above the others, [len(batch.draws), vocab]."""
        if self.fails:
            raise RuntimeError("the model broke")
        self.batches.append(batch)
        self.num_sampled.append(len(batch.draws))
        for segment in batch.segments:
            holder, length = self.computed.get(segment.slot, (None, 0))
            known = length if holder == segment.sequence.id else 0
            assert segment.start == known, "a position is left out or computed twice"
            self.computed[segment.slot] = (segment.sequence.id, segment.end)
        logits = torch.zeros(len(batch.draws), VOCAB)
        for row, (sequence, *_) in enumerate(batch.draws):
            logits[row, self.script(sequence.id, len(sequence.output_ids))] = 9.0
        return logits, batch

    num_copied_bytes = 0

    def apply(self, kv_ops: Iterable[KVOperation]) -> None:
        """Not needed here."""

    def add_adapter(self, digest: str, weights: LoRAWeights) -> int:
        """Not needed here."""
        return 0

    def remove_adapter(self, digest: str) -> None:
        """Not needed here."""


def make(*, slots: int = 3, budget: int = 8, length: int = 64) -> tuple[Engine, ScriptedRunner]:
    """An engine on a script."""
    runner = ScriptedRunner()
    scheduler = Scheduler(max_num_seqs=slots, max_num_batched_tokens=budget, max_model_len=length)
    return tracked(Engine(scheduler, runner, Sampler(), Metrics())), runner


def ask(number: int, length: int, *, tokens: int = 4, adapter: str | None = None, eos: int | None = None) -> Sequence:
    """A sequence with a prompt of this length."""
    eos_ids = frozenset() if eos is None else frozenset({eos})
    adapters = () if adapter is None else (LoRARequest(adapter),)
    return Sequence(number, tuple(range(1, length + 1)), tokens, GREEDY, adapters, eos_ids)


def lengths(batch: Batch) -> dict[int, int]:
    """Rows of each sequence in a batch."""
    return {segment.sequence.id: segment.length for segment in batch.segments}


def test_a_prompt_longer_than_the_budget_goes_in_chunks_and_samples_once() -> None:
    engine, runner = make(budget=8)
    engine.add(ask(1, 20, tokens=2))
    outputs = finish(engine)
    assert [lengths(batch)[1] for batch in runner.batches] == [8, 8, 4, 1]
    assert token_ids(outputs) == [runner.script(1, 0), runner.script(1, 1)]
    assert runner.num_sampled == [0, 0, 1, 1]


def test_sequences_that_decode_come_before_prompts_and_the_oldest_prompt_first() -> None:
    engine, runner = make(budget=8)
    engine.add(ask(1, 3, tokens=9))
    engine.step()
    engine.add(ask(2, 10))
    engine.add(ask(3, 10))
    for _ in range(3):
        engine.step()
    assert [lengths(batch) for batch in runner.batches[1:]] == [{1: 1, 2: 7}, {1: 1, 2: 3, 3: 4}, {1: 1, 2: 1, 3: 6}]


def test_a_long_prompt_does_not_stall_the_running_ones() -> None:
    engine, runner = make(budget=8, length=500)
    for number in (1, 2):
        engine.add(ask(number, 2, tokens=60))
    engine.step()
    engine.add(ask(3, 300, tokens=1))
    while any(batch.num_rows > 2 for batch in runner.batches[-1:]):
        ids = {output.sequence_id for output in engine.step()}
        assert {1, 2} <= ids
        assert runner.batches[-1].num_rows <= 8
    finish(engine)


def test_no_step_is_larger_than_the_budget_which_holds_all_that_decode() -> None:
    engine, runner = make(slots=6, budget=2)
    for number in range(9):
        engine.add(ask(number, 5))
    assert len(finish(engine)) == 9 * 4
    assert max(batch.num_rows for batch in runner.batches) <= 7


def test_first_come_first_served_and_slots_bound_who_runs() -> None:
    engine, runner = make(slots=2, budget=100)
    for number in range(5):
        engine.add(ask(number, 4, tokens=2 + number))
    outputs = finish(engine)
    assert [output.sequence_id for output in outputs if output.last] == [0, 1, 2, 3, 4]
    assert max(len(batch.segments) for batch in runner.batches) == 2


def test_a_sequence_ends_at_eos_at_its_limit_or_at_the_models() -> None:
    engine, runner = make(length=10)
    engine.add(ask(1, 4, tokens=50, eos=runner.script(1, 2)))
    engine.add(ask(2, 4, tokens=3))
    engine.add(ask(3, 4, tokens=50))
    ends = {output.sequence_id: output.finish_reason for output in finish(engine) if output.last}
    assert ends == {1: FinishReason.STOP, 2: FinishReason.LENGTH, 3: FinishReason.LENGTH}
    last = {segment.sequence.id: segment.end for batch in runner.batches for segment in batch.segments}
    assert last == {1: 6, 2: 6, 3: 9}


def test_an_aborted_sequence_gives_its_slot_to_the_next() -> None:
    engine, _ = make(slots=1)
    running, waiting = ask(1, 4, tokens=50), ask(2, 4)
    engine.add(running)
    engine.add(waiting)
    engine.step()
    assert list(engine.scheduler.waiting) == [waiting]
    engine.abort(1)
    engine.scheduler.check_integrity()
    assert not engine.scheduler.running
    assert {output.sequence_id for output in finish(engine)} == {2}


def test_aborting_in_the_middle_of_a_prompt_and_in_the_queue() -> None:
    engine, _ = make(slots=1, budget=4)
    for number in (1, 2, 3):
        engine.add(ask(number, 20))
    engine.step()
    engine.abort(1)
    engine.abort(3)
    engine.scheduler.check_integrity()
    assert {output.sequence_id for output in finish(engine)} == {2}


def test_aborting_what_has_ended_or_never_was_is_no_error() -> None:
    engine, _ = make()
    engine.add(ask(1, 2, tokens=1))
    finish(engine)
    engine.abort(1)
    engine.abort(99)
    assert engine.idle


def test_a_row_without_finite_logits_ends_its_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = make()
    stock = runner.run

    def run(batch: Batch) -> tuple[torch.Tensor, Batch]:
        logits, batch = stock(batch)
        for row, (sequence, *_) in enumerate(batch.draws):
            if sequence.id == 1 and sequence.output_ids:
                logits[row] = float("nan")
        return logits, batch

    monkeypatch.setattr(runner, "run", run)
    engine.add(ask(1, 2))
    engine.add(ask(2, 2))
    outputs = finish(engine)
    assert [output.sequence_id for output in outputs if output.failed] == [1]
    assert token_ids(output for output in outputs if output.sequence_id == 2) == [runner.script(2, n) for n in range(4)]


def test_a_step_that_failed_is_given_up_and_the_queue_goes_on() -> None:
    engine, runner = make(slots=1)
    engine.add(ask(1, 2))
    engine.add(ask(2, 2))
    runner.fails = True
    with pytest.raises(RuntimeError):
        engine.step()
    given_up = engine.fail_batch("the step failed")
    assert [(output.sequence_id, output.failed, output.last) for output in given_up] == [(1, "the step failed", True)]
    runner.fails = False
    assert {output.sequence_id for output in finish(engine)} == {2}


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_and_goes_everybody_gets_the_scripts_tokens(seed: int) -> None:
    """Sequences join, end and are aborted at random; no slot is lost, no position left out, no step over budget."""
    source, (engine, runner) = random.Random(seed), make(slots=4, budget=11, length=40)
    got: dict[int, list[int | None]] = {}
    aborted: set[int] = set()
    asked: dict[int, Sequence] = {}
    for number in range(60):
        asked[number] = ask(
            number, source.randint(1, 30), tokens=source.randint(1, 9), adapter=source.choice((None, "a", "b"))
        )
        engine.add(asked[number])
        for _ in range(source.randint(0, 3)):
            for output in [] if engine.idle else engine.step():
                got.setdefault(output.sequence_id, []).extend(token_ids([output]))
        if source.random() < 0.2:
            gone = source.randint(0, number)
            if gone in engine.scheduler.running or asked[gone] in engine.scheduler.waiting:
                aborted.add(gone)
            engine.abort(gone)
        engine.scheduler.check_integrity()
    for output in finish(engine):
        got.setdefault(output.sequence_id, []).extend(token_ids([output]))
    for number, sequence in asked.items():
        tokens = got.get(number, [])
        assert tokens == [runner.script(number, n) for n in range(len(tokens))]
        if number not in aborted:
            assert len(tokens) == min(sequence.max_tokens, 40 - len(sequence.prompt_ids))
    assert engine.scheduler.slots.num_used == 0
    assert all(batch.num_rows <= 11 for batch in runner.batches)
    assert all(len({segment.slot for segment in batch.segments}) == len(batch.segments) for batch in runner.batches)


def test_what_a_sequence_without_finite_scores_has_computed_is_not_reused() -> None:
    slots = SlotTable(4, max_len=64, reuses=True)
    scheduler = Scheduler(max_num_seqs=2, max_num_batched_tokens=64, max_model_len=64, slots=slots)
    for number, token in enumerate((None, 5, 5)):
        sequence = Sequence(number, tuple(range(3, 43)), 1, SamplingParams(temperature=0))
        scheduler.add(sequence)
        scheduler.update(scheduler.schedule(), [None if token is None else SampledToken(token)])
        assert sequence.num_cached == (39 if number == 2 else 0)
        scheduler.check_integrity()
