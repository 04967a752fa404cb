"""Who holds which KV slot, what the others keep of sequences that have ended, and how much memory all of it takes.

A slot whose sequence has ended keeps its keys and values until the slot or its memory is needed; what was used longest
ago goes first. A sequence that begins as another did, ended or running, is spared what they have in common: it takes
over the slot of one that has ended, or gets a copy of that much.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.integrity import IntegrityError, ensure
from server.sequence import CopyPrefix, KVOperation, LoRARequest, ReleaseTail, Segment, Sequence

MIN_PREFIX = 16
"""Tokens in common that are worth a copy, or a wait; nearly all prompts begin with the same few."""
TAIL_SHARE = 8
"""A slot is taken over where that loses at most so small a share of what is kept: one part in 8. Else it is copied."""

_TOKEN = array("I").itemsize
_CHUNK = 256 * _TOKEN


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a sequence, as bytes, so that long ones compare at the speed of memory.

    Keys and values at a position depend on all tokens up to it and on the adapters' weights, which ``owner`` names by
    their digests: an adapter that was replaced is another one. The cache namespace keeps strangers' sequences apart.
    """

    owner: tuple[bytes, tuple[LoRARequest, ...]]
    ids: bytes

    @classmethod
    def of(cls, sequence: Sequence, length: int) -> Prefix:
        """The first ``length`` tokens of a sequence."""
        return cls((sequence.cache_namespace, sequence.adapters), array("I", sequence.ids(0, length)).tobytes())

    def __len__(self) -> int:
        """Tokens in it."""
        return len(self.ids) // _TOKEN

    def common(self, other: Prefix) -> int:
        """How many tokens both begin with; 0 where the owners differ."""
        if self.owner != other.owner:
            return 0
        mine, others, start = self.ids, other.ids, 0
        most = min(len(mine), len(others))
        while start < most and mine[start : start + _CHUNK] == others[start : start + _CHUNK]:
            start += _CHUNK
        end = min(start + _CHUNK, most)
        if start >= end:
            return most // _TOKEN
        differing = int.from_bytes(mine[start:end], "little") ^ int.from_bytes(others[start:end], "little")
        if not differing:
            return most // _TOKEN
        lowest = (differing & -differing).bit_length() - 1  # the first bit at which they differ
        return (start + lowest // 8) // _TOKEN


NOTHING = Prefix((b"", ()), b"")


@dataclass(eq=False)
class Slot:
    """One slot. ``prefix`` is the holder's prompt, or without a holder the tokens whose keys and values are there.

    ``num_touched`` positions may have been written since the memory behind them was given back; the holder may write
    ``num_reserved``; ``num_bytes`` is what these or those take. ``used_at`` orders slots by when they were of use.
    """

    number: int
    holder: Sequence | None = None
    prefix: Prefix = NOTHING
    num_touched: int = 0
    num_reserved: int = 0
    num_bytes: int = 0
    used_at: int = 0

    @property
    def idle(self) -> bool:
        """Whether nobody holds it."""
        return self.holder is None

    @property
    def num_valid(self) -> int:
        """Tokens of the prefix whose keys and values are there."""
        return len(self.prefix) if self.holder is None else min(self.holder.num_computed, len(self.prefix))


class SlotTable:
    """Slots for sequences of at most ``max_len`` tokens, within ``max_bytes`` of memory.

    ``bytes_of`` says what a slot takes by its positions. A sequence gets room for its prompt and its whole answer, so
    that it never has to give way: ``num_bytes`` are taken, or promised. ``reuses`` switches the reuse of prefixes on.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        max_len: int,
        max_bytes: int | None = None,
        bytes_of: Callable[[int], int] = lambda length: length,
        reuses: bool = False,
    ) -> None:
        self.num_slots, self.max_len, self.reuses = num_slots, max_len, reuses
        self.max_bytes = num_slots * bytes_of(max_len) if max_bytes is None else max_bytes
        assert bytes_of(max_len) <= self.max_bytes, "the longest sequence must fit"
        self._bytes_of = bytes_of
        self._slots = [Slot(number) for number in range(num_slots)]
        self._kv_ops: list[KVOperation] = []
        self._waiting_for: dict[int, tuple[Sequence, int]] = {}
        self._clock = 0
        self.num_bytes = 0

    @property
    def num_used(self) -> int:
        """Slots held by sequences."""
        return sum(not slot.idle for slot in self._slots)

    @property
    def num_cached(self) -> int:
        """Slots nobody holds that keep a prefix."""
        return sum(slot.idle and len(slot.prefix) > 0 for slot in self._slots)

    def can_allocate(self, sequence: Sequence) -> bool:
        """Whether there is a slot, and memory beside what the running sequences may need."""
        held = [slot for slot in self._slots if not slot.idle]
        taken = sum(slot.num_bytes for slot in held)
        return len(held) < self.num_slots and taken + self._bytes_of(self._reserve(sequence)) <= self.max_bytes

    def waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether a running sequence is just computing more of this one's prompt than is to be had now.

        The wait costs nothing: the prompt of who came earlier is computed first anyhow.
        """
        if not self.reuses:
            return False
        if (awaited := self._waiting_for.get(sequence.id)) is not None:
            other, length = awaited
            if other.slot is not None and other.num_computed < length:
                return True
            self.cancel_wait(sequence.id)
        prefix = Prefix.of(sequence, len(sequence.prompt_ids))
        best: tuple[Sequence, int] | None = None
        most = self._longest(prefix)[1] + MIN_PREFIX
        for slot in self._slots:
            if slot.holder is not None and not slot.holder.decoding:
                length = min(prefix.common(slot.prefix), len(prefix) - 1)
                if length >= most:
                    best, most = (slot.holder, length), length + 1
        if best is not None:
            self._waiting_for[sequence.id] = best
        return best is not None

    def cancel_wait(self, sequence_id: int) -> None:
        """A sequence waits no longer."""
        self._waiting_for.pop(sequence_id, None)

    def allocate(self, sequence: Sequence) -> None:
        """Give a sequence a slot, with what others have computed of its prompt; ``can_allocate`` must hold."""
        prefix = Prefix.of(sequence, len(sequence.prompt_ids))
        source, length = self._longest(prefix)
        reserved = self._reserve(sequence)
        target = self._choose(source, length, reserved)
        if target.num_touched > reserved:
            self._kv_ops.append(ReleaseTail(target.number, reserved))
            target.num_touched = reserved
        if source is not None and target is not source:
            self._kv_ops.append(CopyPrefix(source.number, target.number, length))
            source.used_at = self._tick()
        target.holder, target.prefix, target.num_reserved = sequence, prefix, reserved
        target.num_touched = max(target.num_touched, length)
        self._account(target)
        sequence.slot, sequence.num_computed, sequence.num_cached = target.number, length, length

    def begin_step(self, segments: Iterable[Segment]) -> tuple[KVOperation, ...]:
        """Note what a step is about to write; the KV operations that must be done before."""
        for segment in segments:
            slot = self._slots[segment.slot]
            slot.num_touched = max(slot.num_touched, segment.start + segment.length)
        kv_ops, self._kv_ops = tuple(self._kv_ops), []
        return kv_ops

    def free(self, sequence: Sequence) -> None:
        """Take a sequence's slot back; what it has computed is kept for others."""
        slot = None if sequence.slot is None else self._slots[sequence.slot]
        if slot is None or slot.holder is not sequence:
            raise IntegrityError("a slot is given back by a sequence that does not hold it")
        num_valid = min(sequence.num_computed, sequence.num_tokens)
        useful = self.reuses and num_valid >= MIN_PREFIX
        slot.prefix = Prefix.of(sequence, num_valid) if useful else NOTHING
        slot.holder, slot.num_reserved, slot.used_at = None, 0, self._tick()
        self._account(slot)
        sequence.slot = None

    def holders_of_written_slots(self, kv_ops: Iterable[KVOperation]) -> list[Sequence]:
        """The sequences whose slots these KV operations change."""
        numbers = {kv_op.target if isinstance(kv_op, CopyPrefix) else kv_op.slot for kv_op in kv_ops}
        return [holder for number in numbers if (holder := self._slots[number].holder) is not None]

    def rebuild(self, holders: Iterable[Sequence]) -> None:
        """Write the books anew, whatever they say: ``holders`` keep their slots, and all others are emptied.

        After a failure nothing that it may have spoiled is reused.
        """
        held = {sequence.slot: sequence for sequence in holders}
        self._kv_ops, self._waiting_for = [], {}
        for slot in self._slots:
            slot.holder = held.get(slot.number)
            if slot.holder is None:
                slot.prefix, slot.num_touched, slot.num_reserved = NOTHING, 0, 0
                self._kv_ops.append(ReleaseTail(slot.number, 0))
            slot.num_bytes = self._bytes_of(max(slot.num_touched, slot.num_reserved))
        self.num_bytes = sum(slot.num_bytes for slot in self._slots)

    def check_integrity(self) -> None:
        """Each holder knows its slot, positions are within bounds, and memory is within its limit."""
        for slot in self._slots:
            ensure(slot.holder is None or slot.holder.slot == slot.number, "a holder sits elsewhere")
            ensure(slot.num_valid <= slot.num_touched <= self.max_len, "a slot holds more than was written")
            ensure(slot.idle or slot.num_touched <= slot.num_reserved, "a sequence wrote beyond its room")
            ensure(not slot.idle or not slot.num_reserved, "room is reserved for nobody")
            num_bytes = self._bytes_of(max(slot.num_touched, slot.num_reserved))
            ensure(slot.num_bytes == num_bytes, "a slot is miscounted")
        ensure(self.num_bytes == sum(slot.num_bytes for slot in self._slots), "memory is miscounted")
        ensure(self.num_bytes <= self.max_bytes, "more memory is taken than there may be")

    def _account(self, slot: Slot) -> None:
        """Count what a slot takes now."""
        before, slot.num_bytes = slot.num_bytes, self._bytes_of(max(slot.num_touched, slot.num_reserved))
        self.num_bytes += slot.num_bytes - before

    def _reserve(self, sequence: Sequence) -> int:
        return min(len(sequence.prompt_ids) + sequence.max_tokens, self.max_len)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _longest(self, prefix: Prefix) -> tuple[Slot | None, int]:
        """The slot with the most of a prompt but its last token, whose logits are wanted, and how much it has.

        Among equals one that nobody holds, and of these the one that would lose least.
        """
        best, length = None, 0
        if not self.reuses:
            return best, length
        for slot in self._slots:
            common = min(prefix.common(slot.prefix), slot.num_valid, len(prefix) - 1)
            if common < max(length, MIN_PREFIX):
                continue
            rank = (common, slot.idle, -len(slot.prefix))
            if best is None or rank > (length, best.idle, -len(best.prefix)):
                best, length = slot, common
        return best, length

    def _choose(self, source: Slot | None, length: int, reserved: int) -> Slot:
        """The slot for a sequence, with room made for it: its source where little is lost, else the least useful."""
        others = sorted((slot for slot in self._slots if slot.idle and slot is not source), key=_usefulness)
        if source is not None and source.idle:
            little_lost = TAIL_SHARE * (len(source.prefix) - length) <= length
            if little_lost or not others or not self._make_room(others[0], others[1:], reserved):
                self._make_room(source, others, reserved)
                return source
            return others[0]
        self._make_room(others[0], others[1:], reserved)
        return others[0]

    def _make_room(self, target: Slot, victims: Iterable[Slot], reserved: int) -> bool:
        """Empty slots, the least useful first, until ``target`` may take what is to be reserved; whether it may."""
        missing = self.num_bytes - target.num_bytes + self._bytes_of(reserved) - self.max_bytes
        for victim in victims:
            if missing <= 0:
                break
            missing -= victim.num_bytes
            self._empty(victim)
        return missing <= 0

    def _empty(self, slot: Slot) -> None:
        if slot.num_touched:
            self._kv_ops.append(ReleaseTail(slot.number, 0))
        slot.prefix, slot.num_touched = NOTHING, 0
        self._account(slot)


def _usefulness(slot: Slot) -> tuple[bool, int]:
    """By how much one would rather keep a slot: the empty go first, and of them the one whose memory is warm."""
    keeps = len(slot.prefix) > 0
    return keeps, slot.used_at if keeps else -slot.used_at
