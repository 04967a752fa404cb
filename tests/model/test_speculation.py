"""Drafts change how many steps an answer takes, and nothing else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.speculation import MAX_DRAFT_ROWS, MAX_PAUSE, MAX_TABLES, NGrams, Speculation
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model.sampler import Sampler
from server.sequence import Batch, FinishReason, KVOperation, LoRARequest, SamplingParams, Segment, Sequence
from tests.model.engines import finish, step, token_ids, tracked
from tests.tables import wide

VOCAB = 24
GREEDY = SamplingParams(temperature=0)
LENGTH = 80

Model = Callable[[Sequence, list[int]], torch.Tensor]
"""The logits [VOCAB] after a history of tokens: a function of nothing else."""


class ScriptedRunner:
    """A model by script, with a KV cache that holds tokens, so that a row sees what was written before it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.batches: list[Batch] = []
        self.removed: list[str] = []
        self._slots: dict[int, list[int]] = {}

    def run(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        """Logits by what the slots hold, [len(batch.draws), VOCAB]."""
        self.batches.append(batch)
        logits = []
        for segment in batch.segments:
            assert segment.start == segment.sequence.num_computed
            assert segment.length == len(segment.ids)
            held = self._slots.setdefault(segment.slot, [])
            assert len(held) >= segment.start, "a position was left out"
            assert held[: segment.start] == segment.sequence.ids(0, segment.start) or segment.start == 0
            held[segment.start :] = segment.ids
            assert len(held) < LENGTH, "a position beyond the slot"
            for row in range(segment.length - segment.num_sampled, segment.length):
                logits.append(self.model(segment.sequence, held[: segment.start + row + 1]))
        assert len(logits) == len(batch.draws)
        return torch.stack(logits) if logits else torch.empty(0, VOCAB), batch

    num_copied_bytes = 0

    def apply(self, kv_ops: Iterable[KVOperation]) -> None:
        """Not needed here."""

    def add_adapter(self, digest: str, weights: LoRAWeights) -> int:
        """Not needed here."""
        return 0

    def remove_adapter(self, digest: str) -> None:
        """Note it."""
        self.removed.append(digest)


def habits(seed: int, *, order: int = 2, sharpness: float = 6.0) -> Model:
    """A model that looks at the last few tokens, and so repeats itself."""

    def model(sequence: Sequence, history: list[int]) -> torch.Tensor:
        source = random.Random(f"{seed} {history[-order:]}")
        return torch.tensor([sharpness * source.random() for _ in range(VOCAB)])

    return model


def counting(sequence: Sequence, history: list[int]) -> torch.Tensor:
    """After token n comes n + 1, and after 9 comes 0."""
    logits = torch.zeros(VOCAB)
    logits[(history[-1] + 1) % 10] = 9.0
    return logits


def make(model: Model, *, drafts: int = 8, slots: int = 3, budget: int = 40) -> tuple[Engine, ScriptedRunner]:
    """An engine on a script."""
    runner = ScriptedRunner(model)
    scheduler = Scheduler(
        max_num_seqs=slots, max_num_batched_tokens=budget, max_model_len=LENGTH, max_draft_tokens=drafts
    )
    return tracked(Engine(scheduler, runner, Sampler(), Metrics())), runner


def count(engine: Engine, name: str) -> float:
    """A counter's value."""
    return engine.metrics.registry.get_sample_value(f"quickchange_{name}_total") or 0.0


def ask(number: int, prompt: list[int], **fields: object) -> Sequence:
    """A sequence, greedy and of twenty tokens where nothing else is said."""
    return Sequence(number, tuple(prompt), **{"max_tokens": 20, "params": GREEDY, **fields})  # type: ignore[arg-type]


def random_asks(source: random.Random, *, penalized: bool) -> list[Sequence]:
    """Prompts of all lengths, greedy and seeded, on adapters or none, with and without an end token."""
    asks = []
    for number in range(14):
        greedy = source.random() < 0.5
        params = GREEDY if greedy else SamplingParams(temperature=source.choice((0.3, 1.0)), seed=number, top_p=0.95)
        if penalized:
            params = replace(params, processors=random_processors(number))
        asks.append(
            ask(
                number,
                [source.randrange(VOCAB) for _ in range(source.randint(1, 60))],
                max_tokens=source.randint(1, 60),
                params=params,
                adapters=source.choice(((), (LoRARequest("a"),), (LoRARequest("a", 0.5), LoRARequest("b")))),
                eos_ids=frozenset(source.sample(range(VOCAB), source.randint(0, 2))),
                cache_namespace=source.choice((b"", b"x")),
            )
        )
    return asks


def random_processors(number: int) -> tuple[tuple[str, Any], ...]:
    """Small penalties, so that the model still repeats itself, a bias, a least length: some of them."""
    source = random.Random(f"processors {number}")
    every: dict[str, Any] = {
        "frequency_penalty": source.choice((0.2, 0.05, -0.1)),
        "presence_penalty": source.choice((0.3, -0.3)),
        "repetition_penalty": source.choice((1.05, 0.95)),
        "logit_bias": tuple((token, source.uniform(-2, 2)) for token in source.sample(range(VOCAB), 4)),
        "min_tokens": source.randint(1, 20),
    }
    return tuple((name, every[name]) for name in source.sample(sorted(every), source.randint(1, 4)))


Said = dict[int, list[tuple[int | None, object]]]
"""Tokens and ends of each sequence."""


def play(number: int, drafts: int, *, penalized: bool = False) -> tuple[Said, int, float]:
    """What every sequence of a random story got, how many steps it took, and how many drafts were right."""
    source = random.Random(number)
    order, sharpness = source.choice((1, 2, 3)), source.choice((2.0, 6.0, 20.0))
    engine, runner = make(
        habits(number, order=order, sharpness=sharpness), drafts=drafts, slots=source.randint(1, 5), budget=11
    )
    got: Said = {}
    for sequence in random_asks(source, penalized=penalized):
        engine.add(sequence)
        for output in step(engine) if source.random() < 0.5 else ():
            got.setdefault(output.sequence_id, []).append((token_ids([output])[0], output.finish_reason))
    for output in finish(engine):
        got.setdefault(output.sequence_id, []).append((token_ids([output])[0], output.finish_reason))
    assert all(batch.num_rows <= 11 for batch in runner.batches)
    return got, len(runner.batches), count(engine, "accepted_draft_tokens")


@pytest.mark.parametrize("number", [*range(8), *(pytest.param(number, marks=wide) for number in range(8, 25))])
def test_every_sequence_gets_the_tokens_it_gets_without_drafts(number: int) -> None:
    """Greedy and seeded, in any mixture with chunks of prompts, whatever the model's habits."""
    without, _, none = play(number, drafts=0)
    assert none == 0
    for drafts in (1, 3, 12):
        assert play(number, drafts)[0] == without


def test_every_sequence_with_penalties_gets_the_tokens_it_gets_without_drafts() -> None:
    """A draft's row has the penalties of the drafts before it, whether they were right or not."""
    num_accepted = 0.0
    for number in range(8):
        without, _, none = play(number, drafts=0, penalized=True)
        assert none == 0
        spoken, _, accepted = play(number, drafts=6, penalized=True)
        assert spoken == without
        assert spoken != play(number, drafts=6)[0]
        num_accepted += accepted
    assert num_accepted > 150


def test_the_stories_above_are_not_empty() -> None:
    stories = [(play(number, 0), play(number, 12)) for number in range(6)]
    assert sum(spoken[2] for _, spoken in stories) > 200
    assert sum(spoken[1] for _, spoken in stories) < 0.8 * sum(silent[1] for silent, _ in stories)


def test_what_repeats_takes_a_fraction_of_the_steps_and_is_counted() -> None:
    engine, runner = make(counting)
    engine.add(ask(1, [0], max_tokens=60))
    outputs = finish(engine)
    assert token_ids(outputs) == [(n + 1) % 10 for n in range(60)]
    assert len(runner.batches) < 30
    assert count(engine, "accepted_draft_tokens") == 60 - len(runner.batches)
    assert count(engine, "draft_tokens") == sum(len(s.drafts) for batch in runner.batches for s in batch.segments)


def test_a_prompt_is_looked_up_with_its_last_chunk() -> None:
    engine, runner = make(counting, budget=12)
    engine.add(ask(1, [*range(10), *range(7)], max_tokens=5))
    assert token_ids(finish(engine)) == [7, 8, 9, 0, 1]
    assert runner.batches[0].segments[0].length == 12
    assert runner.batches[1].segments[0].drafts == (7, 8, 9, 0)
    assert len(runner.batches) == 2


@pytest.mark.parametrize("max_tokens", range(1, 30))
def test_max_tokens_ends_a_sequence_right_there(max_tokens: int) -> None:
    engine, _ = make(counting)
    engine.add(ask(1, [*range(10)] * 2, max_tokens=max_tokens))
    outputs = finish(engine)
    assert token_ids(outputs) == [n % 10 for n in range(max_tokens)]
    assert [output.finish_reason for output in outputs] == [None] * (max_tokens - 1) + [FinishReason.LENGTH]


@pytest.mark.parametrize("length", range(LENGTH - 14, LENGTH))
def test_the_models_length_ends_a_sequence_and_no_draft_lies_beyond_its_slot(length: int) -> None:
    engine, _ = make(counting)
    engine.add(ask(1, [n % 10 for n in range(length)], max_tokens=50))
    outputs = finish(engine)
    assert len(outputs) == LENGTH - length
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("eos", range(10))
def test_an_end_token_among_the_drafts_ends_the_sequence_with_nothing_after_it(eos: int) -> None:
    engine, runner = make(counting)
    engine.add(ask(1, [*range(10)] * 2, eos_ids=frozenset({eos})))
    outputs = finish(engine)
    assert token_ids(outputs) == [*range(eos + 1)]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert all(eos not in segment.drafts[:-1] for batch in runner.batches for segment in batch.segments)


def test_num_computed_of_a_finished_sequence_counts_what_was_accepted() -> None:
    engine, _ = make(counting)
    sequences = [ask(1, [*range(10)] * 2, eos_ids=frozenset({4})), ask(2, [*range(10)] * 2, max_tokens=7)]
    for sequence in sequences:
        engine.add(sequence)
    finish(engine)
    assert [sequence.num_computed for sequence in sequences] == [20 + 4, 20 + 6]


def test_an_abort_between_two_steps_leaves_the_next_one_alone() -> None:
    engine, _ = make(counting, slots=1)
    engine.add(ask(1, [*range(10)] * 2, max_tokens=50))
    step(engine)
    engine.abort(1)
    engine.add(ask(2, [3], max_tokens=4))
    assert token_ids(finish(engine)) == [4, 5, 6, 7]


def test_a_row_that_is_not_finite_fails_its_sequence_where_it_is_reached() -> None:
    """Behind a wrong draft nobody looks; behind right ones, the tokens before it are given out first."""

    def model(sequence: Sequence, history: list[int]) -> torch.Tensor:
        broken = sequence.id == 1 and len(history) == 24
        off_track = any((a + 1) % 10 != b for a, b in itertools.pairwise(history))
        return counting(sequence, history) * (float("nan") if broken or off_track else 1.0)

    engine, _ = make(model)
    engine.add(ask(1, [*range(10)] * 2))
    engine.add(ask(2, [*range(10)] * 2, max_tokens=7))
    outputs = finish(engine)
    assert token_ids(output for output in outputs if output.sequence_id == 1) == [0, 1, 2, 3, None]
    assert [output.failed is not None for output in outputs if output.sequence_id == 1] == [False] * 4 + [True]
    assert token_ids(output for output in outputs if output.sequence_id == 2) == [*range(7)]


def test_drafts_take_only_what_the_budget_leaves() -> None:
    """A long prompt's chunks are as long with speculation as without."""
    chunks = []
    for drafts in (0, 8):
        engine, runner = make(counting, drafts=drafts, budget=12)
        engine.add(ask(1, [*range(10)], max_tokens=50))
        step(engine)
        engine.add(ask(2, [n % 7 for n in range(60)], max_tokens=1))
        while 2 in engine.scheduler.running or engine.scheduler.waiting:
            step(engine)
        chunks.append([s.end - s.start for batch in runner.batches for s in batch.segments if s.sequence.id == 2])
        assert all(batch.num_rows <= 12 for batch in runner.batches)
        finish(engine)
    assert chunks[0] == chunks[1]


def test_rows_of_drafts_are_bounded_over_all_sequences() -> None:
    engine, runner = make(counting, drafts=12, slots=8, budget=512)
    for number in range(8):
        engine.add(ask(number, [*range(10)] * 3, max_tokens=30))
    finish(engine)
    drafted = [sum(len(segment.drafts) for segment in batch.segments) for batch in runner.batches]
    assert max(drafted) == MAX_DRAFT_ROWS


def test_others_outputs_help_those_of_the_same_adapters_and_cache_namespace_alone() -> None:
    """What one sequence said must not even be noticed, by its speed, by another of a different cache namespace."""

    def num_steps(engine: Engine, runner: ScriptedRunner, second: Sequence) -> int:
        engine.add(ask(1, [0], adapters=(LoRARequest("a"),), cache_namespace=b"one"))
        finish(engine)
        before = len(runner.batches)
        engine.add(second)
        finish(engine)
        return len(runner.batches) - before

    same = num_steps(*make(counting), ask(2, [0], adapters=(LoRARequest("a"),), cache_namespace=b"one"))
    others = [
        num_steps(*make(counting), ask(2, [0], adapters=(LoRARequest("a"),), cache_namespace=b"two")),
        num_steps(*make(counting), ask(2, [0], adapters=(LoRARequest("a", 0.5),), cache_namespace=b"one")),
        num_steps(*make(counting), ask(2, [0], adapters=(), cache_namespace=b"one")),
    ]
    first = num_steps(*make(habits(1)), ask(2, [0]))
    assert same < min(others) < first
    assert len(set(others)) == 1


def test_what_an_unloaded_adapter_said_is_forgotten() -> None:
    engine, runner = make(counting)
    uses = (LoRARequest("a"), LoRARequest("b", 0.5))
    for number, adapters in enumerate((uses, (LoRARequest("c"),))):
        engine.add(ask(number, [0], adapters=adapters))
    finish(engine)
    engine.remove_adapter("b")
    assert runner.removed == ["b"]
    assert engine.scheduler.speculation is not None
    assert [key[0] for key in engine.scheduler.speculation._shared] == [(LoRARequest("c"),)]


def test_text_that_looks_the_same_and_never_is_gets_few_drafts() -> None:
    """Pairs of tokens come back and are followed by chance: nearly all steps carry no draft."""

    speculation = Speculation(max_drafts=12, max_model_len=100_000)
    source, sequence, rows = random.Random(0), ask(1, [1, 2], max_tokens=10_000), 0
    for number in range(3000):
        start = sequence.num_tokens - 1
        (segment,) = speculation.add_drafts([Segment(sequence, 0, start, 1)], room=64)
        rows += len(segment.drafts)
        # After 1, 2 comes anything but what came last.
        sequence.output_ids.append((1, 2, 3 + (number // 3 + source.randrange(5)) % 20)[number % 3])
        speculation.learn(segment, 1)
    assert rows < 3000 * 0.05
    assert rows >= 3000 / MAX_PAUSE / 3, "it must go on trying now and then"


def test_tables_are_bounded() -> None:
    table, source = NGrams(100), random.Random(0)
    for _ in range(50):
        table.learn([source.randrange(1000) for _ in range(40)], 0)
    assert len(table) <= 102
    speculation = Speculation(max_drafts=4, max_model_len=LENGTH)
    for number in range(3 * MAX_TABLES):
        speculation.add_drafts([Segment(ask(number, [1, 2], cache_namespace=str(number).encode()), 0, 0, 2)], room=8)
    assert len(speculation._shared) == MAX_TABLES
    assert len(speculation._tracks) <= 1, "what is known of a sequence goes with it"


def test_a_habit_outlives_one_contradiction_and_not_many() -> None:
    table = NGrams(100)
    for token in (7, 7, 7, 8):
        table.learn([1, 2, token], 2)
    assert table.get((1, 2)) == (7, 1)
    table.learn([1, 2, 8], 2)
    assert table.get((1, 2)) == (8, 1)
    assert table.get((2, 1)) is None
