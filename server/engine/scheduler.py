"""Which sequences run, and what each step computes.

Continuous batching (Yu et al. 2022, Orca): sequences join and leave at every step. Sequences that decode come first,
one row each; what the token budget leaves goes to chunks of prompts, oldest first, and while anybody decodes only so
much that a long prompt delays nobody by more than a step of bounded size; and what is left then to drafts
(``speculation``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from server.engine.slots import SlotTable
from server.engine.speculation import Speculation
from server.integrity import ensure
from server.sequence import Batch, FinishReason, SampledToken, Segment, Sequence, SequenceStatus, StepOutput


class Scheduler:
    """Queue, running set and slots. ``max_model_len`` bounds prompt and output together, in tokens.

    ``max_prefill_tokens`` are the prompt rows of a step in which others decode. Without ``slots`` there is one for each
    sequence that may run, and no prefix is reused. ``max_draft_tokens`` are drafted for a sequence in a step at most; 0
    is no speculation.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_prefill_tokens: int | None = None,
        max_draft_tokens: int = 0,
        slots: SlotTable | None = None,
    ) -> None:
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs + 1)
        self.max_prefill_tokens = max_prefill_tokens or self.max_num_batched_tokens
        self.slots = slots or SlotTable(max_num_seqs, max_len=max_model_len)
        assert self.slots.num_slots >= max_num_seqs and self.slots.max_len == max_model_len
        self.speculation: Speculation | None = None
        if max_draft_tokens:
            self.speculation = Speculation(max_drafts=max_draft_tokens, max_model_len=max_model_len)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it must leave room for one token at least."""
        ensure(len(sequence.prompt_ids) < self.max_model_len, "a prompt leaves no room for a token")
        self.waiting.append(sequence)

    def abort(self, sequence_id: int) -> None:
        """End a sequence wherever it stands; one that has ended already is no error."""
        if (sequence := self.running.get(sequence_id)) is not None:
            self._finish(sequence)
            return
        for sequence in self.waiting:
            if sequence.id == sequence_id:
                sequence.status = SequenceStatus.FINISHED
                self.waiting.remove(sequence)
                self.slots.cancel_wait(sequence_id)
                return

    def fail_batch(self, batch: Batch | None) -> list[int]:
        """End the sequences of a step that failed, or all that run where it made no batch; their ids.

        Those whose slots it was to prepare are among them, and nothing that it may have spoiled is reused.
        """
        ended = set(self.running)
        if batch is not None:
            ended = {segment.sequence.id for segment in batch.segments}
            ended |= {sequence.id for sequence in self.slots.holders_of_written_slots(batch.kv_ops)}
        self.evict(ended)
        return sorted(ended)

    def evict(self, sequence_ids: Collection[int]) -> None:
        """End sequences whatever the books say of them, and write the books of slots anew around the others.

        Where ``abort`` relies on the books, this relies on nothing: it is for what a failure left.
        """
        for sequence in (*self.running.values(), *self.waiting):
            if sequence.id in sequence_ids:
                sequence.status, sequence.slot = SequenceStatus.FINISHED, None
        self.running = {number: one for number, one in self.running.items() if number not in sequence_ids}
        self.waiting = deque(one for one in self.waiting if one.id not in sequence_ids)
        self.slots.rebuild(self.running.values())

    def repair(self) -> list[int]:
        """Make the books sound again after a failed ``check_integrity``; ids of the sequences that this had to end.

        Sequences that run keep their slots; where that is not sound either, all of them end.
        """
        self.evict(())
        try:
            self.check_integrity()
        except Exception:  # noqa: BLE001 - whatever is wrong, it was logged when it was found, and all of it goes
            return self.fail_batch(None)
        return []

    def schedule(self) -> Batch:
        """The next step's rows: decoding sequences, then prompt chunks."""
        self._admit()
        budget = self.max_num_batched_tokens
        segments: list[Segment] = []
        for sequence in sorted(self.running.values(), key=lambda one: not one.decoding):
            if not sequence.decoding and segments and segments[-1].sequence.decoding:
                budget = min(budget, self.max_prefill_tokens)  # here the prompts begin, behind those that decode
            length = min(sequence.num_uncomputed, budget)
            if length:
                assert sequence.slot is not None
                segments.append(Segment(sequence, sequence.slot, sequence.num_computed, length))
                budget -= length
        if self.speculation is not None and budget:
            segments = self.speculation.extend(segments, room=budget)
        ensure(bool(segments), "there are sequences, and nothing to compute of them")
        return Batch(tuple(segments), self.slots.begin_step(segments))

    def update(self, batch: Batch, sampled: Iterable[SampledToken | None]) -> list[StepOutput]:
        """Book what the step computed. ``sampled`` are of ``batch.draws``, None where no token could be chosen."""
        remaining = deque(sampled)
        outputs: list[StepOutput] = []
        for segment in batch.segments:
            tokens = [remaining.popleft() for _ in range(segment.num_sampled)]
            segment.sequence.num_computed = segment.end
            outputs += self._accept(segment, tokens) if tokens else ()
        ensure(not remaining, "there are more tokens than rows that yield one")
        return outputs

    def check_integrity(self) -> None:
        """Running sequences and held slots are the same."""
        self.slots.check_integrity()
        ensure(self.slots.num_used == len(self.running), "a slot leaks")
        running = all(sequence.status is SequenceStatus.RUNNING for sequence in self.running.values())
        ensure(running, "a sequence runs that has ended")

    def _admit(self) -> None:
        """Let in who finds a slot and memory, the oldest first; who waits for a prefix lets others pass."""
        for sequence in tuple(self.waiting):
            if len(self.running) >= self.max_num_seqs or not self.slots.can_allocate(sequence):
                return
            if self.slots.waits_for_prefix(sequence):
                continue
            self.running[sequence.id] = sequence  # first, so that a failure from here on ends it with the others
            self.waiting.remove(sequence)
            sequence.status = SequenceStatus.RUNNING
            self.slots.allocate(sequence)

    def _accept(self, segment: Segment, tokens: list[SampledToken | None]) -> list[StepOutput]:
        """The next token, and one more for each draft that it, or the one before, has come out as."""
        sequence, outputs = segment.sequence, [self._append(segment.sequence, tokens[0])]
        for draft, before, token in zip(segment.drafts, tokens, tokens[1:], strict=False):
            if outputs[-1].last or before is None or draft != before.id:
                break
            sequence.num_computed += 1
            outputs.append(self._append(sequence, token))
        if self.speculation is not None:
            self.speculation.learn(segment, sum(output.token is not None for output in outputs))
        return outputs

    def _append(self, sequence: Sequence, token: SampledToken | None) -> StepOutput:
        if token is None:
            sequence.num_computed = 0  # what it leaves behind may be as broken
            self._finish(sequence)
            return StepOutput(sequence.id, None, failed="the model gave no finite scores for the next token")
        sequence.output_ids.append(token.id)
        reason = self._finish_reason(sequence, token.id)
        if reason is not None:
            self._finish(sequence)
        return StepOutput(sequence.id, token, reason)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id in sequence.eos_ids:
            return FinishReason.STOP
        if len(sequence.output_ids) >= sequence.max_tokens or sequence.num_tokens >= self.max_model_len:
            return FinishReason.LENGTH
        return None

    def _finish(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.FINISHED
        self.running.pop(sequence.id, None)
        self.slots.free(sequence)
