"""One engine step: schedule, run, sample, update. No asyncio, HTTP or text; one thread owns it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from server.engine.scheduler import Scheduler
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model.sampler import Sampler
from server.sequence import Batch, KVOperation, Sequence, StepOutput


class Runner(Protocol):
    """The model as the engine sees it: ``model.runner.ModelRunner``, or a script in tests."""

    def run(self, batch: Batch) -> tuple[torch.Tensor, Batch]:
        """Logits of the batch's draws, [len(draws), vocab], and the batch in the order of the logits.

        The returned batch may have its segments in another order, and has the sums of hidden states that are asked for.
        """
        ...

    def apply(self, kv_ops: Iterable[KVOperation]) -> None:
        """Apply KV operations between two steps."""
        ...

    @property
    def num_copied_bytes(self) -> int:
        """Bytes of copies of adapters, beside their own tensors."""
        ...

    def add_adapter(self, digest: str, weights: LoRAWeights) -> int:
        """Load an adapter's weights; returns their bytes."""
        ...

    def remove_adapter(self, digest: str) -> None:
        """Free an adapter's weights."""
        ...


class Engine:
    """Runs sequences step by step. ``batch`` is that of the last step until ``record_step``."""

    def __init__(self, scheduler: Scheduler, runner: Runner, sampler: Sampler, metrics: Metrics) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.metrics = metrics
        self.batch: Batch | None = None
        metrics.kv_slots.set(scheduler.slots.num_slots)
        metrics.kv_memory_limit.set(scheduler.slots.max_bytes)

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def abort(self, sequence_id: int) -> None:
        self.scheduler.abort(sequence_id)

    def remove_adapter(self, digest: str) -> None:
        """Free an adapter's weights and the n-grams of its outputs."""
        self.runner.remove_adapter(digest)
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.forget(digest)

    def release_cached(self) -> None:
        """Empty the least recently used cached prefixes, so that those of one full batch stay."""
        slots = self.scheduler.slots
        self.runner.apply(slots.release_cached(keep=self.scheduler.max_num_seqs))
        self.update_gauges()

    def evict(self, sequence_id: int, reason: str) -> list[StepOutput]:
        """End a sequence after ``add`` or ``abort`` of it failed, whatever state that left."""
        self.scheduler.evict({sequence_id})
        return _failed([sequence_id], reason)

    def fail_batch(self, reason: str) -> list[StepOutput]:
        """End the sequences of the failed step's batch, or all running ones if it failed before it had a batch."""
        return _failed(self.scheduler.fail_batch(self.batch), reason)

    def repair(self, reason: str) -> list[StepOutput]:
        """Rebuild the slot table, and end the sequences that cannot continue."""
        return _failed(self.scheduler.repair(), reason)

    def step(self) -> list[StepOutput]:
        """One or more tokens for each decoding sequence, one prompt chunk for the others."""
        self.batch = self.scheduler.schedule()
        logits, self.batch = self.runner.run(self.batch)
        tokens = self.sampler.sample(logits, self.batch.draws)
        return self.scheduler.update(self.batch, tokens)

    def record_step(self, outputs: list[StepOutput], seconds: float) -> None:
        """Count the last step."""
        batch, self.batch = self.batch, None
        if batch is None:
            return
        self.metrics.step_duration.observe(seconds)
        self.metrics.step_rows.observe(batch.num_rows)
        self.metrics.step_sequences.observe(len(batch.segments))
        self.metrics.step_adapters.observe(len({segment.sequence.adapters for segment in batch.segments}))
        self.metrics.draft_tokens.inc(sum(len(segment.drafts) for segment in batch.segments if not segment.forced))
        num_forced = self.scheduler.num_forced
        num_extra = len(outputs) - len({output.sequence_id for output in outputs})
        self.metrics.accepted_draft_tokens.inc(num_extra - num_forced)
        self.metrics.forced_tokens.inc(num_forced)
        self.update_gauges()

    def update_gauges(self) -> None:
        """Set the gauges of queue, batch and slots."""
        self.metrics.queued.set(len(self.scheduler.waiting))
        self.metrics.running.set(len(self.scheduler.running))
        self.metrics.paused.set(len(self.scheduler.paused))
        slots = self.scheduler.slots
        self.metrics.kv_slots_used.set(slots.num_used)
        self.metrics.kv_slots_cached.set(slots.num_cached)
        self.metrics.kv_memory.set(slots.num_bytes)
        self.metrics.kv_memory_used.set(slots.num_used_bytes)
        self.metrics.adapter_copies.set(self.runner.num_copied_bytes)


def _failed(sequence_ids: Iterable[int], reason: str) -> list[StepOutput]:
    return [StepOutput(sequence_id, None, failed=reason) for sequence_id in sequence_ids]
