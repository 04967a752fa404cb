"""Adapters of one shape, copied side by side, so that a step computes all of them with two batched products.

(Chen et al. 2023, Punica; on a CPU the loop's calls cost more than its bytes.) A seat is an index of the stacked
tensors. A step computes a window of seats, so those that it needs are kept next to each other; a seat in the window
that it does not need is a hole, computed for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from functools import cached_property
from itertools import accumulate

import torch

from server.integrity import ensure
from server.lora.delta import Delta

_PATIENCE = 3
"""Holes computed for nothing before seats are moved: about what copying one adapter costs."""
_SMALLEST_RANK = 4
_FEWEST_SEATS = 2

Shape = frozenset[tuple[str, int]]
"""Module and padded rank of every linear that an adapter changes."""


def shape_of(deltas: Mapping[str, Delta]) -> Shape | None:
    """What adapters of one stack have in common, None for one that changes a linear by more than a low-rank delta.

    Ranks are padded to a power of two.
    """
    linears = {module: delta for module, delta in deltas.items() if delta.kind == "linear"}
    if not linears or not all(delta.plain for delta in linears.values()):
        return None
    return frozenset((module, _padded(_factors(delta)[1].shape[0])) for module, delta in linears.items())


class Stack:
    """The stacked A and B of adapters of one ``Shape``. The engine thread owns it.

    ``inputs`` has the modules of the shape by input. For the current window, ``low`` has per input A [seats, in, rank
    of all its modules], and ``high`` per module B [seats, rank, out]; ``columns`` says which of these ranks are whose.
    Seats grow by doubling, to ``max_seats`` at most.
    """

    def __init__(self, inputs: Mapping[str, Sequence[str]], shape: Shape, *, max_seats: int) -> None:
        self.inputs, self.max_seats = inputs, max_seats
        self.columns: dict[str, slice] = {}
        ranks = dict(shape)
        for modules in inputs.values():
            ends = accumulate(ranks[module] for module in modules)
            self.columns |= {one: slice(end - ranks[one], end) for one, end in zip(modules, ends, strict=True)}
        self.adapters: dict[str, Mapping[str, Delta]] = {}
        self.low: dict[str, torch.Tensor] = {}
        self.high: dict[str, torch.Tensor] = {}
        self._a: dict[str, torch.Tensor] = {}  # [capacity, rank of all, in]
        self._b: dict[str, torch.Tensor] = {}  # [capacity, rank, out]
        self._holders: list[str | None] = []
        self._seats: dict[str, int] = {}
        self._last_used: list[int] = []
        self._step = self._wasted = 0
        self._window = range(0)

    @property
    def capacity(self) -> int:
        """Seats that there are."""
        return len(self._holders)

    @property
    def num_bytes(self) -> int:
        """Bytes of the stacked tensors."""
        return self.capacity * self.seat_bytes if self.capacity else 0

    @cached_property
    def seat_bytes(self) -> int:
        """Bytes of one adapter's copy."""
        some = next(iter(self.adapters.values()))
        sizes = (
            (self.columns[module], *_factors(some[module])) for modules in self.inputs.values() for module in modules
        )
        return sum((one.stop - one.start) * (len(a) + b.shape[1]) * a.itemsize for one, a, b in sizes)

    def clear(self) -> None:
        """Give the memory of all copies back; whoever is needed is copied again."""
        self._holders, self._seats, self._last_used, self._window = [], {}, [], range(0)
        for tensors in (self.low, self.high, self._a, self._b):
            tensors.clear()

    def remove(self, digest: str) -> None:
        """Forget an adapter, so that its seat is free; one that is not there is no error."""
        self.adapters.pop(digest, None)
        if digest in self._seats:
            self._holders[self._seats.pop(digest)] = None

    def is_seated(self, digest: str) -> bool:
        """Whether there is a copy of an adapter."""
        return digest in self._seats

    def place(self, digests: Collection[str], *, max_seats: int | None = None) -> Mapping[str, int]:
        """Seat these adapters, and give their places in the window. Copies only those that have no seat, or move.

        Memory is taken for ``max_seats`` at most. Where it fails, the copies are all gone.
        """
        needed = frozenset(digests)
        assert 0 < len(needed) <= self.max_seats
        self._step += 1
        try:
            if not self._seated(needed):
                self._seat(needed, self.max_seats if max_seats is None else min(max_seats, self.max_seats))
            seats = {digest: self._seats[digest] for digest in needed}
            for seat in seats.values():
                self._last_used[seat] = self._step
            self._look_at(range(min(seats.values()), max(seats.values()) + 1))
            return {digest: seat - self._window.start for digest, seat in seats.items()}
        except BaseException:
            self.clear()
            raise

    @property
    def num_window(self) -> int:
        """Seats of the window."""
        return len(self._window)

    def check_integrity(self) -> None:
        """Every seat has one holder or none, and every holder is an adapter of this stack."""
        held = {holder: seat for seat, holder in enumerate(self._holders) if holder is not None}
        ensure(held == self._seats, "a seat has two holders, or an adapter two seats")
        ensure(held.keys() <= self.adapters.keys(), "a seat is held by an adapter that is gone")
        ensure(self.capacity <= self.max_seats, "there are more seats than there may be")
        lengths = {len(tensor) for tensor in (*self._a.values(), *self._b.values())}
        ensure(lengths <= {self.capacity}, "stacked tensors are not as long as there are seats")

    def _seated(self, needed: Set[str]) -> bool:
        """Whether all have seats, and the holes between them are few or new."""
        if not all(digest in self._seats for digest in needed):
            return False
        seats = [self._seats[digest] for digest in needed]
        holes = max(seats) - min(seats) + 1 - len(seats)
        self._wasted = self._wasted + holes if holes else 0
        return self._wasted < _PATIENCE

    def _seat(self, needed: Set[str], max_seats: int) -> None:
        """Seat them without holes, where most of them sit already and others have been idle for longest."""
        if len(needed) > self.capacity:
            self._grow(len(needed), max_seats)
        start = self._best_start(needed)
        window = range(start, start + len(needed))
        vacant = [seat for seat in window if self._holders[seat] not in needed]
        for digest in needed:
            if self._seats.get(digest, -1) not in window:
                self._move(digest, vacant.pop())
        self._wasted = 0

    def _best_start(self, needed: Set[str]) -> int:
        """Of the window with most of them; among equals of the one whose other seats were used least recently."""
        worth = [
            1.0 if holder in needed else -used / (2 * self.capacity * self._step)
            for holder, used in zip(self._holders, self._last_used, strict=True)
        ]
        sums = list(accumulate(worth, initial=0.0))
        return max(range(self.capacity - len(needed) + 1), key=lambda start: sums[start + len(needed)] - sums[start])

    def _move(self, digest: str, seat: int) -> None:
        if digest in self._seats:
            self._holders[self._seats[digest]] = None
        if (before := self._holders[seat]) is not None:
            del self._seats[before]
        self._holders[seat], self._seats[digest] = digest, seat
        deltas = self.adapters[digest]
        for name, modules in self.inputs.items():
            whole = self._a[name][seat]  # [rank of all, in]
            for module in modules:
                a, b = _factors(deltas[module])
                _put(whole[self.columns[module]], a.t())
                _put(self._b[module][seat], b)

    def _grow(self, num_seats: int, max_seats: int) -> None:
        """Make room for so many, with all seats free: who is needed is copied again, which is rare."""
        capacity = max(self.capacity, _FEWEST_SEATS)
        while capacity < num_seats:
            capacity *= 2
        capacity = max(num_seats, min(capacity, max_seats))
        self.clear()
        some = next(iter(self.adapters.values()))
        for name, modules in self.inputs.items():
            like = _factors(some[modules[0]])[0]
            rank = self.columns[modules[-1]].stop
            self._a[name] = like.new_empty(capacity, rank, len(like))
            for module in modules:
                columns = self.columns[module]
                out = _factors(some[module])[1].shape[1]
                self._b[module] = like.new_empty(capacity, columns.stop - columns.start, out)
        self._holders, self._last_used = [None] * capacity, [0] * capacity

    def _look_at(self, window: range) -> None:
        if window != self._window:
            part = slice(window.start, window.stop)
            self.low = {name: tensor[part].transpose(1, 2) for name, tensor in self._a.items()}
            self.high = {module: tensor[part] for module, tensor in self._b.items()}
            self._window = window


def _factors(delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    assert delta.a is not None and delta.b is not None
    return delta.a, delta.b


def _padded(rank: int) -> int:
    return max(_SMALLEST_RANK, 1 << (rank - 1).bit_length())


def _put(target: torch.Tensor, source: torch.Tensor) -> None:
    """Rows into more rows, the others zero."""
    target[: len(source)] = source
    if len(source) < len(target):
        target[len(source) :] = 0
