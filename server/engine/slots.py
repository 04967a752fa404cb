"""Who holds which KV slot."""

from __future__ import annotations


class SlotTable:
    """A fixed number of slots, each free or held by one sequence."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._holders: dict[int, int] = {}

    @property
    def num_used(self) -> int:
        """Slots held."""
        return len(self._holders)

    def can_take(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    def take(self, sequence_id: int) -> int:
        """Give a free slot to a sequence: the one used last, whose memory is warm."""
        slot = self._free.pop()
        self._holders[slot] = sequence_id
        return slot

    def free(self, slot: int) -> None:
        """Take a slot back."""
        del self._holders[slot]
        self._free.append(slot)

    def check_integrity(self) -> None:
        """Every slot is free or held, never both, and nobody holds two."""
        assert sorted([*self._free, *self._holders]) == list(range(self.num_slots)), "a slot is lost or doubled"
        assert len(set(self._holders.values())) == len(self._holders), "a sequence holds two slots"
