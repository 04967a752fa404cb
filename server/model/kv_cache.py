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

from cpu_kernels.blocks import padded
from server.lora.transfer import to_device
from server.sequence import CopyPrefix, KVOperation

_MANY_SEGMENTS = 4
"""Most segments of a step that are written one by one on a CPU; more are written by one scattered copy."""
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Python has the name from 3.13 on; the number is Linux's on x86-64 and ARM."""


@dataclass(frozen=True)
class LayerShape:
    """Shape of one layer's key and value of a position; key and value may differ, and so may layers."""

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
        """The first position that any row attends to."""
        return 0 if window is None else max(0, self.start - window + 1)


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """Slot and position of each row of a step, int64 [rows]; ``segments`` are adjacent in the batch."""

    segments: tuple[AttentionSegment, ...]
    slots: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, segments: tuple[AttentionSegment, ...], device: torch.device) -> AttentionMetadata:
        slots, positions = to_device(device, *slots_and_positions(segments))
        return cls(segments, slots, positions)


def slots_and_positions(segments: Sequence[AttentionSegment]) -> tuple[list[int], list[int]]:
    """Slot and position of each row."""
    slots = [segment.slot for segment in segments for _ in range(segment.length)]
    positions = [position for segment in segments for position in range(segment.start, segment.end)]
    return slots, positions


@dataclass(frozen=True)
class Region:
    """One layer's keys, or its values, in a slot: ``heads`` runs of ``max_len * dim`` numbers.

    ``offset`` is the start of the first run, ``stride`` the distance of two runs, both in numbers.
    """

    heads: int
    dim: int
    offset: int
    stride: int


@dataclass(frozen=True)
class KVLayout:
    """Memory layout of a slot: region after region; each head starts at a page."""

    shapes: tuple[LayerShape, ...]
    max_len: int
    dtype: torch.dtype
    page: int = mmap.PAGESIZE

    @cached_property
    def regions(self) -> list[tuple[Region, Region]]:
        """Keys and values of each layer."""
        offset = 0
        regions: list[tuple[Region, Region]] = []
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
        """Bytes of the first ``length`` positions of a slot."""
        numbers = sum(heads * self._whole_pages(length * dim) for dim, heads in self._heads_by_dim.items())
        return numbers * self.dtype.itemsize

    def tails(self, length: int) -> Iterator[tuple[int, int]]:
        """Start and end, in bytes within the slot, of all whole pages behind the first ``length`` positions."""
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
        return padded(numbers, self.page // self.dtype.itemsize)


def longest_within(num_bytes: int, layout: KVLayout) -> int:
    """The longest sequence that fits into ``num_bytes``: from 0 to ``layout.max_len``."""
    return bisect_right(range(1, layout.max_len + 1), num_bytes, key=layout.bytes_of)


def num_slots_within(num_bytes: int, layout: KVLayout, device: torch.device, *, wanted: int) -> int:
    """Number of slots: ``wanted`` where memory is paged, else at most as many as fit into ``num_bytes``."""
    return wanted if is_paged(device) else min(wanted, num_bytes // layout.bytes_of(layout.max_len))


class KVCache:
    """Per layer a view of keys and one of values, [slots, kv_heads, max_len, dim].

    The keys of a head and sequence are contiguous. On a CPU, Linux allocates only pages that are written, so that a
    slot takes memory by the length of its sequence, not ``max_len``; released pages are returned to the system.
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
            indices = (metadata.slots, metadata.positions)
            for cached, new in zip(self._rows[layer], (keys, values), strict=True):
                cached.index_put_(indices, new[0].transpose(0, 1).to(self.layout.dtype))
            return
        for segment in metadata.segments:
            for cached, new in zip(self.slot(layer, segment.slot), (keys, values), strict=True):
                cached.narrow(2, segment.start, segment.length).copy_(new.narrow(2, segment.row, segment.length))

    def read(self, layer: int, segment: AttentionSegment, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, kv_heads, keys, dim] that a segment attends to, from the first in its window on."""
        first = segment.first_key(window)
        keys, values = self.slot(layer, segment.slot)
        return keys.narrow(2, first, segment.end - first), values.narrow(2, first, segment.end - first)

    def slot(self, layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one slot, [1, kv_heads, max_len, dim]."""
        view = self._slots.get((layer, slot))
        if view is None:
            view = self.keys[layer][slot : slot + 1], self.values[layer][slot : slot + 1]
            self._slots[layer, slot] = view
        return view

    def apply(self, kv_op: KVOperation) -> None:
        """Copy a prefix, or release a tail."""
        if isinstance(kv_op, CopyPrefix):
            for cached in (*self.keys, *self.values):
                cached[kv_op.target, :, : kv_op.length] = cached[kv_op.source, :, : kv_op.length]
        elif self._pages is not None:
            for begin, end in self.layout.tails(kv_op.length):
                self._pages.madvise(mmap.MADV_DONTNEED, kv_op.slot * self._slot_bytes + begin, end - begin)

    def clear(self, slot: int, start: int) -> None:
        """Set positions of a slot from ``start`` on to zero.

        Padding beyond a sequence's end is read with a weight of 0, which times an infinity or NaN would be NaN.
        """
        for cached in (*self.keys, *self.values):
            cached[slot, :, start:].zero_()

    def _view(self, memory: torch.Tensor, region: Region, num_slots: int) -> torch.Tensor:
        size = (num_slots, region.heads, self.layout.max_len, region.dim)
        return memory.as_strided(size, (self.layout.slot_size, region.stride, region.dim, 1), region.offset)


def is_paged(device: torch.device) -> bool:
    """Whether memory of the device is allocated page by page when written, and can be released."""
    return device.type == "cpu" and sys.platform == "linux"


def _reserve(num_bytes: int) -> mmap.mmap:
    """Reserve addresses without memory. Huge pages are off: they would allocate far more than is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    pages = mmap.mmap(-1, num_bytes, flags=flags)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
