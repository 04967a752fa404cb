"""Which prefixes are reused, copied, waited for and evicted: the engine on a runner that knows what is in memory."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
import torch

from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import Prefix, SlotTable
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model.sampler import Sampler
from server.sequence import Batch, CopyPrefix, KVOperation, LoRARequest, ReleaseTail, SamplingParams, Sequence
from tests.model.engines import finish, tracked

VOCAB, PAGE, LENGTH = 50, 8, 200
GREEDY = SamplingParams(temperature=0)
SYSTEM = tuple(range(3, 43))
Owner = tuple[bytes, tuple[LoRARequest, ...]]


def bytes_of(length: int) -> int:
    """Memory of so many positions: whole pages of 8."""
    return -(-length // PAGE) * PAGE


class Memory:
    """A runner whose slots hold, for each position, what its keys and values would depend on: owner and all tokens.

    Every row must find the right ones before it. ``written`` says which positions of a slot take memory.
    """

    def __init__(self) -> None:
        self.held: dict[int, list[tuple[Owner, tuple[int, ...]] | None]] = {}
        self.written: Counter[int] = Counter()
        self.num_rows: Counter[int] = Counter()
        self.kv_ops: list[CopyPrefix | ReleaseTail] = []
        self.most_bytes = 0
        self.fails: str | None = None

    def run(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        """Logits that tell what was seen: the next token is made of all before it, [len(batch.draws), vocab]."""
        if self.fails == "at once":
            raise RuntimeError("the model broke")
        for kv_op in batch.kv_ops:
            self._do(kv_op)
        if self.fails == "after its KV operations":
            raise RuntimeError("the model broke")
        for segment in batch.segments:
            one = segment.sequence
            slot = self.held.setdefault(segment.slot, [None] * LENGTH)
            owner = (one.cache_namespace, one.adapters)
            ids = tuple(one.ids(0, segment.end))
            for position in range(segment.start):
                assert slot[position] == (owner, ids[: position + 1]), "a row sees what is not its own"
            for position in range(segment.start, segment.end):
                slot[position] = (owner, ids[: position + 1])
            self.written[segment.slot] = max(self.written[segment.slot], segment.end)
            self.num_rows[one.id] += segment.length
        self.most_bytes = max(self.most_bytes, self.num_bytes)
        logits = torch.zeros(len(batch.draws), VOCAB)
        for row, (one, *_) in enumerate(batch.draws):
            logits[row, next_token(one)] = 9.0
        return logits, batch

    @property
    def num_bytes(self) -> int:
        """Memory that slots take."""
        return sum(bytes_of(length) for length in self.written.values())

    def _do(self, kv_op: CopyPrefix | ReleaseTail) -> None:
        self.kv_ops.append(kv_op)
        if isinstance(kv_op, CopyPrefix):
            target = self.held.setdefault(kv_op.target, [None] * LENGTH)
            target[: kv_op.length] = self.held[kv_op.source][: kv_op.length]
            self.written[kv_op.target] = max(self.written[kv_op.target], kv_op.length)
        elif kv_op.slot in self.held:
            kept = bytes_of(kv_op.length)
            self.held[kv_op.slot][kept:] = [None] * (LENGTH - kept)
            self.written[kv_op.slot] = min(self.written[kv_op.slot], kv_op.length)

    num_copied_bytes = 0

    def apply(self, kv_ops: Iterable[KVOperation]) -> None:
        """Not needed here."""

    def add_adapter(self, digest: str, weights: LoRAWeights) -> int:
        """Not needed here."""
        return 0

    def remove_adapter(self, digest: str) -> None:
        """Not needed here."""


def next_token(sequence: Sequence) -> int:
    """Any function of all tokens will do."""
    return sum((n + 1) * token for n, token in enumerate(sequence.ids(0, sequence.num_tokens))) % VOCAB


def make(
    *, slots: int = 8, running: int = 4, budget: int = 64, max_bytes: int | None = None, reuses: bool = True
) -> tuple[Engine, Memory]:
    """An engine that reuses prefixes."""
    memory = Memory()
    table = SlotTable(slots, max_len=LENGTH, max_bytes=max_bytes, bytes_of=bytes_of, reuses=reuses)
    scheduler = Scheduler(max_num_seqs=running, max_num_batched_tokens=budget, max_model_len=LENGTH, slots=table)
    return tracked(Engine(scheduler, memory, Sampler(), Metrics())), memory


def ask(
    number: int,
    prompt: tuple[int, ...],
    *,
    tokens: int = 4,
    adapters: tuple[LoRARequest, ...] = (),
    cache_namespace: bytes = b"",
) -> Sequence:
    """A sequence."""
    return Sequence(number, prompt, tokens, GREEDY, adapters, cache_namespace=cache_namespace)


def test_the_same_prompt_again_computes_its_last_token_alone() -> None:
    engine, memory = make()
    first, second = ask(1, SYSTEM), ask(2, SYSTEM)
    finish(engine, first)
    finish(engine, second)
    assert (first.num_cached, second.num_cached) == (0, len(SYSTEM) - 1)
    assert memory.num_rows[2] == 1 + 3
    assert second.output_ids == first.output_ids


def test_a_conversation_goes_on_in_the_slot_it_has() -> None:
    engine, memory = make()
    first = ask(1, SYSTEM)
    finish(engine, first)
    second = ask(2, (*SYSTEM, *first.output_ids, 7, 8, 9))
    finish(engine, second)
    assert second.num_cached == len(SYSTEM) + 3, "the last token of the answer was never an input"
    assert memory.kv_ops == []
    assert set(memory.held) == {0}


def test_conversations_that_diverge_copy_what_they_share_and_both_stay() -> None:
    engine, memory = make()
    first, second = ask(1, SYSTEM + (1,) * 40), ask(2, SYSTEM + (2,) * 40)
    finish(engine, first)
    finish(engine, second)
    assert memory.kv_ops == [CopyPrefix(0, 1, len(SYSTEM))]
    third = ask(3, (*first.ids(0, first.num_tokens), 9))
    finish(engine, third)
    assert third.num_cached == first.num_tokens - 1


def test_a_running_sequence_lends_what_it_has_computed() -> None:
    engine, memory = make()
    engine.add(ask(1, SYSTEM, tokens=50))
    engine.step()
    second = ask(2, (*SYSTEM, 5, 6))
    engine.add(second)
    engine.step()
    assert memory.kv_ops == [CopyPrefix(0, 1, len(SYSTEM))]
    assert second.num_cached == len(SYSTEM)
    finish(engine)


def test_a_prefix_shared_by_all_who_come_at_once_is_computed_once() -> None:
    engine, memory = make(running=8, slots=8, budget=16)
    sequences = [ask(number, (*SYSTEM, *[number] * 5)) for number in range(8)]
    finish(engine, *sequences)
    assert [one.num_cached for one in sequences] == [0] + [len(SYSTEM)] * 7
    assert sum(memory.num_rows.values()) == len(SYSTEM) + 8 * (5 + 3)


def test_who_waits_for_a_prefix_waits_for_all_of_it() -> None:
    engine, _ = make(budget=16)
    second = ask(2, (*SYSTEM[:35], *[1] * 9))
    finish(engine, ask(1, SYSTEM), second)
    assert second.num_cached == 35


def test_who_waits_for_a_prefix_lets_others_pass() -> None:
    engine, _ = make(budget=16)
    waits, passes = ask(2, (*SYSTEM, 1)), ask(3, tuple(reversed(SYSTEM)))
    for one in (ask(1, SYSTEM), waits, passes):
        engine.add(one)
    engine.step()
    assert list(engine.scheduler.waiting) == [waits] and passes.id in engine.scheduler.running
    finish(engine)


@pytest.mark.parametrize("steps", [1, 2])
def test_who_waits_for_a_prefix_goes_on_from_where_an_aborted_one_stopped(steps: int) -> None:
    engine, _ = make(budget=16)
    second = ask(2, (*SYSTEM, 1))
    engine.add(ask(1, SYSTEM))
    engine.add(second)
    for _ in range(steps):
        engine.step()
    engine.abort(1)
    finish(engine)
    assert second.num_cached == 16 * steps


def test_aborting_who_waits_for_a_prefix() -> None:
    engine, _ = make(budget=16)
    engine.add(ask(1, SYSTEM))
    engine.add(ask(2, SYSTEM))
    engine.step()
    engine.abort(2)
    assert not engine.scheduler.slots._waiting_for
    finish(engine)


ADAPTER = (LoRARequest("one"),)


@pytest.mark.parametrize(
    ("adapters", "cache_namespace"),
    [
        ((), b"mine"),
        ((LoRARequest("another version"),), b"mine"),
        ((LoRARequest("one", 0.5),), b"mine"),
        ((LoRARequest("one"), LoRARequest("two")), b"mine"),
        (ADAPTER, b"yours"),
        (ADAPTER, b""),
    ],
)
def test_nothing_is_reused_across_adapters_versions_scales_and_cache_namespaces(
    adapters: tuple[LoRARequest, ...], cache_namespace: bytes
) -> None:
    engine, _ = make(budget=16)
    mine = ask(1, SYSTEM, adapters=ADAPTER, cache_namespace=b"mine")
    other, again = (
        ask(2, SYSTEM, adapters=adapters, cache_namespace=cache_namespace),
        ask(3, SYSTEM, adapters=ADAPTER, cache_namespace=b"mine"),
    )
    finish(engine, mine)
    finish(engine, other)
    finish(engine, again)
    assert (other.num_cached, again.num_cached) == (0, len(SYSTEM) - 1)
    other, together = (
        ask(4, SYSTEM, adapters=adapters, cache_namespace=b"new" + cache_namespace),
        ask(5, SYSTEM, adapters=ADAPTER, cache_namespace=b"n"),
    )
    finish(engine, together, other)
    assert other.num_cached == together.num_cached == 0


def test_a_few_tokens_in_common_are_not_worth_it() -> None:
    engine, memory = make()
    finish(engine, ask(1, SYSTEM))
    finish(engine, ask(2, (*SYSTEM[:15], *[1] * 20)))
    assert memory.kv_ops == []


def test_it_can_be_switched_off() -> None:
    engine, memory = make(reuses=False)
    finish(engine, ask(1, SYSTEM), ask(2, SYSTEM))
    third = ask(3, SYSTEM)
    finish(engine, third)
    assert third.num_cached == 0
    assert memory.kv_ops == []
    assert engine.scheduler.slots.num_cached == 0


def test_what_was_used_longest_ago_goes_first() -> None:
    engine, _ = make(slots=3, running=1)
    prompts = [tuple([start] * 60) for start in range(4)]
    for number, prompt in enumerate(prompts[:3]):
        finish(engine, ask(number, prompt))
    finish(engine, ask(10, (*prompts[0], 9, 9)))  # of use again
    finish(engine, ask(11, prompts[3]))  # takes the place of the second
    found = [ask(20 + number, prompt) for number, prompt in enumerate(prompts)]
    for one in (found[0], found[2], found[3], found[1]):
        finish(engine, one)
    assert [one.num_cached > 0 for one in found] == [True, False, True, True]


def test_what_lent_its_prefix_was_of_use() -> None:
    engine, _ = make(slots=3, running=1)
    lender, other = ask(1, SYSTEM + (1,) * 60), ask(2, (2,) * 60)
    for one in (lender, other, ask(3, SYSTEM + (3,) * 60), ask(4, (4,) * 60)):
        finish(engine, one)
    again = [ask(11, (*lender.ids(0, 60), 7)), ask(12, other.prompt_ids)]
    for one in again:
        finish(engine, one)
    assert [one.num_cached for one in again] == [60, 0]


def test_memory_is_bounded_by_what_running_sequences_may_come_to_need() -> None:
    engine, memory = make(max_bytes=256)
    first, second, third = (ask(number, (number,) * 40, tokens=72) for number in (1, 2, 3))
    for one in (first, second, third):
        engine.add(one)
    engine.step()
    assert (set(engine.scheduler.running), list(engine.scheduler.waiting)) == ({1, 2}, [third])
    finish(engine)
    assert third.num_cached == 0
    assert memory.most_bytes <= 256


def test_kept_prefixes_give_way_to_sequences_and_their_memory_is_given_back() -> None:
    engine, memory = make(max_bytes=208)
    for number in (1, 2, 3, 4):
        finish(engine, ask(number, (number,) * 40))
    finish(engine, ask(5, (5,) * 90, tokens=50))
    assert ReleaseTail(0, 0) in memory.kv_ops
    last, first = ask(6, (4,) * 40), ask(7, (1,) * 40)
    finish(engine, last)
    finish(engine, first)
    assert (last.num_cached, first.num_cached) == (39, 0)


def test_a_sequence_as_long_as_memory_runs_alone_and_may_continue_its_own_prefix() -> None:
    engine, memory = make(max_bytes=LENGTH)
    first = ask(1, (1,) * 150, tokens=10)
    finish(engine, first)
    second = ask(2, (*first.ids(0, 150), *[2] * 40), tokens=50)
    finish(engine, second)
    assert second.num_cached >= 150
    third = ask(3, (*first.ids(0, 100), *[3] * 90), tokens=10)
    finish(engine, third)
    assert third.num_cached == 100, "there is no room for a copy: it goes on where the prefix is"
    assert memory.most_bytes <= LENGTH


@pytest.mark.parametrize("fails", ["at once", "after its KV operations"])
def test_what_a_failed_step_was_to_prepare_is_never_reused(fails: str) -> None:
    """A copy that was not made would be taken for a prefix; the slots of a step that failed are emptied."""
    engine, memory = make()
    finish(engine, ask(1, SYSTEM + (1,) * 40))
    copied = ask(2, SYSTEM + (2,) * 40)
    engine.add(copied)
    memory.fails = fails
    with pytest.raises(RuntimeError):
        engine.step()
    assert [output.sequence_id for output in engine.fail_batch("the step failed")] == [2]
    memory.fails = None
    assert engine.scheduler.slots.num_cached == 0
    again = ask(3, SYSTEM + (2,) * 40)
    finish(engine, again)
    assert again.num_cached == 0
    assert memory.num_bytes == bytes_of(84)


def test_who_was_admitted_to_a_step_that_failed_without_a_row_in_it_is_given_up_with_it() -> None:
    engine, memory = make(budget=8)
    finish(engine, ask(1, SYSTEM + (1,) * 40))
    late = ask(3, SYSTEM + (3,) * 40)
    for one in (ask(2, (9,) * 60), late):
        engine.add(one)
    memory.fails = "at once"
    with pytest.raises(RuntimeError):
        engine.step()
    assert engine.batch is not None and [segment.sequence.id for segment in engine.batch.segments] == [2]
    assert [output.sequence_id for output in engine.fail_batch("the step failed")] == [2, 3]


def test_prompts_leave_room_for_those_that_decode_and_take_all_of_it_where_nobody_does() -> None:
    engine, memory = make(budget=32)
    engine.scheduler.max_prefill_tokens = 8
    engine.add(ask(1, (1,) * 40, tokens=8))
    sizes = []
    for number in range(9):
        if number == 3:
            engine.add(ask(2, (2,) * 60, tokens=1))
        before = Counter(memory.num_rows)
        engine.step()
        sizes.append((memory.num_rows[1] - before[1], memory.num_rows[2] - before[2]))
    assert sizes == [(32, 0), (8, 0), (1, 0), (1, 8), (1, 8), (1, 8), (1, 8), (1, 8), (1, 8)]
    engine.step()
    assert memory.num_rows[2] == 60


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_and_goes_rows_see_their_own_and_memory_stays_within_its_bound(seed: int) -> None:
    """Conversations of three owners that share system prompts, go on, diverge, are aborted, and fail with a step."""
    source = random.Random(seed)
    most = source.choice((208, 300, 500))
    engine, memory = make(slots=source.choice((4, 9)), budget=source.choice((16, 48)), max_bytes=most)
    systems = [tuple(source.randrange(VOCAB) for _ in range(length)) for length in (20, 45, 80)]
    asked: dict[int, Sequence] = {}
    for number in range(200):
        prompt = source.choice(systems) + (source.randrange(4),) * source.randint(0, 30)
        earlier = source.choice([None, *asked.values()])
        if earlier is not None and earlier.num_tokens < 150 and source.random() < 0.5:
            prompt = (*earlier.ids(0, earlier.num_tokens), *[source.randrange(VOCAB)] * source.randint(1, 9))
        owner = source.choice((((), b""), (ADAPTER, b""), (ADAPTER, b"x")))
        asked[number] = ask(number, prompt, tokens=source.randint(1, 60), adapters=owner[0], cache_namespace=owner[1])
        engine.add(asked[number])
        for _ in range(source.randint(0, 12)):
            if not engine.idle:
                _step_or_fail(engine, memory, fails=source.random() < 0.02)
            engine.scheduler.check_integrity()
            assert memory.num_bytes <= most
        if source.random() < 0.2:
            engine.abort(source.randint(0, number))
    finish(engine)
    assert memory.most_bytes <= most
    assert engine.scheduler.slots.num_used == 0
    assert not engine.scheduler.slots._waiting_for
    assert sum(one.num_cached for one in asked.values()) > 300
    for one in asked.values():
        alone = ask(one.id, one.prompt_ids, tokens=one.max_tokens)
        for token in one.output_ids:
            assert token == next_token(alone)
            alone.output_ids.append(token)


def _step_or_fail(engine: Engine, memory: Memory, *, fails: bool) -> None:
    memory.fails = "after its KV operations" if fails else None
    try:
        engine.step()
    except RuntimeError:
        engine.fail_batch("the step failed")
    memory.fails = None


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 511, 512, 513, 5000])
@pytest.mark.parametrize("more", [0, 1, 300])
def test_the_common_length_of_two_prefixes(length: int, more: int) -> None:
    source = random.Random(length)
    shared = tuple(source.randrange(200_000) for _ in range(length))
    mine, other = ((*shared, *[token] * more) for token in (70_001, 70_002))
    one, two = (Prefix.of(ask(1, (*ids, 1)), len(ids)) for ids in (mine, other))
    assert one.common_length(two) == two.common_length(one) == length
    assert one.common_length(one) == len(one) == length + more
