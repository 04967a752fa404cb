"""Which rows of the current batch use which adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, repeat

import torch

from server.lora.stack import Stack
from server.lora.transfer import to_device
from server.sequence import AdapterUse, Batch, Segment


@dataclass(frozen=True, slots=True)
class Run:
    """Rows ``start`` to ``end`` of a batch that all use these adapters; ``whole`` where there are no others."""

    start: int
    end: int
    uses: tuple[AdapterUse, ...]
    whole: bool = False

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Their part of x [all rows, ...]."""
        return x if self.whole else x[self.start : self.end]

    def add(self, y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> None:
        """``y += low @ b`` on these rows, rounded once: y [all rows, out], low [rows, rank], b [rank, out]."""
        part = self.cut(y)
        if y.dtype == torch.float32:
            part.addmm_(low, b)
        else:
            part.add_(low @ b)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows ``start`` to ``end`` of adapters that sit side by side in a stack, in the order of their seats.

    Each seat of the stack's window has ``most`` rows. Where some have fewer, ``gather`` [seats * most] says which row
    of the block stands there (any, where there is none), and ``back`` [rows] where each row's result is.
    """

    stack: Stack
    start: int
    end: int
    most: int
    gather: torch.Tensor | None = None
    back: torch.Tensor | None = None
    scales: torch.Tensor | None = None  # [seats, most, 1], where one of them is not 1

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """x [all rows, in] -> [seats, most, in]."""
        part = x[self.start : self.end]
        if self.gather is not None:
            part = part.index_select(0, self.gather)
        return part.view(-1, self.most, x.shape[1])

    def add(self, y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> None:
        """``y += low @ b`` on these rows: y [all rows, out], low [seats, most, rank], b [seats, rank, out]."""
        part = y[self.start : self.end]
        if self.back is None and y.dtype == torch.float32 and y.is_contiguous():
            part.view(-1, self.most, y.shape[1]).baddbmm_(low, b)  # half as fast as below where y is not contiguous
            return
        change = torch.bmm(low, b).view(-1, y.shape[1])
        part.add_(change if self.back is None else change.index_select(0, self.back))


@dataclass(frozen=True)
class Seating:
    """Adapters that a step computes stacked: ``seats`` are their places in the stack's window of ``num_seats``."""

    stack: Stack
    seats: Mapping[str, int]
    num_seats: int


@dataclass(frozen=True)
class Layout:
    """The adapters of a module's rows: ``runs`` are all, ``alone`` those of them that are in none of the ``blocks``."""

    runs: Sequence[Run] = ()
    alone: Sequence[Run] = ()
    blocks: Sequence[Block] = ()


class Rows:
    """The rows of the batch at hand; most modules see all of them, the head only those that are sampled.

    ``active`` tells whether any of them uses an adapter.
    """

    def __init__(self) -> None:
        self.active = False
        self.num_rows = self.num_sampled = 0
        self._layouts: dict[int, Layout] = {}

    def begin(self, batch: Batch, seatings: Sequence[Seating], device: torch.device) -> None:
        """Note the rows of each adapter for the forward pass that follows; those of a seating are side by side."""
        self.active = any(segment.sequence.adapters for segment in batch.segments)
        self._layouts = {}
        self.num_rows, self.num_sampled = (sum(map(count, batch.segments)) for count in (_num_rows, _num_sampled))
        if self.active:
            for count in (_num_sampled, _num_rows):
                num_rows = sum(map(count, batch.segments))
                if num_rows not in self._layouts:  # as many sampled as there are: the same rows
                    self._layouts[num_rows] = _layout(batch.segments, count, seatings, device)

    def of(self, num_rows: int) -> Layout:
        """The layout of a module that got so many rows."""
        assert num_rows in self._layouts, f"a module got {num_rows} rows of a batch of {list(self._layouts)}"
        return self._layouts[num_rows]


def _num_rows(segment: Segment) -> int:
    return segment.length


def _num_sampled(segment: Segment) -> int:
    return segment.num_sampled


def _layout(
    segments: Sequence[Segment], count: Callable[[Segment], int], seatings: Sequence[Seating], device: torch.device
) -> Layout:
    """``count`` says how many rows of each segment there are."""
    runs, start = [], 0
    num_rows = sum(map(count, segments))
    for uses, group in groupby(segments, key=lambda segment: segment.sequence.adapters):
        end = start + sum(map(count, group))
        if uses and end > start:
            runs.append(Run(start, end, uses, end - start == num_rows))
        start = end
    blocks, stacked = [], set()
    for seating in seatings:
        mine = [run for run in runs if len(run.uses) == 1 and run.uses[0].digest in seating.seats]
        if mine:
            blocks.append(_block(seating, mine, device))
            stacked.update(mine)
    return Layout(runs, [run for run in runs if run not in stacked], blocks)


def _block(seating: Seating, runs: Sequence[Run], device: torch.device) -> Block:
    """The rows of runs that follow one another in the order of their seats."""
    counts = [0] * seating.num_seats
    for run in runs:
        counts[seating.seats[run.uses[0].digest]] += run.end - run.start
    start, end, most = runs[0].start, runs[-1].end, max(counts)
    scales = list(chain.from_iterable(repeat(run.uses[0].scale, run.end - run.start) for run in runs))
    assert sum(counts) == end - start == len(scales), "rows of a stack do not lie side by side"
    firsts = list(accumulate(counts, initial=0))
    places = [
        min(first + number, end - start - 1) for first in firsts[: seating.num_seats] for number in range(most)
    ]  # [seats * most]
    gather, back = (None, None) if min(counts) == most else to_device(device, places, _back(counts, most))
    factors = None if all(scale == 1.0 for scale in scales) else _scales(scales, places, most, device)
    return Block(seating.stack, start, end, most, gather, back, factors)


def _back(counts: Sequence[int], most: int) -> list[int]:
    return [seat * most + number for seat, count in enumerate(counts) for number in range(count)]


def _scales(scales: Sequence[float], places: Sequence[int], most: int, device: torch.device) -> torch.Tensor:
    (factors,) = to_device(device, [scales[place] for place in places], dtype=torch.float32)
    return factors.view(-1, most, 1)
