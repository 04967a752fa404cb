"""The interface between the event loop and the engine thread; no other file knows both.

Commands go in through a queue, outputs come back in one ``call_soon_threadsafe`` per step. When the thread dies, every
waiting request gets an error and ``alive`` becomes false.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from server.engine.engine import Engine
from server.errors import EngineUnavailable, GenerationFailed, QueueFull, QueueShareFull, QueueTimeout, TooManySequences
from server.lora.weights import LoRAWeights
from server.sequence import LoRARequest, SamplingParams, Sequence, StepOutput

logger = logging.getLogger("quickchange.engine")

MAX_FAILED_STEPS = 3
"""Consecutive failed steps that end the engine thread."""
_NUM_ENDS = 64
EXPIRY_SECONDS = 1.0  # between looks for sequences that have waited too long
_FAILURES = {
    "step": "a step failed; its sequences were ended with an error",
    "command": "a command failed; other sequences and adapters are not affected",
    "accounting": "updating the engine's metrics failed",
    "integrity": "integrity check failed; slot table rebuilt",
}
"""Log message of each kind of failure that the thread survives; the kinds are those of ``Metrics``."""

Sink = Callable[[StepOutput | Exception], None]
"""Receives the outputs of a sequence in the event loop, up to its last output or the error that ended it."""


@dataclass(eq=False)
class SubmittedSequence:
    """A sequence in the engine, and the function that receives its outputs."""

    sequence: Sequence
    sink: Sink
    _close: Callable[[int], None]
    since: float = field(default_factory=time.perf_counter)

    @property
    def is_queued(self) -> bool:
        """Whether it has waited for a slot until now."""
        return self.sequence.slot is None and not self.sequence.num_computed

    @property
    def num_cached(self) -> int:
        """Prompt tokens reused from a cached prefix; final when the first output arrives."""
        return self.sequence.num_cached

    @property
    def output_ids(self) -> list[int]:
        """A copy of the tokens so far."""
        return list(self.sequence.output_ids)

    def close(self) -> None:
        """End the sequence unless it has ended."""
        self._close(self.sequence.id)


@dataclass(eq=False)
class Reservation:
    """Room in the queue for sequences of an owner; whoever submits one lowers ``num_sequences`` by one first."""

    owner: str | None
    num_sequences: int


class AsyncEngine:
    """Runs an ``Engine`` in a thread of its own for the event loop that called ``start``.

    An owner has at most ``max_owner_share`` of the sequences that may run or wait. A sequence waits for a slot for
    ``queue_timeout`` seconds at most.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued_seqs: int,
        max_owner_share: float = 1.0,
        queue_timeout: float = 600.0,
    ) -> None:
        self._engine = engine
        self._max_owner_share = max_owner_share
        self._queue_timeout = queue_timeout
        self._expiry: asyncio.TimerHandle | None = None
        self._reservations: set[Reservation] = set()
        self._ends: deque[float] = deque(maxlen=_NUM_ENDS)  # times of the last ends of sequences
        self._max_unfinished = max_queued_seqs + engine.scheduler.max_num_seqs
        self._max_queued_seqs = max_queued_seqs
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # None ends the thread
        self._submitted: dict[int, SubmittedSequence] = {}
        self._loads: set[asyncio.Future[int]] = set()
        self._ids = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._alive = False
        self._failed_steps = 0
        self._accounting_failed = False
        self._step_since: float | None = None

    @property
    def alive(self) -> bool:
        """Whether sequences are accepted and computed."""
        return self._alive

    @property
    def step_seconds(self) -> float:
        """Seconds since the current step began; 0 between steps."""
        since = self._step_since
        return 0.0 if since is None else time.perf_counter() - since

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and output together."""
        return self._engine.scheduler.max_model_len

    def start(self) -> None:
        """Start the thread; outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()  # before ``alive`` is set, because it may fail
        self._alive = True
        self._engine.metrics.engine_up.set(1)

    @contextlib.contextmanager
    def reserve(self, num_sequences: int, *, owner: str | None = None) -> Iterator[Reservation]:
        """Keep room for sequences while their prompts are rendered. Raises what ``check_capacity`` raises."""
        self.check_capacity(num_sequences, owner=owner)
        reservation = Reservation(owner, num_sequences)
        self._reservations.add(reservation)
        try:
            yield reservation
        finally:
            self._reservations.discard(reservation)

    def check_capacity(self, num_sequences: int, *, owner: str | None = None) -> None:
        """Raises an error if this number of sequences would be refused.

        ``TooManySequences`` if they would always be, ``QueueFull`` if they are now, ``QueueShareFull`` if those of
        ``owner`` are now; ``EngineUnavailable``.
        """
        if num_sequences > self._max_unfinished:
            raise TooManySequences(num_sequences, self._max_unfinished)
        if not self._alive:
            raise EngineUnavailable("The engine is not running.")
        reserved = sum(reservation.num_sequences for reservation in self._reservations)
        if len(self._submitted) + reserved + num_sequences > self._max_unfinished:
            raise QueueFull(self._max_queued_seqs, retry_after=self._queue_seconds())
        max_owned = max(1, int(self._max_owner_share * self._max_unfinished))
        if owner is not None and self._num_owned(owner) + num_sequences > max_owned:
            raise QueueShareFull(max_owned, retry_after=self._queue_seconds())

    def _num_owned(self, owner: str) -> int:
        """Sequences of an owner, submitted or reserved."""
        reserved = sum(each.num_sequences for each in self._reservations if each.owner == owner)
        return reserved + sum(each.sequence.owner == owner for each in self._submitted.values())

    def _queue_seconds(self) -> float:
        """How long the queue takes at the rate at which sequences end, or if those that run ended now."""
        num_running = self._engine.scheduler.max_num_seqs
        since = self._ends or [submitted.since for submitted in self._submitted.values()][:1] or [time.perf_counter()]
        seconds = (time.perf_counter() - since[0]) / (len(self._ends) or num_running)
        return seconds * max(0, len(self._submitted) - num_running)

    def submit(
        self,
        prompt_ids: Iterable[int],
        *,
        sink: Sink,
        params: SamplingParams,
        max_tokens: int,
        adapters: tuple[LoRARequest, ...],
        eos_ids: frozenset[int],
        cache_namespace: bytes = b"",
        owner: str = "",
    ) -> SubmittedSequence:
        """Queue a sequence whose ``adapters`` are loaded and leased. Raises what ``check_capacity`` raises.

        ``sink`` is called in the event loop, and no more after ``close`` of the submitted sequence.
        """
        self.check_capacity(1)
        sequence = Sequence(
            next(self._ids), tuple(prompt_ids), max_tokens, params, adapters, eos_ids, cache_namespace, owner
        )
        if not self._submitted:  # another load, at another rate
            self._ends.clear()
        submitted = self._submitted[sequence.id] = SubmittedSequence(sequence, sink, self._close)
        self._inbox.put(partial(self._add, sequence))
        if self._expiry is None:
            self._expiry = self._loop.call_later(EXPIRY_SECONDS, self._expire)
        return submitted

    def _expire(self) -> None:
        """End sequences that have waited too long for a slot; runs while there are sequences."""
        self._expiry = None
        oldest = time.perf_counter() - self._queue_timeout
        for submitted in list(self._submitted.values()):
            if submitted.since < oldest and submitted.is_queued:
                submitted.sink(QueueTimeout(self._queue_timeout, retry_after=self._queue_seconds()))
                submitted.close()
        if self._submitted:
            self._expiry = self._loop.call_later(EXPIRY_SECONDS, self._expire)

    async def load_adapter(self, digest: str, weights: LoRAWeights) -> int:
        """Load prepared weights into the bank between two steps; returns their bytes there."""
        if not self._alive:
            raise EngineUnavailable("The engine is not running.")
        loaded: asyncio.Future[int] = self._loop.create_future()
        self._loads.add(loaded)
        loaded.add_done_callback(self._loads.discard)
        self._inbox.put(partial(self._load, digest, weights, loaded))
        return await loaded

    def release_cached(self) -> None:
        """Empty the cached prefixes between two steps, but for those of one full batch."""
        self._inbox.put(partial(self._attempt, "command", self._engine.release_cached))

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter's weights between two steps; no sequence may use it."""
        self._inbox.put(partial(self._attempt, "command", self._engine.remove_adapter, digest))

    async def stop(self, timeout: float) -> None:
        """Stop accepting sequences, wait ``timeout`` seconds for the running ones, and end the thread if started."""
        self._alive = False
        if self._thread.ident is None:
            return
        deadline = self._loop.time() + timeout
        while self._submitted and self._loop.time() < deadline and self._thread.is_alive():
            await asyncio.sleep(0.05)
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, 60)

    def fail_all(self, error: Exception) -> None:
        """In the event loop: end every sequence with an error, and accept no more."""
        self._alive = False
        for sequence_id, submitted in list(self._submitted.items()):
            submitted.sink(error)
            self._close(sequence_id)

    def _close(self, sequence_id: int) -> None:
        if self._submitted.pop(sequence_id, None) is not None:
            self._inbox.put(partial(self._abort, sequence_id))

    def _dispatch(self, outputs: list[StepOutput]) -> None:
        """In the event loop: call the sink of each output's sequence, unless that was closed."""
        for output in outputs:
            submitted = self._submitted.get(output.sequence_id)
            if submitted is None:
                continue
            try:
                submitted.sink(output if output.failed is None else _failure(output))
            except Exception:
                logger.exception("sequence %d aborted: delivering its output failed", output.sequence_id)
                self._close(output.sequence_id)
            if output.last:
                self._ends.append(time.perf_counter())
                self._submitted.pop(output.sequence_id, None)

    def _end_all(self, error: Exception) -> None:
        """In the event loop, after the end of the thread: all waiting requests and loads get the error."""
        self._alive = False
        for submitted in self._submitted.values():
            submitted.sink(error)
        self._submitted.clear()
        for loaded in list(self._loads):
            _settle(loaded, error)

    def _run(self) -> None:
        """The thread's loop: carry out commands, then run a step.

        A failure ends only the sequence, adapter load or step that it belongs to. The thread ends after ``stop``,
        after ``MAX_FAILED_STEPS`` failed steps in a row, or by an exception outside ``Exception``.
        """
        reason = EngineUnavailable("The engine was stopped.")
        try:
            while self._take_commands():
                since = self._step_since = time.perf_counter()
                outputs = self._step()
                self._step_since = None
                self._send(outputs)
                self._account(self._engine.record_step, outputs, time.perf_counter() - since)
        except BaseException as error:
            logger.exception("the engine died")
            reason = EngineUnavailable(f"The engine died ({type(error).__name__}); restart the server.")
        finally:
            _call(self._loop, self._end_all, reason)
            self._engine.metrics.engine_up.set(0)

    def _account(self, action: Callable[..., None], *arguments: object) -> None:
        """Update metrics. A failure affects nothing else, and is logged once until an update succeeds."""
        try:
            action(*arguments)
        except Exception:
            if not self._accounting_failed:
                logger.exception(_FAILURES["accounting"])
            self._count("accounting")
            self._accounting_failed = True
            return
        self._accounting_failed = False

    def _step(self) -> list[StepOutput]:
        """Run a step. A failed step ends the sequences of its batch only."""
        try:
            outputs = self._engine.step()
        except Exception:
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise
            logger.exception(_FAILURES["step"])
            self._count("step")
            return self._engine.fail_batch("the step failed")
        self._failed_steps = 0
        return outputs

    def _take_commands(self) -> bool:
        """Carry out queued commands; block while the engine is idle. False ends the thread."""
        while self._engine.idle or not self._inbox.empty():
            if self._engine.idle and self._inbox.empty():
                self._on_idle()
            command = self._inbox.get()
            if command is None:
                return False
            command()
        return True

    def _on_idle(self) -> None:
        """Check the integrity of sequences and slots, repair them if the check fails, and update the gauges."""
        if self._attempt("integrity", self._engine.scheduler.check_integrity) is not None:
            self._send(self._engine.repair("an internal consistency check failed"))
        self._account(self._engine.update_gauges)

    def _add(self, sequence: Sequence) -> None:
        if self._attempt("command", self._engine.add, sequence) is not None:
            self._send(self._engine.evict(sequence.id, "it could not be queued"))

    def _abort(self, sequence_id: int) -> None:
        if self._attempt("command", self._engine.abort, sequence_id) is not None:
            self._send(self._engine.evict(sequence_id, "it could not be ended"))

    def _load(self, digest: str, weights: LoRAWeights, loaded: asyncio.Future[int]) -> None:
        result: int | Exception
        try:
            result = self._engine.runner.add_adapter(digest, weights)
        except Exception as error:
            logger.exception(_FAILURES["command"])
            self._count("command")
            self._attempt("command", self._engine.remove_adapter, digest)
            result = error
        _call(self._loop, _settle, loaded, result)

    def _attempt(self, kind: str, action: Callable[..., object], *arguments: object) -> Exception | None:
        """Call ``action``, whose failure must not end the thread; the exception, logged and counted, or None."""
        try:
            action(*arguments)
        except Exception as error:
            logger.exception(_FAILURES[kind])
            self._count(kind)
            return error
        return None

    def _count(self, kind: str) -> None:
        with contextlib.suppress(Exception):
            self._engine.metrics.engine_failures.labels(kind).inc()

    def _send(self, outputs: list[StepOutput]) -> None:
        _call(self._loop, self._dispatch, outputs)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Run a function in the event loop, unless the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _settle(loaded: asyncio.Future[int], result: int | Exception) -> None:
    if loaded.done():
        return
    if isinstance(result, Exception):
        loaded.set_exception(result)
    else:
        loaded.set_result(result)


def _failure(output: StepOutput) -> GenerationFailed:
    return GenerationFailed(f"The generation failed: {output.failed}.")
