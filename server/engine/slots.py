"""KV slot allocation, prefix reuse and memory accounting.

The slot of an ended sequence keeps its keys and values until the slot or its memory is needed, least recently used
first. A sequence whose prompt shares a prefix with another one, ended or running, does not compute that prefix again:
it takes over the slot of an ended sequence, or gets a copy of the prefix.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.integrity import IntegrityError, ensure
from server.sequence import CopyPrefix, KVOperation, LoRARequest, ReleaseTail, Segment, Sequence

MIN_PREFIX = 16
"""Shortest prefix in tokens that is copied or waited for; nearly all prompts share their first few tokens."""
TAIL_SHARE = 8
"""A slot is taken over if its tail, which is lost, is at most 1/8 of the shared prefix; else the prefix is copied."""

_TOKEN = array("I").itemsize
_CHUNK = 256 * _TOKEN


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a sequence, as bytes, which compare fast.

    Keys and values at a position depend on all tokens up to it and on the weights of the adapters. ``owner`` is the
    cache namespace, which separates clients, and the digests and scales of the adapters.
    """

    owner: tuple[bytes, tuple[LoRARequest, ...]]
    ids: bytes

    @classmethod
    def of(cls, sequence: Sequence, length: int) -> Prefix:
        """The first ``length`` tokens of a sequence."""
        return cls((sequence.cache_namespace, sequence.adapters), array("I", sequence.ids(0, length)).tobytes())

    def __len__(self) -> int:
        return len(self.ids) // _TOKEN

    def common_length(self, other: Prefix) -> int:
        """Number of tokens that both begin with; 0 if the owners differ."""
        if self.owner != other.owner:
            return 0
        shorter = min(len(self.ids), len(other.ids))
        start = 0
        while start < shorter and self.ids[start : start + _CHUNK] == other.ids[start : start + _CHUNK]:
            start += _CHUNK
        end = min(start + _CHUNK, shorter)
        differing = int.from_bytes(self.ids[start:end], "little") ^ int.from_bytes(other.ids[start:end], "little")
        if not differing:
            return shorter // _TOKEN
        first_bit = (differing & -differing).bit_length() - 1
        return (start + first_bit // 8) // _TOKEN


NOTHING = Prefix((b"", ()), b"")


@dataclass(eq=False)
class Slot:
    """One slot. ``prefix`` is the holder's prompt; without a holder, the tokens whose keys and values are cached.

    Positions below ``num_touched`` may have memory of their own, positions below ``num_reserved`` may be written by the
    holder; ``num_bytes`` is the memory of the larger number. ``used_at`` orders slots by their last use.
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
        """Whether no sequence holds it."""
        return self.holder is None

    @property
    def num_valid(self) -> int:
        """Tokens of the prefix whose keys and values are computed."""
        return len(self.prefix) if self.holder is None else min(self.holder.num_computed, len(self.prefix))


class SlotTable:
    """Slots for sequences of at most ``max_len`` tokens, within ``max_bytes`` of memory.

    ``bytes_of`` returns the memory of a slot from its number of positions. Memory for prompt and whole answer is
    reserved at allocation, so that no sequence is preempted; ``num_bytes`` includes it. ``reuses`` is for prefixes.
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
        self.num_slots = num_slots
        self.max_len = max_len
        self.reuses = reuses
        self.max_bytes = num_slots * bytes_of(max_len) if max_bytes is None else max_bytes
        assert bytes_of(max_len) <= self.max_bytes, "the longest sequence must fit"
        self._bytes_of = bytes_of
        self._slots = [Slot(number) for number in range(num_slots)]
        self._kv_ops: list[KVOperation] = []
        self._waiting_for: dict[int, tuple[Sequence, int]] = {}  # by id: a running sequence, tokens it must compute
        self._clock = 0
        self.num_bytes = 0

    @property
    def num_used(self) -> int:
        return sum(not slot.idle for slot in self._slots)

    @property
    def bytes_per_token(self) -> int:
        """Memory of a token in a slot of maximum length."""
        return max(1, self._bytes_of(self.max_len) // self.max_len)

    @property
    def num_used_bytes(self) -> int:
        """Memory of the slots that running sequences hold."""
        return sum(slot.num_bytes for slot in self._slots if not slot.idle)

    @property
    def num_cached(self) -> int:
        """Idle slots with a cached prefix."""
        return sum(slot.idle and len(slot.prefix) > 0 for slot in self._slots)

    def can_allocate(self, sequence: Sequence) -> bool:
        """Whether a slot is free, and memory beside the reservations of the running sequences."""
        held = [slot for slot in self._slots if not slot.idle]
        num_bytes = sum(slot.num_bytes for slot in held) + self._bytes_of(self._reserve(sequence))
        return len(held) < self.num_slots and num_bytes <= self.max_bytes

    def waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing a longer prefix of this prompt than is available now.

        The wait costs nothing, because prompts are computed in order of arrival.
        """
        if not self.reuses or sequence.params.needs_every_row:
            return False
        awaited = self._waiting_for.get(sequence.id)
        if awaited is not None:
            other, length = awaited
            if other.slot is not None and other.num_computed < length:
                return True
            self.cancel_wait(sequence.id)
        prefix = Prefix.of(sequence, len(sequence.prompt_ids))
        best: tuple[Sequence, int] | None = None
        least = self._longest(prefix)[1] + MIN_PREFIX
        for slot in self._slots:
            if slot.holder is not None and not slot.holder.decoding:
                length = min(prefix.common_length(slot.prefix), len(prefix) - 1)
                if length >= least:
                    best = (slot.holder, length)
                    least = length + 1
        if best is not None:
            self._waiting_for[sequence.id] = best
        return best is not None

    def cancel_wait(self, sequence_id: int) -> None:
        self._waiting_for.pop(sequence_id, None)

    def allocate(self, sequence: Sequence) -> None:
        """Assign a slot to a sequence, with the cached prefix of its prompt. ``can_allocate`` must be true.

        A sequence that needs every row reuses nothing; later ones may reuse its prefix.
        """
        prefix = Prefix.of(sequence, len(sequence.prompt_ids))
        source, length = (None, 0) if sequence.params.needs_every_row else self._longest(prefix)
        reserved = self._reserve(sequence)
        target = self._choose(source, length, reserved)
        if target.num_touched > reserved:
            self._kv_ops.append(ReleaseTail(target.number, reserved))
            target.num_touched = reserved
        if source is not None and target is not source:
            self._kv_ops.append(CopyPrefix(source.number, target.number, length))
            source.used_at = self._tick()
        target.holder = sequence
        target.prefix = prefix
        target.num_reserved = reserved
        target.num_touched = max(target.num_touched, length)
        self._account(target)
        sequence.slot = target.number
        sequence.num_computed = sequence.num_cached = length

    def begin_step(self, segments: Iterable[Segment]) -> tuple[KVOperation, ...]:
        """Record the positions that a step writes; returns the KV operations to apply before it."""
        for segment in segments:
            slot = self._slots[segment.slot]
            slot.num_touched = max(slot.num_touched, segment.start + segment.length)
        kv_ops, self._kv_ops = tuple(self._kv_ops), []
        return kv_ops

    def free(self, sequence: Sequence) -> None:
        """Free a sequence's slot, whose keys and values stay cached."""
        slot = None if sequence.slot is None else self._slots[sequence.slot]
        if slot is None or slot.holder is not sequence:
            raise IntegrityError("a sequence frees a slot that it does not hold")
        num_valid = min(sequence.num_computed, sequence.num_tokens)
        useful = self.reuses and num_valid >= MIN_PREFIX
        slot.prefix = Prefix.of(sequence, num_valid) if useful else NOTHING
        slot.holder = None
        slot.num_reserved = 0
        slot.used_at = self._tick()
        self._account(slot)
        sequence.slot = None

    def release_cached(self, *, keep: int) -> tuple[KVOperation, ...]:
        """Empty all idle slots but the ``keep`` most recently used; returns the KV operations to apply at once."""
        cached = sorted((slot for slot in self._slots if slot.idle and slot.num_touched), key=lambda slot: slot.used_at)
        for slot in cached[: max(0, len(cached) - keep)]:
            self._empty(slot)
        return self.begin_step(())

    def holders_of_written_slots(self, kv_ops: Iterable[KVOperation]) -> list[Sequence]:
        """The sequences whose slots these KV operations write."""
        numbers = {kv_op.target if isinstance(kv_op, CopyPrefix) else kv_op.slot for kv_op in kv_ops}
        holders = [self._slots[number].holder for number in numbers]
        return [holder for holder in holders if holder is not None]

    def rebuild(self, holders: Iterable[Sequence]) -> None:
        """Rebuild the slot table: ``holders`` keep their slots, and all others are emptied.

        After a failure no cached prefix is reused, because it may be damaged.
        """
        held = {sequence.slot: sequence for sequence in holders}
        self._kv_ops, self._waiting_for = [], {}
        for slot in self._slots:
            slot.holder = held.get(slot.number)
            if slot.holder is None:
                slot.prefix = NOTHING
                slot.num_touched = slot.num_reserved = 0
                self._kv_ops.append(ReleaseTail(slot.number, 0))
            slot.num_bytes = self._bytes_of(max(slot.num_touched, slot.num_reserved))
        self.num_bytes = sum(slot.num_bytes for slot in self._slots)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless holders, positions and memory of all slots are consistent."""
        for slot in self._slots:
            ensure(slot.holder is None or slot.holder.slot == slot.number, "a slot's holder has another slot")
            ensure(
                slot.num_valid <= slot.num_touched <= self.max_len,
                "a slot's prefix is longer than the written positions",
            )
            ensure(slot.idle or slot.num_touched <= slot.num_reserved, "a sequence wrote beyond its reserved positions")
            ensure(not slot.idle or not slot.num_reserved, "an idle slot has reserved positions")
            num_bytes = self._bytes_of(max(slot.num_touched, slot.num_reserved))
            ensure(slot.num_bytes == num_bytes, "the bytes of a slot are miscounted")
        ensure(self.num_bytes == sum(slot.num_bytes for slot in self._slots), "memory is miscounted")
        ensure(self.num_bytes <= self.max_bytes, "memory exceeds its limit")

    def _account(self, slot: Slot) -> None:
        """Update the bytes of a slot and the total."""
        num_bytes = self._bytes_of(max(slot.num_touched, slot.num_reserved))
        self.num_bytes += num_bytes - slot.num_bytes
        slot.num_bytes = num_bytes

    def _reserve(self, sequence: Sequence) -> int:
        return min(len(sequence.prompt_ids) + sequence.max_tokens, self.max_len)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _longest(self, prefix: Prefix) -> tuple[Slot | None, int]:
        """The slot with the longest prefix of a prompt without its last token, and the length of that prefix.

        Among equals an idle slot is preferred, then the one with the shortest tail behind the prefix.
        """
        best, length = None, 0
        if not self.reuses:
            return best, length
        for slot in self._slots:
            common = min(prefix.common_length(slot.prefix), slot.num_valid, len(prefix) - 1)
            if common < max(length, MIN_PREFIX):
                continue
            rank = (common, slot.idle, -len(slot.prefix))
            if best is None or rank > (length, best.idle, -len(best.prefix)):
                best, length = slot, common
        return best, length

    def _choose(self, source: Slot | None, length: int, reserved: int) -> Slot:
        """The slot for a sequence, with memory freed for it: ``source`` if little is lost, else the least useful."""
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
        """Empty ``victims`` in order until ``target`` can reserve its positions; whether it can."""
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
    """Sort key, least useful first: empty slots, most recently used (warm memory) first; then least recently used."""
    is_cached = len(slot.prefix) > 0
    return is_cached, slot.used_at if is_cached else -slot.used_at
