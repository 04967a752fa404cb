"""Where the event loop and the engine thread meet; no other file knows both.

Commands go in by a queue, outputs come back by one ``call_soon_threadsafe`` a step. A thread that dies answers every
waiter, and ``alive`` turns false.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from server.engine.engine import Engine
from server.errors import EngineUnavailable, GenerationFailed, QueueFull
from server.lora.weights import LoRAWeights
from server.sequence import AdapterUse, SamplingParams, StepOutput
from server.sequence import Sequence as Generation

logger = logging.getLogger("quickchange.engine")

Argument = TypeVar("Argument")

MAX_FAILED_STEPS = 3
"""Steps that may fail in a row before the engine gives up."""
_FAILURES = {
    "step": "a step failed; its sequences are given up",
    "command": "a command failed; nothing else is disturbed",
    "accounting": "the engine's metrics could not be updated",
    "integrity": "the engine's books contradict themselves; they are made anew",
}
"""What is logged of each kind of failure that the thread survives; the kinds are those of ``Metrics``."""


@dataclass(frozen=True)
class Add:
    """Queue a sequence."""

    sequence: Generation


@dataclass(frozen=True)
class Abort:
    """End a sequence."""

    sequence_id: int


@dataclass(frozen=True)
class LoadAdapter:
    """Put an adapter's rows in; ``done`` is called in the engine thread with their bytes or what went wrong."""

    digest: str
    weights: LoRAWeights
    done: Callable[[int | Exception], None]


@dataclass(frozen=True)
class UnloadAdapter:
    """Free an adapter's rows."""

    digest: str


@dataclass(frozen=True)
class Stop:
    """End the thread."""


Command = Add | Abort | LoadAdapter | UnloadAdapter | Stop


class OutputStream:
    """The outputs of one sequence, in order; made by ``AsyncEngine.submit``."""

    def __init__(self, sequence: Generation, close: Callable[[int], None]) -> None:
        self._sequence = sequence
        self._close = close
        self._outputs: asyncio.Queue[StepOutput | Exception] = asyncio.Queue()
        self._ended = False

    @property
    def sequence_id(self) -> int:
        """Whose outputs these are."""
        return self._sequence.id

    @property
    def num_cached(self) -> int:
        """Prompt tokens that were not computed anew; settled when the first output comes."""
        return self._sequence.num_cached

    def put(self, output: StepOutput | Exception) -> None:
        """Hand an output to the reader."""
        self._outputs.put_nowait(output)

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        """Outputs through the last. Raises ``GenerationFailed`` or ``EngineUnavailable`` rather than wait for ever."""
        while not self._ended:
            output = await self._outputs.get()
            if isinstance(output, Exception):
                self._ended = True
                raise output
            if output.failed is not None:
                self._ended = True
                raise GenerationFailed(f"The generation could not go on: {output.failed}.")
            self._ended = output.last
            yield output

    def close(self) -> None:
        """End the sequence if it is alive."""
        self._ended = True
        self._close(self.sequence_id)


class AsyncEngine:
    """Runs an ``Engine`` in a thread of its own for the event loop that called ``start``."""

    def __init__(self, engine: Engine, *, max_queued_seqs: int) -> None:
        self._engine = engine
        self._max_unfinished = max_queued_seqs + engine.scheduler.max_num_seqs
        self._max_queued_seqs = max_queued_seqs
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._streams: dict[int, OutputStream] = {}
        self._ids = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._alive = False
        self._failed_steps = 0
        self._accounting_failed = False

    @property
    def alive(self) -> bool:
        """Whether sequences are taken and computed."""
        return self._alive

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and output together."""
        return self._engine.scheduler.max_model_len

    @property
    def num_unfinished(self) -> int:
        """Sequences that somebody waits for."""
        return len(self._streams)

    def start(self) -> None:
        """Start the thread; outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()  # where that fails, nothing is alive
        self._alive = True
        self._engine.metrics.engine_up.set(1)

    def check_capacity(self, num_sequences: int) -> None:
        """Raises ``EngineUnavailable`` or ``QueueFull`` where so many sequences would be refused."""
        if not self._alive:
            raise EngineUnavailable("The engine is not running.")
        if len(self._streams) + num_sequences > self._max_unfinished:
            raise QueueFull(self._max_queued_seqs)

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        params: SamplingParams,
        max_tokens: int,
        adapters: tuple[AdapterUse, ...],
        eos_ids: frozenset[int],
        scope: bytes = b"",
    ) -> OutputStream:
        """Queue a sequence. ``adapters`` are loaded and leased. Raises as ``check_capacity``."""
        self.check_capacity(1)
        sequence = Generation(next(self._ids), tuple(prompt_ids), max_tokens, params, adapters, eos_ids, scope)
        stream = self._streams[sequence.id] = OutputStream(sequence, self._close_stream)
        self._inbox.put(Add(sequence))
        return stream

    async def load_adapter(self, digest: str, weights: LoRAWeights) -> int:
        """Put prepared rows into the bank, between two steps; the bytes that they take there."""
        if not self._alive:
            raise EngineUnavailable("The engine is not running.")
        loop = self._loop
        loaded: asyncio.Future[int] = loop.create_future()

        def settle(result: int | Exception) -> None:
            if not loaded.done():
                loaded.set_exception(result) if isinstance(result, Exception) else loaded.set_result(result)

        self._inbox.put(LoadAdapter(digest, weights, lambda result: _call(loop, settle, result)))
        if not self._thread.is_alive():
            self._refuse_loads(EngineUnavailable("The engine is not running."))
        return await loaded

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter's rows, between two steps; nobody may be using it."""
        self._inbox.put(UnloadAdapter(digest))

    async def stop(self, timeout: float) -> None:
        """Stop taking sequences, give the running ones ``timeout`` seconds, and end the thread, if it was started."""
        self._alive = False
        if self._thread.ident is None:
            return
        deadline = self._loop.time() + timeout
        while self._streams and self._loop.time() < deadline and self._thread.is_alive():
            await asyncio.sleep(0.05)
        self._inbox.put(Stop())
        await asyncio.to_thread(self._thread.join, 60)

    def _close_stream(self, sequence_id: int) -> None:
        if self._streams.pop(sequence_id, None) is not None:
            self._inbox.put(Abort(sequence_id))

    def _dispatch(self, outputs: list[StepOutput]) -> None:
        """In the event loop: hand each output to its stream, if somebody still reads it."""
        for output in outputs:
            stream = self._streams.get(output.sequence_id)
            if stream is None:
                continue
            try:
                stream.put(output)
            except Exception:
                logger.exception("an output could not be handed over; its sequence is ended, and no other")
                self._close_stream(output.sequence_id)
            if output.last:
                self._streams.pop(output.sequence_id, None)

    def _end_all(self, error: Exception) -> None:
        """In the event loop: nobody waits for a thread that is gone."""
        self._alive = False
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()
        self._refuse_loads(error)

    def _run(self) -> None:
        """The thread: commands, then a step, while there is something to do.

        What fails here ends the sequence, the adapter or the step that it was about. The thread ends by ``Stop``, by
        steps that keep failing, and by what is no ``Exception``.
        """
        reason = EngineUnavailable("The engine was stopped.")
        try:
            while self._take_commands():
                since = time.perf_counter()
                outputs = self._step()
                self._send(outputs)
                self._account(self._engine.account, outputs, time.perf_counter() - since)
        except BaseException as error:
            logger.exception("the engine died")
            reason = EngineUnavailable(f"The engine died ({type(error).__name__}); restart the server.")
        finally:
            _call(self._loop, self._end_all, reason)
            self._refuse_loads(reason)
            self._engine.metrics.engine_up.set(0)

    def _account(self, action: Callable[..., None], *arguments: object) -> None:
        """Update metrics, whose failure disturbs nobody: one that keeps failing is logged once until it works."""
        try:
            action(*arguments)
        except Exception:
            if not self._accounting_failed:
                logger.exception(_FAILURES["accounting"])
            self._count("accounting")
            self._accounting_failed = True
            return
        self._accounting_failed = False

    def _refuse_loads(self, reason: Exception) -> None:
        """Adapters that were still to be loaded never will be."""
        while not self._inbox.empty():
            if isinstance(command := self._inbox.get(), LoadAdapter):
                command.done(reason)

    def _step(self) -> list[StepOutput]:
        """A step of the engine. One that fails ends the sequences that ran in it, and no others."""
        try:
            outputs = self._engine.step()
        except Exception:
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise
            logger.exception(_FAILURES["step"])
            self._count("step")
            return self._engine.give_up("the step failed")
        self._failed_steps = 0
        return outputs

    def _take_commands(self) -> bool:
        """Carry out what is in the inbox, waiting where there is nothing to compute. False after ``Stop``."""
        while self._engine.idle or not self._inbox.empty():
            if self._engine.idle and self._inbox.empty():
                self._audit()
            command = self._inbox.get()
            if isinstance(command, Stop):
                return False
            self._carry_out(command)
        return True

    def _audit(self) -> None:
        """When the engine goes idle: check its books, mend them where they are wrong, and report them."""
        if self._attempt("integrity", self._engine.check_integrity) is not None:
            self._send(self._engine.mend("the engine's books were wrong"))
        self._account(self._engine.report_load)

    def _carry_out(self, command: Command) -> None:
        """Do what a command says. One that fails has failed for what it is about, and for nothing else."""
        match command:
            case Add(sequence):
                if self._attempt("command", self._engine.add, sequence) is not None:
                    self._send(self._engine.evict(sequence.id, "it could not be queued"))
            case Abort(sequence_id):
                if self._attempt("command", self._engine.abort, sequence_id) is not None:
                    self._send(self._engine.evict(sequence_id, "it could not be ended"))
            case LoadAdapter(digest, weights, done):
                done(self._load(digest, weights))
            case UnloadAdapter(digest):
                self._attempt("command", self._engine.remove_adapter, digest)

    def _load(self, digest: str, weights: LoRAWeights) -> int | Exception:
        try:
            return self._engine.runner.add_adapter(digest, weights)
        except Exception as error:
            logger.exception(_FAILURES["command"])
            self._count("command")
            self._attempt("command", self._engine.remove_adapter, digest)
            return error

    def _attempt(self, kind: str, action: Callable[..., object], *arguments: object) -> Exception | None:
        """Do something whose failure must not end the thread; what went wrong, logged and counted."""
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


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[Argument], None], argument: Argument) -> None:
    """Run a function in the event loop, unless the loop is closed: then nobody waits any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, argument)
