"""Copies of adapters of one shape in batched tensors, so that two batched products compute all of them.

See Punica (Chen et al. 2023). On a CPU a loop over adapters spends more time on its calls than on reading weights. A
slot is an index of the batched tensors. A step computes a window of slots, so the slots that it needs are kept
adjacent. Unused slots in the window are computed and discarded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from functools import cached_property
from itertools import accumulate

import torch

from server.integrity import ensure
from server.lora.delta import LoRADelta

_MAX_WASTED = 3
"""Unused slots that are computed before the window is compacted: about what copying one adapter costs."""
_MIN_RANK = 4
_MIN_SLOTS = 2

LoRAShape = frozenset[tuple[str, int]]
"""Module and padded rank of every linear that an adapter changes."""


def shape_of(deltas: Mapping[str, LoRADelta]) -> LoRAShape | None:
    """The shape that adapters in one batched product share; None if a linear has more than a plain delta.

    Ranks are padded to a power of two.
    """
    linears = {module: delta for module, delta in deltas.items() if delta.kind == "linear"}
    if not linears or not all(delta.plain for delta in linears.values()):
        return None
    return frozenset((module, _padded_rank(len(factors_of(delta)[1]))) for module, delta in linears.items())


class LoRASlots:
    """The batched A and B of adapters of one ``LoRAShape``. The engine thread owns it.

    ``inputs`` has the modules of the shape by input. For the current window, ``low`` has per input A [slots, in, rank
    of all its modules], and ``high`` per module B [slots, rank, out]; ``columns`` says which of these ranks are whose.
    Slots grow by doubling, to ``max_slots`` at most.
    """

    def __init__(self, inputs: Mapping[str, Sequence[str]], shape: LoRAShape, *, max_slots: int) -> None:
        self.inputs, self.max_slots = inputs, max_slots
        self.columns: dict[str, slice] = {}
        ranks = dict(shape)
        for modules in inputs.values():
            ends = accumulate(ranks[module] for module in modules)
            for module, end in zip(modules, ends, strict=True):
                self.columns[module] = slice(end - ranks[module], end)
        self.adapters: dict[str, Mapping[str, LoRADelta]] = {}
        self.low: dict[str, torch.Tensor] = {}
        self.high: dict[str, torch.Tensor] = {}
        self._a: dict[str, torch.Tensor] = {}  # [capacity, rank of all, in]
        self._b: dict[str, torch.Tensor] = {}  # [capacity, rank, out]
        self._digests: list[str | None] = []  # by slot
        self._slots: dict[str, int] = {}  # by digest
        self._last_used: list[int] = []
        self._step = self._wasted = 0
        self._window = range(0)

    @property
    def capacity(self) -> int:
        """Number of allocated slots."""
        return len(self._digests)

    @property
    def num_window(self) -> int:
        return len(self._window)

    @property
    def num_bytes(self) -> int:
        return self.capacity * self.slot_bytes if self.capacity else 0

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one adapter's copy."""
        deltas = next(iter(self.adapters.values()))
        total = 0
        for module, columns in self.columns.items():
            a, b = factors_of(deltas[module])
            total += (columns.stop - columns.start) * (len(a) + b.shape[1]) * a.itemsize
        return total

    def has_copy(self, digest: str) -> bool:
        return digest in self._slots

    def clear(self) -> None:
        """Free all copies; adapters are copied again when a step needs them."""
        # one statement: no error in between leaves them inconsistent
        self._digests, self._slots, self._last_used, self._window = [], {}, [], range(0)
        for tensors in (self.low, self.high, self._a, self._b):
            tensors.clear()

    def remove(self, digest: str) -> None:
        self.adapters.pop(digest, None)
        if digest in self._slots:
            self._digests[self._slots.pop(digest)] = None

    def place(self, digests: Collection[str], *, max_slots: int | None = None) -> Mapping[str, int]:
        """Put these adapters into slots, copying only if necessary; returns their indices in the window.

        Allocates at most ``max_slots``. After a failure all copies are freed.
        """
        needed = frozenset(digests)
        assert 0 < len(needed) <= self.max_slots
        self._step += 1
        try:
            if not self._are_placed(needed):
                self._compact(needed, self.max_slots if max_slots is None else min(max_slots, self.max_slots))
            slots = {digest: self._slots[digest] for digest in needed}
            for slot in slots.values():
                self._last_used[slot] = self._step
            self._set_window(range(min(slots.values()), max(slots.values()) + 1))
            return {digest: slot - self._window.start for digest, slot in slots.items()}
        except BaseException:
            self.clear()
            raise

    def check_integrity(self) -> None:
        """Every slot has one adapter or none, and every adapter one slot at most."""
        placed = {digest: slot for slot, digest in enumerate(self._digests) if digest is not None}
        ensure(placed == self._slots, "a slot has two adapters, or an adapter two slots")
        ensure(placed.keys() <= self.adapters.keys(), "a slot has an adapter that is gone")
        ensure(self.capacity <= self.max_slots, "there are more slots than there may be")
        lengths = {len(tensor) for tensor in (*self._a.values(), *self._b.values())}
        ensure(lengths <= {self.capacity}, "batched tensors are not as long as there are slots")

    def _are_placed(self, needed: Set[str]) -> bool:
        """Whether all have slots, and unused slots between them have not yet cost more than a copy."""
        if not self._slots.keys() >= needed:
            return False
        slots = [self._slots[digest] for digest in needed]
        num_unused = max(slots) - min(slots) + 1 - len(slots)
        self._wasted = self._wasted + num_unused if num_unused else 0
        return self._wasted < _MAX_WASTED

    def _compact(self, needed: Set[str], max_slots: int) -> None:
        """Move them into adjacent slots: where most of them are already, and other adapters were idle longest."""
        if len(needed) > self.capacity:
            self._grow(len(needed), max_slots)
        start = self._best_start(needed)
        window = range(start, start + len(needed))
        vacant = [slot for slot in window if self._digests[slot] not in needed]
        for digest in needed:
            if self._slots.get(digest, -1) not in window:
                self._move(digest, vacant.pop())
        self._wasted = 0

    def _best_start(self, needed: Set[str]) -> int:
        """First slot of the window with most of them; of equals the one whose other slots were used least recently."""
        worth = [
            1.0 if digest in needed else -used / (2 * self.capacity * self._step)
            for digest, used in zip(self._digests, self._last_used, strict=True)
        ]
        sums = list(accumulate(worth, initial=0.0))
        return max(range(self.capacity - len(needed) + 1), key=lambda start: sums[start + len(needed)] - sums[start])

    def _move(self, digest: str, slot: int) -> None:
        if digest in self._slots:
            self._digests[self._slots[digest]] = None
        if (before := self._digests[slot]) is not None:
            del self._slots[before]
        self._digests[slot], self._slots[digest] = digest, slot
        deltas = self.adapters[digest]
        for name, modules in self.inputs.items():
            whole = self._a[name][slot]  # [rank of all, in]
            for module in modules:
                a, b = factors_of(deltas[module])
                _copy_padded(a.t(), whole[self.columns[module]])
                _copy_padded(b, self._b[module][slot])

    def _grow(self, num_slots: int, max_slots: int) -> None:
        """Reallocate, which is rare: all slots are unused, and adapters are copied again when needed."""
        capacity = max(self.capacity, _MIN_SLOTS)
        while capacity < num_slots:
            capacity *= 2
        capacity = max(num_slots, min(capacity, max_slots))
        self.clear()
        deltas = next(iter(self.adapters.values()))
        for name, modules in self.inputs.items():
            like = factors_of(deltas[modules[0]])[0]
            self._a[name] = like.new_empty(capacity, self.columns[modules[-1]].stop, len(like))
            for module in modules:
                columns = self.columns[module]
                num_outputs = factors_of(deltas[module])[1].shape[1]
                self._b[module] = like.new_empty(capacity, columns.stop - columns.start, num_outputs)
        self._digests, self._last_used = [None] * capacity, [0] * capacity

    def _set_window(self, window: range) -> None:
        if window != self._window:
            part = slice(window.start, window.stop)
            self.low = {name: tensor[part].transpose(1, 2) for name, tensor in self._a.items()}
            self.high = {module: tensor[part] for module, tensor in self._b.items()}
            self._window = window


def factors_of(delta: LoRADelta) -> tuple[torch.Tensor, torch.Tensor]:
    """A [in, rank] and B [rank, out] of a delta that has both."""
    assert delta.a is not None and delta.b is not None
    return delta.a, delta.b


def _padded_rank(rank: int) -> int:
    return max(_MIN_RANK, 1 << (rank - 1).bit_length())


def _copy_padded(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy into the first rows of a target, and fill its other rows with zeros."""
    target[: len(source)] = source
    if len(source) < len(target):
        target[len(source) :] = 0
