"""Which sequences run, and what each step computes.

Continuous batching (Yu et al. 2022, Orca): sequences join and leave at every step. Decoding sequences come first, one
row each. The rest of the token budget goes to prompt chunks, oldest sequence first; while any sequence decodes, prompt
rows are limited, so that a long prompt cannot make steps slow. The remaining budget goes to drafts (``speculation``).

Running sequences are shared fairly among owners (``fair_queue``). Where an owner has more than its share and another
one waits, a sequence of the former pauses: it keeps its slot, with its keys and values, and leaves the batch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from server.engine.fair_queue import FairQueue
from server.engine.slots import SlotTable
from server.engine.speculation import Speculation
from server.integrity import ensure
from server.sequence import Batch, Doubles, FinishReason, SampledToken, Segment, Sequence, StepOutput

DEFAULT_SCORED_ROWS = 128
_GRAMMAR_LIMIT = "its grammar cannot be followed within the limits of work"


class Scheduler:
    """Queue, running sequences and slots. ``max_model_len`` limits prompt and output together, in tokens.

    ``max_prefill_tokens`` limits the prompt rows of a step with decoding sequences. Without ``slots`` there is one slot
    for each of ``max_num_seqs`` sequences, and no prefix reuse. ``max_draft_tokens`` limits the drafts of a sequence in
    a step; 0 turns speculation off. ``max_scored_rows`` limits the rows of a step whose logits are needed for prompt
    log probabilities or for tokens that a grammar forces. An owner has at most ``max_owner_share`` of the running
    sequences while another one waits.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_prefill_tokens: int | None = None,
        max_draft_tokens: int = 0,
        max_scored_rows: int = DEFAULT_SCORED_ROWS,
        slots: SlotTable | None = None,
        max_owner_share: float = 0.75,
    ) -> None:
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.max_owner_seqs = max(1, int(max_owner_share * max_num_seqs))
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs + 1)
        self.max_prefill_tokens = max_prefill_tokens or self.max_num_batched_tokens
        self.max_scored_rows = max_scored_rows
        self.slots = slots or SlotTable(max_num_seqs, max_len=max_model_len)
        assert self.slots.num_slots >= max_num_seqs and self.slots.max_len == max_model_len
        self.num_forced = 0  # tokens of this step that grammars forced
        self._max_forced = self.max_num_batched_tokens // max_num_seqs - 1  # so that all sequences have room for a row
        self.speculation: Speculation | None = None
        if max_draft_tokens:
            self.speculation = Speculation(max_drafts=max_draft_tokens, max_model_len=max_model_len)
        self.waiting = FairQueue()
        self.running: dict[int, Sequence] = {}
        self.paused: dict[int, Sequence] = {}

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self.paused

    @property
    def holders(self) -> list[Sequence]:
        """The sequences that hold a slot: running and paused ones."""
        return [*self.running.values(), *self.paused.values()]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, whose prompt must leave room for at least one token if it generates any."""
        room = self.max_model_len - len(sequence.prompt_ids)
        ensure(room >= min(sequence.max_tokens, 1), "a prompt leaves no room for an output token")
        self.waiting.append(sequence)

    def abort(self, sequence_id: int) -> None:
        """End a sequence; no error if it has ended already."""
        sequence = self.running.get(sequence_id) or self.paused.get(sequence_id)
        if sequence is not None:
            self._finish(sequence)
        elif self.waiting.remove(sequence_id) is not None:
            self.slots.cancel_wait(sequence_id)

    def fail_batch(self, batch: Batch | None) -> list[int]:
        """End the sequences of a failed step, or all that hold a slot if it had no batch; returns their ids.

        Sequences whose slots the step's KV operations write are included. No slot that the step may have damaged is
        reused.
        """
        ended = {sequence.id for sequence in self.holders}
        if batch is not None:
            ended = {segment.sequence.id for segment in batch.segments}
            ended |= {sequence.id for sequence in self.slots.holders_of_written_slots(batch.kv_ops)}
        self.evict(ended)
        return sorted(ended)

    def evict(self, sequence_ids: Collection[int]) -> None:
        """End sequences after a failure, and rebuild the slot table for the other ones.

        Unlike ``abort``, it does not rely on consistent state.
        """
        for sequence in (*self.holders, *self.waiting):
            if sequence.id in sequence_ids:
                sequence.slot = None
        for sequence_id in sequence_ids:
            self.running.pop(sequence_id, None)
            self.paused.pop(sequence_id, None)
            self.waiting.remove(sequence_id)
        self.slots.rebuild(self.holders)

    def repair(self) -> list[int]:
        """Rebuild the slot table after a failed ``check_integrity``; returns the ids of sequences that had to end.

        Running and paused sequences keep their slots. If the check still fails, all of them end.
        """
        self.evict(())
        try:
            self.check_integrity()
        except Exception:  # noqa: BLE001 - the first failure was logged; whatever this one is, everything is ended
            return self.fail_batch(None)
        return []

    def schedule(self) -> Batch:
        """The next step's rows: decoding sequences, then prompt chunks."""
        self._admit()
        self.num_forced = 0
        budget, scored_budget = self.max_num_batched_tokens, self.max_scored_rows
        segments: list[Segment] = []
        for sequence in sorted(self.running.values(), key=lambda sequence: not sequence.decoding):
            every_row = False
            if not sequence.decoding:
                if segments and segments[-1].sequence.decoding:
                    budget = min(budget, self.max_prefill_tokens)  # the first prompt, behind decoding sequences
                every_row = sequence.params.needs_every_row
            length = min(sequence.num_uncomputed, budget)
            if every_row and sequence.params.num_prompt_logprobs is not None:
                length = min(length, scored_budget)
                scored_budget -= length
            if length:
                assert sequence.slot is not None
                segment = Segment(sequence, sequence.slot, sequence.num_computed, length, every_row=every_row)
                if sequence.matcher is not None:
                    segment = self._with_forced(segment, room=min(budget - length, scored_budget))
                    scored_budget -= len(segment.drafts)
                segments.append(segment)
                budget -= segment.length
        if self.speculation is not None and budget:
            segments = self.speculation.add_drafts(segments, room=budget)
        ensure(bool(segments), "the batch is empty although sequences are waiting or running")
        return Batch(tuple(segments), self.slots.begin_step(segments))

    def update(self, batch: Batch, sampled: Iterable[SampledToken | None]) -> list[StepOutput]:
        """Apply the step's results: ``sampled`` in the order of ``batch.draws``, None for NaN or infinity."""
        remaining = deque(sampled)
        outputs: list[StepOutput] = []
        for segment in batch.segments:
            tokens = [remaining.popleft() for _ in range(segment.num_logits)]
            segment.sequence.num_computed = segment.end
            if segment.every_row:
                outputs += self._accept_prompt(segment, tokens, batch.hidden_sums)
            elif tokens:
                outputs += self._accept(segment, tokens)
        ensure(not remaining, "more tokens were sampled than rows yield")
        return outputs

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless the slot table is consistent and its used slots are those of ``holders``."""
        self.slots.check_integrity()
        num_used, num_holders = self.slots.num_used, len(self.holders)
        ensure(num_used == num_holders, f"used slots ({num_used}) differ from their sequences ({num_holders})")
        has_slots = all(sequence.slot is not None for sequence in self.holders)
        ensure(has_slots, "a running sequence has no slot")
        ensure(self.running.keys().isdisjoint(self.paused), "a paused sequence runs")

    def _admit(self) -> None:
        """Start waiting sequences and resume paused ones in fair order; skip one that waits for a prefix."""
        if not self.waiting and not self.paused:
            return
        num_running = Counter(sequence.owner for sequence in self.running.values())
        skipped: set[int] = set()
        while (sequence := self._next(num_running, skipped)) is not None:
            victim = self._victim(sequence.owner, num_running)
            if victim is None and len(self.running) >= self.max_num_seqs:
                return
            if sequence.slot is None and not self.slots.can_allocate(sequence):
                break
            if sequence.slot is None and self.slots.waits_for_prefix(sequence):
                skipped.add(sequence.id)
                continue
            if victim is not None:
                self._pause(victim)
                num_running[victim.owner] -= 1
            self._run(sequence)
            num_running[sequence.owner] += 1
        while self.paused and len(self.running) < self.max_num_seqs:
            self._run(next(iter(self.paused.values())))

    def _next(self, num_running: Counter[str], skipped: set[int]) -> Sequence | None:
        """The sequence that runs next; of owners with as many running sequences, a paused one before a waiting one."""
        waiting = self.waiting.next(num_running, skipped=skipped)
        paused = min(self.paused.values(), key=lambda sequence: num_running[sequence.owner], default=None)
        if paused is None or (waiting is not None and num_running[waiting.owner] < num_running[paused.owner]):
            return waiting
        return paused

    def _victim(self, owner: str, num_running: Counter[str]) -> Sequence | None:
        """The sequence that pauses for one of ``owner`` if there is no place: the newest of the owner with the most.

        Only of an owner above its share, or with several sequences where ``owner`` has none.
        """
        if len(self.running) < self.max_num_seqs:
            return None
        ((largest, number),) = num_running.most_common(1)
        is_above_share = number > self.max_owner_seqs or (number > 1 and not num_running[owner])
        if largest == owner or not is_above_share:
            return None
        return next(sequence for sequence in reversed(self.running.values()) if sequence.owner == largest)

    def _pause(self, sequence: Sequence) -> None:
        """Leave a sequence out of the batch; its slot and state stay as they are."""
        del self.running[sequence.id]
        self.paused[sequence.id] = sequence

    def _run(self, sequence: Sequence) -> None:
        """Start a waiting sequence, or resume a paused one."""
        self.running[sequence.id] = sequence  # before ``allocate``, so that its failure ends this sequence too
        if sequence.slot is None:
            self.waiting.start(sequence)
            self.slots.allocate(sequence)
        else:
            del self.paused[sequence.id]

    def _accept_prompt(
        self, segment: Segment, tokens: list[SampledToken | None], hidden_sums: Mapping[int, Doubles]
    ) -> list[StepOutput]:
        """The results of a prompt's rows, and the token behind the prompt if one is sampled."""
        sequence = segment.sequence
        scored = tuple(token for token in tokens[: segment.num_scored] if token is not None)
        if sequence.params.embedding:
            before = sequence.hidden_sum
            new = hidden_sums[sequence.id]
            sequence.hidden_sum = new if before is None else before + new
        is_finite = sequence.hidden_sum is None or bool(np.isfinite(sequence.hidden_sum).all())
        if len(scored) < segment.num_scored or not is_finite:
            return [self._fail_not_finite(sequence, "the results of the prompt are NaN or infinite")]
        if segment.samples:
            first, *others = self._accept(segment, tokens[segment.num_scored :])
            return [replace(first, prompt=scored), *others]
        if not sequence.decoding:
            return [StepOutput(sequence.id, None, prompt=scored)] if scored else []
        self._finish(sequence)
        embedding = None if sequence.hidden_sum is None else sequence.hidden_sum / len(sequence.prompt_ids)
        return [StepOutput(sequence.id, None, FinishReason.LENGTH, prompt=scored, embedding=embedding)]

    def _accept(self, segment: Segment, tokens: list[SampledToken | None]) -> list[StepOutput]:
        """Append the first token, and the token behind each draft that equals the token sampled in its place."""
        sequence = segment.sequence
        outputs = [self._append(sequence, tokens[0])]
        for draft, sampled, following in zip(segment.drafts, tokens, tokens[1:], strict=False):
            if outputs[-1].last or sampled is None or draft != sampled.id:
                break
            sequence.num_computed += 1
            outputs.append(self._append(sequence, following))
        forced: list[StepOutput] = []
        if sequence.matcher is not None and not outputs[-1].last:
            forced = self._append_forced(sequence)
        self.num_forced += len(forced) + (len(outputs) - 1 if segment.forced else 0)
        outputs += forced
        if self.speculation is not None:
            num_new = sum(output.token is not None for output in outputs)
            self.speculation.learn(segment, num_new, num_forced=len(forced))
        return outputs

    def _with_forced(self, segment: Segment, *, room: int) -> Segment:
        """The segment, with the tokens that its grammar forces behind the last known token as drafts."""
        sequence = segment.sequence
        assert sequence.matcher is not None
        most = min(
            room,
            sequence.max_tokens - len(sequence.output_ids) - 1,
            self.max_model_len - sequence.num_tokens - 1,
        )
        drafts = sequence.matcher.pending[: max(most, 0)]
        if not segment.samples or not drafts:
            return segment
        return replace(segment, length=segment.length + len(drafts), drafts=drafts, forced=True)

    def _append_forced(self, sequence: Sequence) -> list[StepOutput]:
        """Append what a sequence's grammar forces now. Its rows are computed in the next step, without sampling.

        With log probabilities such tokens are drafts of the next step instead, because each needs its row's logits.
        """
        outputs: list[StepOutput] = []
        if sequence.matcher is None or sequence.params.num_logprobs is not None:
            return outputs
        while sequence.matcher.pending and len(outputs) < self._max_forced:
            outputs.append(self._append(sequence, SampledToken(sequence.matcher.pending[0])))
            if outputs[-1].last:
                break
        return outputs

    def _append(self, sequence: Sequence, token: SampledToken | None) -> StepOutput:
        if token is None:
            is_limited = sequence.matcher is not None and sequence.matcher.failed
            reason = _GRAMMAR_LIMIT if is_limited else "the logits of the next token are NaN or infinite"
            return self._fail_not_finite(sequence, reason)
        sequence.output_ids.append(token.id)
        end = self._finish_reason(sequence, token.id)
        if sequence.matcher is not None and end is not FinishReason.STOP:
            if not sequence.matcher.accept(token.id):
                self._finish(sequence)
                return StepOutput(sequence.id, None, failed=_GRAMMAR_LIMIT)
            if sequence.matcher.stopped:
                end = FinishReason.STOP
        if end is not None:
            self._finish(sequence)
        return StepOutput(sequence.id, token, end)

    def _fail_not_finite(self, sequence: Sequence, reason: str) -> StepOutput:
        sequence.num_computed = 0  # its keys and values may be NaN as well: nothing of the slot is reused
        self._finish(sequence)
        return StepOutput(sequence.id, None, failed=reason)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id in sequence.eos_ids:
            return FinishReason.STOP
        if len(sequence.output_ids) >= sequence.max_tokens or sequence.num_tokens >= self.max_model_len:
            return FinishReason.LENGTH
        return None

    def _finish(self, sequence: Sequence) -> None:
        self.running.pop(sequence.id, None)
        self.paused.pop(sequence.id, None)
        self.slots.free(sequence)
