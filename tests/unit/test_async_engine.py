"""Every way a stream can end, ends it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable

import pytest
import torch

from server.engine import async_engine
from server.engine.async_engine import MAX_FAILED_STEPS, AsyncEngine, SubmittedSequence
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.errors import EngineUnavailable, GenerationFailed, QueueFull, QueueShareFull, QueueTimeout
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model.sampler import Sampler
from server.sequence import Batch, FinishReason, KVOperation, SampledToken, SamplingParams, StepOutput
from tests.model.engines import token_ids

EOS = 9
GREEDY = SamplingParams(temperature=0)


class ScriptedRunner:
    """Logits that count upwards: after token n comes n + 1, and 9 is the end. ``gate`` holds a step until it is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.failures: list[BaseException] = []
        self.num_steps = 0
        self.adapters: set[str] = set()
        self.not_finite = False
        self.applied: list[KVOperation] = []

    def run(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        self.gate.wait(10)
        self.num_steps += 1
        if self.failures:
            raise self.failures.pop()
        logits = torch.zeros(len(batch.draws), 10)
        for row, (sequence, *_) in enumerate(batch.draws):
            logits[row, min(sequence.ids(sequence.num_tokens - 1, sequence.num_tokens)[0] + 1, 9)] = 1.0
        return logits * float("nan") if self.not_finite else logits, batch

    num_copied_bytes = 0

    def apply(self, kv_ops: Iterable[KVOperation]) -> None:
        self.applied += kv_ops

    def add_adapter(self, digest: str, weights: LoRAWeights) -> int:
        if digest == "bad":
            raise MemoryError("no room")
        self.adapters.add(digest)
        return 3

    def remove_adapter(self, digest: str) -> None:
        self.adapters.discard(digest)


@pytest.fixture
def runner() -> ScriptedRunner:
    return ScriptedRunner()


@pytest.fixture
async def engine(runner: ScriptedRunner) -> AsyncIterator[AsyncEngine]:
    scheduler = Scheduler(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=100)
    started = AsyncEngine(Engine(scheduler, runner, Sampler(), Metrics()), max_queued_seqs=2)
    started.start()
    yield started
    runner.gate.set()
    await started.stop(1.0)
    if scheduler.idle:  # otherwise the thread ended in the middle of something, as the test wanted
        scheduler.check_integrity()


class OutputStream:
    """The outputs of one sequence, in order, as a reader of its own gets them."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[StepOutput | Exception] = asyncio.Queue()
        self.sequence: SubmittedSequence

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        while True:
            output = await self.queue.get()
            if isinstance(output, Exception):
                raise output
            yield output
            if output.last:
                return

    def close(self) -> None:
        self.sequence.close()


def submit(
    engine: AsyncEngine,
    prompt: Iterable[int] = (1,),
    *,
    params: SamplingParams = GREEDY,
    max_tokens: int = 50,
    eos_ids: frozenset[int] = frozenset({EOS}),
) -> OutputStream:
    stream = OutputStream()
    stream.sequence = engine.submit(
        prompt, sink=stream.queue.put_nowait, params=params, max_tokens=max_tokens, adapters=(), eos_ids=eos_ids
    )
    return stream


async def tokens(stream: OutputStream) -> list[int | None]:
    return token_ids([output async for output in stream])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_sequence_ends_at_its_eos(engine: AsyncEngine) -> None:
    outputs = [output async for output in submit(engine, [5])]
    assert token_ids(outputs) == [6, 7, 8, 9]
    assert outputs[-1].finish_reason is FinishReason.STOP


async def test_a_sequence_ends_at_its_length(engine: AsyncEngine) -> None:
    outputs = [output async for output in submit(engine, max_tokens=3)]
    assert (len(outputs), outputs[-1].finish_reason) == (3, FinishReason.LENGTH)


async def test_more_sequences_than_slots_all_finish(engine: AsyncEngine) -> None:
    answers = await asyncio.gather(*(tokens(submit(engine, [start])) for start in (1, 2, 3, 4)))
    assert answers == [[*range(start + 1, 10)] for start in (1, 2, 3, 4)]


async def test_a_closed_stream_stops_its_sequence_within_a_step(engine: AsyncEngine, runner: ScriptedRunner) -> None:
    runner.gate.clear()
    stream = submit(engine)
    stream.close()
    stream.close()
    runner.gate.set()
    await until(lambda: engine._engine.idle)
    assert runner.num_steps <= 1
    assert not engine._submitted


async def test_nothing_comes_of_a_sequence_that_was_closed_among_the_tokens_of_one_step(
    engine: AsyncEngine, runner: ScriptedRunner
) -> None:
    runner.gate.clear()
    stream = submit(engine)
    sequence, got = stream.sequence, list[int]()

    def sink(output: StepOutput | Exception) -> None:
        assert isinstance(output, StepOutput) and output.token is not None
        got.append(output.token.id)
        if output.token.id == 6:
            sequence.close()

    sequence.sink = sink
    outputs = [StepOutput(sequence.sequence.id, SampledToken(token)) for token in (5, 6, 7)]
    engine._dispatch(outputs)
    assert got == [5, 6]


async def test_a_full_queue_refuses_at_once(engine: AsyncEngine, runner: ScriptedRunner) -> None:
    runner.gate.clear()
    streams = [submit(engine) for _ in range(4)]
    with pytest.raises(QueueFull, match="2 generations are queued"):
        submit(engine)
    streams[0].close()
    engine.check_capacity(1)


async def test_a_failed_step_ends_its_sequences_and_the_engine_goes_on(
    engine: AsyncEngine, runner: ScriptedRunner
) -> None:
    runner.failures = [ValueError("bad step")]
    with pytest.raises(GenerationFailed, match="step failed"):
        await tokens(submit(engine))
    assert await tokens(submit(engine, [7])) == [8, 9]
    assert engine.alive


async def test_an_engine_whose_steps_keep_failing_answers_everyone_and_is_dead(
    engine: AsyncEngine, runner: ScriptedRunner
) -> None:
    runner.failures = [ValueError("bad step")] * MAX_FAILED_STEPS
    for _ in range(MAX_FAILED_STEPS - 1):
        with pytest.raises(GenerationFailed):
            await tokens(submit(engine))
    with pytest.raises(EngineUnavailable, match="died"):
        await tokens(submit(engine))
    await until(lambda: not engine.alive)
    with pytest.raises(EngineUnavailable):
        submit(engine)
    with pytest.raises(EngineUnavailable):
        await engine.load_adapter("a", LoRAWeights({}))


async def test_a_dying_thread_answers_waiters_in_the_queue_too(engine: AsyncEngine, runner: ScriptedRunner) -> None:
    runner.gate.clear()
    runner.failures = [SystemExit()]
    streams = [submit(engine) for _ in range(4)]
    runner.gate.set()
    for stream in streams:
        with pytest.raises(EngineUnavailable):
            await tokens(stream)


async def test_scores_that_are_not_finite_fail_one_generation(engine: AsyncEngine, runner: ScriptedRunner) -> None:
    runner.not_finite = True
    with pytest.raises(GenerationFailed, match="NaN or infinite"):
        await tokens(submit(engine))
    runner.not_finite = False
    assert await tokens(submit(engine, [8])) == [9]


async def test_stopping_lets_running_sequences_finish_and_refuses_new_ones(
    engine: AsyncEngine, runner: ScriptedRunner
) -> None:
    runner.gate.clear()
    stream = submit(engine, [5])
    stopping = asyncio.create_task(engine.stop(5.0))
    await asyncio.sleep(0.01)
    with pytest.raises(EngineUnavailable):
        submit(engine)
    runner.gate.set()
    assert await tokens(stream) == [6, 7, 8, 9]
    await stopping


async def test_stopping_without_patience_answers_who_still_waits(engine: AsyncEngine, runner: ScriptedRunner) -> None:
    runner.gate.clear()
    stream = submit(engine)
    stopping = asyncio.create_task(engine.stop(0.0))
    await asyncio.sleep(0.01)
    runner.gate.set()
    with pytest.raises(EngineUnavailable, match="stopped"):
        await tokens(stream)
    await stopping


async def test_adapters_are_loaded_between_steps_and_errors_come_back(
    engine: AsyncEngine, runner: ScriptedRunner
) -> None:
    assert await engine.load_adapter("good", LoRAWeights({})) == 3
    assert runner.adapters == {"good"}
    with pytest.raises(MemoryError):
        await engine.load_adapter("bad", LoRAWeights({}))
    engine.unload_adapter("good")
    await until(lambda: not runner.adapters)
    assert engine.alive


async def test_a_seed_gives_the_same_tokens_alone_and_beside_others(engine: AsyncEngine) -> None:
    def sampled(seed: int) -> OutputStream:
        return submit(engine, params=SamplingParams(temperature=2.0, seed=seed), max_tokens=20, eos_ids=frozenset())

    alone = await tokens(sampled(7))
    both = await asyncio.gather(tokens(sampled(8)), tokens(sampled(7)))
    assert both[1] == alone
    assert both[0] != alone


async def test_a_key_with_its_share_of_the_queue_is_refused_while_others_have_room(runner: ScriptedRunner) -> None:
    """One client filled the queue, and everybody got a 503."""
    scheduler = Scheduler(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=100)
    engine = AsyncEngine(Engine(scheduler, runner, Sampler(), Metrics()), max_queued_seqs=6, max_owner_share=0.5)
    engine.start()
    try:
        with engine.reserve(4, owner="a"):
            with pytest.raises(QueueShareFull) as refused:
                engine.check_capacity(1, owner="a")
            assert refused.value.limit == 4
            engine.check_capacity(4, owner="b")
            with pytest.raises(QueueFull):
                engine.check_capacity(5)
        engine.check_capacity(4, owner="a")
    finally:
        await engine.stop(1.0)


async def test_the_time_to_retry_follows_the_rate_at_which_sequences_end(
    engine: AsyncEngine, runner: ScriptedRunner
) -> None:
    runner.gate.clear()
    for _ in range(4):
        submit(engine)
    now = time.perf_counter()
    engine._ends.clear()
    engine._ends.extend([now - 30, now - 20, now - 10])
    with pytest.raises(QueueFull) as refused:
        engine.check_capacity(1)
    assert refused.value.retry_after == pytest.approx(2 * 30 / 3, rel=0.1)
    engine._ends.clear()
    next(iter(engine._submitted.values())).since = now - 8
    with pytest.raises(QueueFull) as refused:
        engine.check_capacity(1)
    assert refused.value.retry_after == pytest.approx(2 * 8 / 2, rel=0.1), "none has ended yet"


async def test_a_sequence_that_waits_too_long_for_a_slot_gets_an_error(
    runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "EXPIRY_SECONDS", 0.02)
    scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=100)
    engine = AsyncEngine(Engine(scheduler, runner, Sampler(), Metrics()), max_queued_seqs=6, queue_timeout=0.1)
    engine.start()
    try:
        runner.gate.clear()
        running = submit(engine)
        await until(lambda: bool(scheduler.running))
        waiting = submit(engine)
        with pytest.raises(QueueTimeout):
            await tokens(waiting)
        runner.gate.set()
        assert len(await tokens(running)) == 8
    finally:
        runner.gate.set()
        await engine.stop(1.0)


async def test_cached_prefixes_beyond_a_full_batch_are_released_in_the_thread(runner: ScriptedRunner) -> None:
    slots = SlotTable(4, max_len=100, reuses=True)
    scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=100, slots=slots)
    engine = AsyncEngine(Engine(scheduler, runner, Sampler(), Metrics()), max_queued_seqs=6)
    engine.start()
    try:
        for first in (1, 2, 3):
            await tokens(submit(engine, prompt=[first] * 40))
        assert slots.num_cached == 3
        engine.release_cached()
        await until(lambda: slots.num_cached == 1)
        assert len(runner.applied) == 2
        assert len(await tokens(submit(engine))) == 8
    finally:
        await engine.stop(1.0)
