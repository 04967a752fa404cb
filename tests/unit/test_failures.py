"""A failure in the engine thread ends what it is about, and nothing else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.errors import EngineUnavailable, GenerationFailed
from server.integrity import IntegrityError
from server.lora.weights import LoRAWeights
from server.metrics import ENGINE_FAILURES, Metrics
from server.model.sampler import Sampler
from server.sequence import Batch, ReleaseTail, SampledToken, SamplingParams, Sequence
from tests.unit.test_async_engine import EOS, OutputStream, ScriptedRunner, submit, tokens, until

PROMPT = (1,) * 20
ANSWER = [2, 3, 4, 5, 6, 7, 8, 9]


class DraftedRunner(ScriptedRunner):
    """Counts upwards behind drafts, too."""

    def run(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        logits, batch = super().run(batch)
        for row, draw in enumerate(batch.draws):
            if draw.given is not None:
                logits[row] = 0.0
                logits[row, min(draw.given + 1, EOS)] = 1.0
        return logits, batch


class Failing:
    """An attribute of an object that raises instead of working for the first ``times`` calls, before or after it."""

    def __init__(self, owner: Any, name: str, *, times: int = 1, after: bool = False) -> None:
        self.left, self.num_calls = times, 0
        stock: Callable[..., Any] = getattr(owner, name)

        def failing(*given: Any, **named: Any) -> Any:
            self.num_calls += 1
            if not self.left:
                return stock(*given, **named)
            self.left -= 1
            if after:
                stock(*given, **named)
            raise MemoryError(f"no memory for {name}")

        setattr(owner, name, failing)


@pytest.fixture
def runner() -> ScriptedRunner:
    return DraftedRunner()


@pytest.fixture
async def started(runner: ScriptedRunner) -> AsyncIterator[AsyncEngine]:
    """An engine with prefixes, whose state is consistent when the test ends, whatever failed in it."""
    slots = SlotTable(4, max_len=100, reuses=True)
    scheduler = Scheduler(max_num_seqs=2, max_num_batched_tokens=64, max_model_len=100, slots=slots, max_draft_tokens=4)
    engine = AsyncEngine(Engine(scheduler, runner, Sampler(), Metrics()), max_queued_seqs=8)
    engine.start()
    yield engine
    runner.gate.set()
    assert engine.alive, "the failure ended the thread"
    stream = submit(engine, (1,) * 30)
    assert await tokens(stream) == ANSWER
    await engine.stop(1.0)
    assert scheduler.idle
    scheduler.check_integrity()


def failures(engine: AsyncEngine) -> dict[str, float]:
    """Those that were counted, by kind."""
    counter = engine._engine.metrics.engine_failures
    found = {kind: counter.labels(kind)._value.get() for kind in ENGINE_FAILURES}
    return {kind: count for kind, count in found.items() if count}


async def hold(engine: AsyncEngine, runner: ScriptedRunner) -> OutputStream:
    """A sequence that runs, in a step that waits for the runner's gate."""
    runner.gate.clear()
    stream = submit(engine, PROMPT)
    await until(lambda: bool(engine._engine.scheduler.running))
    return stream


@pytest.mark.parametrize("after", [False, True])
async def test_a_sequence_that_cannot_be_queued_fails_alone(
    started: AsyncEngine, runner: ScriptedRunner, *, after: bool
) -> None:
    """Commands were outside of every failure domain: an exception in one ended the engine for everybody."""
    running = await hold(started, runner)
    Failing(started._engine.scheduler, "add", after=after)
    failed = submit(started, PROMPT)
    runner.gate.set()
    with pytest.raises(GenerationFailed, match="could not be queued"):
        await tokens(failed)
    assert await tokens(running) == ANSWER
    assert failures(started) == {"command": 1}


@pytest.mark.parametrize("after", [False, True])
async def test_a_sequence_that_cannot_be_aborted_ends_all_the_same(
    started: AsyncEngine, runner: ScriptedRunner, *, after: bool
) -> None:
    streams = [await hold(started, runner), submit(started, PROMPT)]
    Failing(started._engine.scheduler, "abort", after=after)
    streams[0].close()
    runner.gate.set()
    assert await tokens(streams[1]) == ANSWER
    assert failures(started) == {"command": 1}


async def test_an_abort_that_fails_half_way_gives_its_slot_back(started: AsyncEngine, runner: ScriptedRunner) -> None:
    """The sequence runs no more, but its slot was not given back: on a busy server it would be lost for ever."""
    streams = [await hold(started, runner), submit(started, PROMPT)]
    Failing(started._engine.scheduler.slots, "free")
    streams[0].close()
    runner.gate.set()
    assert await tokens(streams[1]) == ANSWER
    assert failures(started) == {"command": 1}


async def test_an_adapter_that_cannot_be_loaded_is_an_error_for_who_waits_for_it(
    started: AsyncEngine, runner: ScriptedRunner
) -> None:
    """The clean-up of a load that had failed raised a KeyError, and the engine was dead for everybody."""
    Failing(runner, "remove_adapter", times=2)
    with pytest.raises(MemoryError):
        await started.load_adapter("bad", LoRAWeights({}))
    started.unload_adapter("bad")
    await started.load_adapter("good", LoRAWeights({}))
    assert runner.adapters == {"good"}
    assert failures(started) == {"command": 3}


@pytest.mark.parametrize("metric", ["step_duration", "step_rows", "kv_memory"])
async def test_outputs_reach_their_clients_where_metrics_fail(
    started: AsyncEngine, metric: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = getattr(started._engine.metrics, metric)
    for name in ("observe", "set"):
        if hasattr(broken, name):
            Failing(broken, name, times=1000)
    assert await tokens(submit(started, PROMPT)) == ANSWER
    await until(lambda: failures(started).get("accounting", 0) > 3)
    assert failures(started).keys() == {"accounting"}
    assert len([record for record in caplog.records if "metrics" in record.message]) <= 3, "one a step"


async def test_a_metric_that_keeps_failing_is_logged_once_however_often_the_engine_goes_idle(
    started: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time it went idle there was another traceback."""
    gauge = Failing(started._engine.metrics.kv_memory, "set", times=1000)
    check = Failing(started._engine.scheduler, "check_integrity", times=0)
    for _ in range(4):
        check.num_calls = 0
        assert await tokens(submit(started, PROMPT)) == ANSWER
        await until(lambda: check.num_calls > 0)  # the engine is idle
    assert len([record for record in caplog.records if "metrics" in record.message]) == 1
    gauge.left = 0


async def test_an_output_that_cannot_be_handed_over_ends_its_own_sequence_alone(
    started: AsyncEngine, runner: ScriptedRunner
) -> None:
    streams = [await hold(started, runner), submit(started, PROMPT)]
    Failing(streams[0].sequence, "sink")
    runner.gate.set()
    assert await tokens(streams[1]) == ANSWER
    assert not started._submitted


def _leak_bytes(scheduler: Scheduler) -> None:
    scheduler.slots.num_bytes += 1


def _leak_a_slot(scheduler: Scheduler) -> None:
    gone = Sequence(99, PROMPT, 5, SamplingParams())
    scheduler.slots.allocate(gone)


def _forge_a_prefix(scheduler: Scheduler) -> None:
    next(slot for slot in scheduler.slots._slots if slot.prefix).num_touched = 3


@pytest.mark.parametrize("spoil", [_leak_bytes, _leak_a_slot, _forge_a_prefix])
async def test_inconsistent_state_is_repaired_when_the_engine_goes_idle(
    started: AsyncEngine, spoil: Callable[[Scheduler], None]
) -> None:
    """A byte too many, found by the check that runs in production, ended the engine."""
    scheduler = started._engine.scheduler
    assert await tokens(submit(started, PROMPT)) == ANSWER
    await until(lambda: started._engine.idle)
    await asyncio.sleep(0.05)  # the thread has checked its state, and waits
    spoil(scheduler)
    with pytest.raises(IntegrityError):
        scheduler.check_integrity()
    started.unload_adapter("none")  # any command: behind it the engine is idle again
    await until(lambda: failures(started) == {"integrity": 1})
    await until(lambda: scheduler.slots.num_cached == 0)
    scheduler.check_integrity()
    assert scheduler.slots.num_bytes == 0
    assert {ReleaseTail(number, 0) for number in range(4)} <= set(scheduler.slots._kv_ops)


async def test_a_check_that_always_fails_disturbs_nobody(started: AsyncEngine) -> None:
    """The check itself may be wrong."""
    check = Failing(started._engine.scheduler, "check_integrity", times=1000)
    for _ in range(3):
        assert await tokens(submit(started, PROMPT)) == ANSWER
        await until(lambda: check.num_calls >= 2)  # the engine is idle, and repaired
        check.num_calls = 0
    check.left = 0


async def test_an_update_that_fails_half_way_ends_its_sequences_and_leaves_sound_slots(
    started: AsyncEngine, runner: ScriptedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sequences that end in the same step the first has given its slot back, the second has not."""
    streams = [await hold(started, runner), submit(started, PROMPT)]
    slots = started._engine.scheduler.slots
    stock = slots.free
    failed: list[Sequence] = []

    def free(sequence: Sequence) -> None:
        if slots.num_used == 1 and not failed:
            failed.append(sequence)
            raise MemoryError
        stock(sequence)

    monkeypatch.setattr(slots, "free", free)
    runner.gate.set()
    results = await asyncio.gather(*map(tokens, streams), return_exceptions=True)
    assert any(isinstance(result, GenerationFailed) for result in results)
    assert failures(started) == {"step": 1}


@pytest.mark.parametrize("owner", ["slots", "speculation"])
async def test_a_failure_anywhere_in_a_step_answers_everybody_in_it(started: AsyncEngine, owner: str) -> None:
    """A sequence that was no longer in the queue and not yet among the running was forgotten: it waited for ever."""
    broken = getattr(started._engine.scheduler, owner)
    for name in {"slots": ("allocate", "begin_step", "free"), "speculation": ("add_drafts", "learn")}[owner]:
        Failing(broken, name)
        with pytest.raises(GenerationFailed, match="step failed"):
            async with asyncio.timeout(5):
                await tokens(submit(started, PROMPT))
        assert await tokens(submit(started, PROMPT)) == ANSWER


async def test_what_is_no_exception_is_fatal_and_everybody_is_told() -> None:
    runner = ScriptedRunner()
    scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=100)
    engine = AsyncEngine(Engine(scheduler, runner, Sampler(), Metrics()), max_queued_seqs=2)
    engine.start()
    stream = await hold(engine, runner)
    waiting = submit(engine, PROMPT)
    runner.failures = [SystemExit()]
    runner.gate.set()
    for sequence in (stream, waiting):
        with pytest.raises(EngineUnavailable, match="died"):
            await tokens(sequence)
    await engine.stop(1.0)
    assert engine._engine.metrics.engine_up._value.get() == 0


async def test_an_engine_that_was_never_started_can_be_stopped() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=100)
    engine = AsyncEngine(Engine(scheduler, ScriptedRunner(), Sampler(), Metrics()), max_queued_seqs=2)
    await engine.stop(1.0)
    assert not engine.alive


def test_a_repair_keeps_running_sequences_where_it_can_and_ends_them_where_it_cannot() -> None:
    scheduler = Scheduler(max_num_seqs=3, max_num_batched_tokens=64, max_model_len=100)
    running = [Sequence(number, PROMPT, 5, SamplingParams()) for number in (1, 2)]
    for sequence in running:
        scheduler.add(sequence)
    scheduler.update(scheduler.schedule(), [SampledToken(7), SampledToken(7)])
    scheduler.slots.num_bytes += 1
    assert scheduler.repair() == []
    scheduler.check_integrity()
    running[1].slot = running[0].slot
    assert scheduler.repair() == [1, 2]
    scheduler.check_integrity()
    assert scheduler.idle


def test_integrity_checks_run_without_assertions_too() -> None:
    """Under ``python -O`` every ``assert`` of the checks was gone."""
    program = (
        "from server.engine.scheduler import Scheduler\n"
        "from server.integrity import IntegrityError\n"
        "scheduler = Scheduler(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=9)\n"
        "scheduler.slots.num_bytes += 1\n"
        "try:\n    scheduler.check_integrity()\nexcept IntegrityError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "memory is miscounted\n"
