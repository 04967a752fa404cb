"""Owners share the slots: who starts when several clients wait, who pauses, and that nothing of an answer is lost."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from server.engine.fair_queue import _MAX_LAST_STARTS, FairQueue
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.sequence import LoRARequest, ReleaseTail, SampledToken, SamplingParams, Sequence

GREEDY = SamplingParams(temperature=0)
LENGTH = 64


def make(*, running: int = 8, slots: int = 32, share: float = 0.75, max_bytes: int | None = None) -> Scheduler:
    """A scheduler with more slots than running sequences, as with prefix caching; a position is one byte."""
    return Scheduler(
        max_num_seqs=running,
        max_num_batched_tokens=64,
        max_model_len=LENGTH,
        slots=SlotTable(slots, max_len=LENGTH, max_bytes=max_bytes, reuses=True),
        max_owner_share=share,
    )


def add(
    scheduler: Scheduler, owner: str, number: int, *, first_id: int, tokens: int = 20, adapter: str | None = None
) -> list[Sequence]:
    adapters = () if adapter is None else (LoRARequest(adapter),)
    added = [
        Sequence(first_id + offset, (first_id + offset + 1, 2), tokens, GREEDY, adapters, owner=owner)
        for offset in range(number)
    ]
    for sequence in added:
        scheduler.add(sequence)
    return added


def step(scheduler: Scheduler) -> list[int]:
    """Run a step in which each sequence samples its own id plus the number of its token; returns the ids in it."""
    batch = scheduler.schedule()
    for segment in batch.segments:
        assert segment.start == segment.sequence.num_computed
        assert segment.length == segment.sequence.num_uncomputed, "a position is left out"
    scheduler.update(batch, [SampledToken(row.sequence.id + row.number) for row in batch.draws])
    scheduler.check_integrity()
    return [segment.sequence.id for segment in batch.segments]


def owners(scheduler: Scheduler) -> Counter[str]:
    return Counter(sequence.owner for sequence in scheduler.running.values())


def test_a_request_of_another_owner_starts_in_the_next_step() -> None:
    """It waited until a sequence of the first owner ended: 15 s behind 100 requests."""
    scheduler = make()
    add(scheduler, "a", 100, first_id=0)
    step(scheduler)
    (other,) = add(scheduler, "b", 1, first_id=1000)
    assert other.id in step(scheduler)
    assert owners(scheduler) == {"a": 7, "b": 1}


def test_an_owner_keeps_at_most_its_share_while_another_waits() -> None:
    scheduler = make(running=8, share=0.75)
    add(scheduler, "a", 100, first_id=0)
    step(scheduler)
    assert owners(scheduler) == {"a": 8}, "alone it has all"
    add(scheduler, "b", 100, first_id=1000)
    step(scheduler)
    assert owners(scheduler) == {"a": 6, "b": 2}


def test_the_share_is_a_setting() -> None:
    scheduler = make(running=8, share=0.5)
    add(scheduler, "a", 100, first_id=0)
    step(scheduler)
    add(scheduler, "b", 100, first_id=1000)
    step(scheduler)
    assert owners(scheduler) == {"a": 4, "b": 4}


def test_owners_come_to_have_as_many_as_each_other() -> None:
    scheduler = make(running=9)
    for number, owner in enumerate("abc"):
        add(scheduler, owner, 60, first_id=1000 * number, tokens=5 + number)
    for _ in range(30):
        step(scheduler)
    assert max(owners(scheduler).values()) - min(owners(scheduler).values()) <= 1


def test_an_owner_without_a_running_sequence_gets_one_though_nobody_is_above_its_share() -> None:
    scheduler = make(running=8, share=0.75)
    for number, owner in enumerate("abc"):
        add(scheduler, owner, 50, first_id=1000 * number)
        step(scheduler)
    assert owners(scheduler)["c"] == 1


def test_a_paused_sequence_goes_on_where_it_was_and_before_those_that_wait() -> None:
    scheduler = make(running=2, slots=4)
    first, second, third = add(scheduler, "a", 3, first_id=10, tokens=6)
    step(scheduler)
    step(scheduler)
    (other,) = add(scheduler, "b", 1, first_id=500, tokens=2)
    assert step(scheduler) == [first.id, other.id]
    assert list(scheduler.paused) == [second.id] and len(second.output_ids) == 2
    while not scheduler.idle:
        ids = step(scheduler)
        assert third.id not in ids or not scheduler.paused
    assert [second.output_ids[number] for number in range(6)] == [second.id + number for number in range(6)]


def test_a_paused_sequence_can_be_aborted_and_its_slot_returns() -> None:
    scheduler = make(running=2, slots=4)
    _, second = add(scheduler, "a", 2, first_id=10)
    step(scheduler)
    add(scheduler, "b", 1, first_id=500)
    step(scheduler)
    assert list(scheduler.paused) == [second.id]
    scheduler.abort(second.id)
    scheduler.check_integrity()
    assert not scheduler.paused and scheduler.slots.num_used == 2


@pytest.mark.parametrize("slots", [2, 3])
def test_nobody_pauses_where_there_is_no_slot_or_memory_for_the_other(slots: int) -> None:
    scheduler = make(running=2, slots=slots, max_bytes=None if slots == 2 else 70)
    add(scheduler, "a", 2, first_id=10, tokens=30)
    step(scheduler)
    (other,) = add(scheduler, "b", 1, first_id=500, tokens=30)
    assert len(step(scheduler)) == 2
    assert not scheduler.paused and list(scheduler.waiting) == [other]


def test_adapters_of_an_owner_start_in_turn() -> None:
    scheduler = make(running=1)
    add(scheduler, "a", 3, first_id=0, tokens=1, adapter="x")
    add(scheduler, "a", 3, first_id=10, tokens=1, adapter="y")
    assert [step(scheduler)[0] for _ in range(6)] == [0, 10, 1, 11, 2, 12]


def test_one_owner_with_one_adapter_is_first_come_first_served() -> None:
    scheduler = make(running=2)
    add(scheduler, "a", 6, first_id=0, tokens=1)
    assert [step(scheduler) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_an_owner_that_only_has_paused_sequences_is_not_starved() -> None:
    scheduler = make(running=4, slots=16)
    early = add(scheduler, "a", 4, first_id=0, tokens=8)
    step(scheduler)
    for round_ in range(30):
        add(scheduler, "b", 4, first_id=1000 + 10 * round_, tokens=8)
        step(scheduler)
    assert all(len(sequence.output_ids) == 8 for sequence in early)


def test_after_a_failure_without_a_batch_paused_sequences_end_as_well() -> None:
    scheduler = make(running=2, slots=4)
    add(scheduler, "a", 2, first_id=10)
    step(scheduler)
    add(scheduler, "b", 1, first_id=500)
    step(scheduler)
    assert scheduler.fail_batch(None) == [10, 11, 500]
    assert scheduler.idle
    scheduler.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_every_answer_is_whole(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make(running=rng.choice([1, 2, 5]), slots=rng.choice([5, 8, 20]), max_bytes=rng.choice([None, 200]))
    added: list[Sequence] = []
    aborted: set[int] = set()
    for _ in range(200):
        if rng.random() < 0.4:
            owner, adapter = rng.choice("abc"), rng.choice([None, "x", "y"])
            added += add(
                scheduler,
                owner,
                rng.randint(1, 3),
                first_id=100 * len(added),
                tokens=rng.randint(1, 9),
                adapter=adapter,
            )
        if added and rng.random() < 0.1:
            gone = rng.choice(added)
            aborted.add(gone.id)
            scheduler.abort(gone.id)
        if not scheduler.idle:
            step(scheduler)
    while not scheduler.idle:
        step(scheduler)
    for sequence in added:
        whole = [sequence.id + number for number in range(sequence.max_tokens)]
        assert sequence.output_ids == whole or sequence.id in aborted


def test_owners_are_forgotten_when_they_are_many() -> None:
    """A client can make up any number of keys where none are configured."""
    queue = FairQueue()
    queue.append(Sequence(0, (1,), 1, GREEDY, owner="stays"))
    for number in range(1, 4 * _MAX_LAST_STARTS):
        sequence = Sequence(number, (1,), 1, GREEDY, owner=f"owner-{number}")
        queue.append(sequence)
        queue.start(sequence)
    assert len(queue._last_starts) <= _MAX_LAST_STARTS + 4


def test_without_work_the_least_recently_used_prefixes_are_emptied_first() -> None:
    """The memory of a burst stayed for good."""
    table = SlotTable(4, max_len=LENGTH, reuses=True)
    scheduler = Scheduler(max_num_seqs=2, max_num_batched_tokens=64, max_model_len=LENGTH, slots=table)
    for number in range(4):
        prompt = tuple(range(100 * number, 100 * number + 20))
        scheduler.add(Sequence(number, prompt, 1, GREEDY))
        while not scheduler.idle:
            step(scheduler)
    assert table.num_cached == 4
    kv_ops = table.release_cached(keep=1)
    assert [(kv_op.slot, kv_op.length) for kv_op in kv_ops if isinstance(kv_op, ReleaseTail)] == [
        (0, 0),
        (1, 0),
        (2, 0),
    ]
    assert table.num_cached == 1
    table.check_integrity()
    assert table.release_cached(keep=1) == ()
