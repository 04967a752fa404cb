"""Keys and values of all sequences, one slot a sequence."""

from __future__ import annotations

import contextlib
import mmap
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from server.lora.transfer import to_device
from server.sequence import CopyPrefix, KVOperation

_MANY_SEGMENTS = 4
"""Segments for each of which a copy costs less than a scattered one for all, on a CPU; on an accelerator it is one."""
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Python names it from 3.13 on; the number is Linux's on x86-64 and ARM."""


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps for a position; K and V may differ, and so may layers."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class AttentionSegment:
    """Consecutive rows of one sequence in the flat batch, from row ``row`` and position ``start`` on, and its slot."""

    row: int
    start: int
    length: int
    slot: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.length)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + self.length

    def first_key(self, window: int | None) -> int:
        """The first position that any row sees."""
        return 0 if window is None else max(0, self.start - window + 1)


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """Where each row of a step belongs. Segments lie end to end; ``slots`` and ``positions`` are int64 [rows]."""

    segments: tuple[AttentionSegment, ...]
    slots: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, segments: tuple[AttentionSegment, ...], device: torch.device) -> AttentionMetadata:
        slots, positions = to_device(device, *slots_and_positions(segments))
        return cls(segments, slots, positions)


def slots_and_positions(segments: Sequence[AttentionSegment]) -> tuple[list[int], list[int]]:
    """Those of each row."""
    slots = [segment.slot for segment in segments for _ in range(segment.length)]
    positions = [position for segment in segments for position in range(segment.start, segment.end)]
    return slots, positions


@dataclass(frozen=True)
class Region:
    """One layer's keys, or its values, in a slot: ``heads`` runs of ``max_len * dim`` numbers.

    ``offset`` is where the first begins, ``stride`` how far apart they are, both in numbers.
    """

    heads: int
    dim: int
    offset: int
    stride: int


@dataclass(frozen=True)
class KVLayout:
    """How a slot lies in memory: region after region, each head's numbers from the beginning of a page on."""

    shapes: tuple[LayerShape, ...]
    max_len: int
    dtype: torch.dtype
    page: int = mmap.PAGESIZE

    @cached_property
    def regions(self) -> list[tuple[Region, Region]]:
        """Keys and values of each layer."""
        offset, regions = 0, []
        for shape in self.shapes:
            pair = []
            for dim in (shape.key_dim, shape.value_dim):
                stride = self._whole_pages(self.max_len * dim)
                pair.append(Region(shape.num_kv_heads, dim, offset, stride))
                offset += shape.num_kv_heads * stride
            regions.append((pair[0], pair[1]))
        return regions

    @property
    def slot_size(self) -> int:
        """Numbers in a slot."""
        return sum(region.heads * region.stride for region in self._each())

    @cached_property
    def _heads_by_dim(self) -> Counter[int]:
        heads: Counter[int] = Counter()
        for region in self._each():
            heads[region.dim] += region.heads
        return heads

    def bytes_of(self, length: int) -> int:
        """Memory that the first ``length`` positions of a slot take, in bytes."""
        numbers = sum(heads * self._whole_pages(length * dim) for dim, heads in self._heads_by_dim.items())
        return numbers * self.dtype.itemsize

    def tails(self, length: int) -> Iterator[tuple[int, int]]:
        """Begin and end, in bytes from the slot's begin, of all whole pages that the first positions don't need."""
        if not length:
            yield 0, self.slot_size * self.dtype.itemsize
            return
        for region in self._each():
            kept = self._whole_pages(length * region.dim)
            for head in range(region.heads):
                begin = region.offset + head * region.stride
                if kept < region.stride:
                    yield (begin + kept) * self.dtype.itemsize, (begin + region.stride) * self.dtype.itemsize

    def _each(self) -> Iterator[Region]:
        for pair in self.regions:
            yield from pair

    def _whole_pages(self, numbers: int) -> int:
        """So many numbers, rounded up to whole pages."""
        in_page = self.page // self.dtype.itemsize
        return -(-numbers // in_page) * in_page


def longest_within(num_bytes: int, layout: KVLayout) -> int:
    """The longest sequence that fits into so much memory; 0 where none does, ``layout.max_len`` at most."""
    return bisect_right(range(1, layout.max_len + 1), num_bytes, key=layout.bytes_of)


def num_slots_within(num_bytes: int, layout: KVLayout, device: torch.device, *, wanted: int) -> int:
    """How many slots there can be: as many as are wanted where memory comes by the page, else whole ones that fit."""
    return wanted if is_paged(device) else min(wanted, num_bytes // layout.bytes_of(layout.max_len))


class KVCache:
    """Per layer a view of keys and one of values, [slots, kv_heads, max_len, dim].

    A sequence's keys lie contiguous. On Linux the operating system gives a CPU memory only for the pages that are
    written, so a slot costs what its sequence is long, not ``max_len``; what is released goes back to it.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], *, num_slots: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout = KVLayout(tuple(shapes), max_len, dtype)
        self._slot_bytes = self.layout.slot_size * dtype.itemsize
        self._num_copied = _MANY_SEGMENTS if device.type == "cpu" else 1
        self._pages: mmap.mmap | None = None
        if is_paged(device):
            self._pages = _reserve(num_slots * self._slot_bytes)
            memory = torch.frombuffer(self._pages, dtype=dtype)
        else:
            memory = torch.zeros(num_slots * self.layout.slot_size, dtype=dtype, device=device)
        pairs = self.layout.regions
        self.keys = [self._view(memory, region, num_slots) for region, _ in pairs]
        self.values = [self._view(memory, region, num_slots) for _, region in pairs]
        self._rows = [
            (keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in zip(self.keys, self.values, strict=True)
        ]  # [slots, max_len, kv_heads, dim]
        self._slots: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def write(self, layer: int, metadata: AttentionMetadata, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [1, kv_heads, rows, dim] of a step."""
        if len(metadata.segments) > self._num_copied:
            at, dtype = (metadata.slots, metadata.positions), self.layout.dtype
            for kept, new in zip(self._rows[layer], (keys, values), strict=True):
                kept.index_put_(at, new[0].transpose(0, 1).to(dtype))
            return
        for segment in metadata.segments:
            for kept, new in zip(self.slot(layer, segment.slot), (keys, values), strict=True):
                kept.narrow(2, segment.start, segment.length).copy_(new.narrow(2, segment.row, segment.length))

    def read(self, layer: int, segment: AttentionSegment, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, kv_heads, keys, dim] that a segment looks at, from the first in its window on."""
        first = segment.first_key(window)
        keys, values = self.slot(layer, segment.slot)
        return keys.narrow(2, first, segment.end - first), values.narrow(2, first, segment.end - first)

    def slot(self, layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one slot, [1, kv_heads, max_len, dim]."""
        view = self._slots.get((layer, slot))
        if view is None:
            both = self.keys[layer][slot : slot + 1], self.values[layer][slot : slot + 1]
            view = self._slots[layer, slot] = both
        return view

    def apply(self, kv_op: KVOperation) -> None:
        """Copy a prefix, or release a tail."""
        if isinstance(kv_op, CopyPrefix):
            for kept in (*self.keys, *self.values):
                kept[kv_op.target, :, : kv_op.length] = kept[kv_op.source, :, : kv_op.length]
        elif self._pages is not None:
            for begin, end in self.layout.tails(kv_op.length):
                self._pages.madvise(mmap.MADV_DONTNEED, kv_op.slot * self._slot_bytes + begin, end - begin)

    def clear(self, slot: int, start: int) -> None:
        """Make positions of a slot from ``start`` on zero.

        Whoever reads beyond a sequence's end, with a weight of 0, must not find an infinity or NaN that another left.
        """
        for kept in (*self.keys, *self.values):
            kept[slot, :, start:].zero_()

    def _view(self, memory: torch.Tensor, region: Region, num_slots: int) -> torch.Tensor:
        size = (num_slots, region.heads, self.layout.max_len, region.dim)
        return memory.as_strided(size, (self.layout.slot_size, region.stride, region.dim, 1), region.offset)


def is_paged(device: torch.device) -> bool:
    """Whether memory there is taken page by page as it is written, and can be given back."""
    return device.type == "cpu" and sys.platform == "linux"


def _reserve(num_bytes: int) -> mmap.mmap:
    """Addresses without memory behind them yet, however many. Huge pages would take far more than is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    pages = mmap.mmap(-1, num_bytes, flags=flags)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
