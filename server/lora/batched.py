"""Low-rank deltas by torch operations: one product for modules of the same input, batched for adapters of a shape."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, repeat
from typing import ClassVar

import torch

from server.integrity import ensure
from server.lora.backend import AdapterRun, BatchAdapters
from server.lora.delta import LoRADelta
from server.lora.slots import LoRAShape, LoRASlots, factors_of, shape_of
from server.lora.transfer import to_device
from server.lora.weights import FusedA, LoRAWeights
from server.sequence import Batch, Segment

logger = logging.getLogger("quickchange.lora")

# Costs measured by benchmarks/lora_bank.py, in units of one row of a batched product.
_ALONE = 12
"""Extra cost of an adapter that is computed alone."""
_ROW_ALONE = 0.3
"""Extra cost of each of its rows."""
_UNEVEN = 10
"""Cost of gathering rows if adapters in slots have different numbers of rows."""


class BatchedTorchLoRA:
    """Two products per linear and adapter, or two batched products for several adapters.

    ``groups`` are linears that receive the same tensor. Adapters of one shape with few rows in a step are copied into
    at most ``max_slots`` slots and computed together (Chen et al. 2023, Punica). Without memory for copies, adapters
    are computed one after another.
    """

    makes_copies: ClassVar[bool] = True
    can_replay: ClassVar[bool] = False
    generation: ClassVar[int] = 0

    def __init__(self, groups: Sequence[tuple[str, ...]], *, max_slots: int, device: torch.device) -> None:
        self.batch = BatchAdapters()
        self._groups, self._max_slots, self._device = groups, max_slots, device
        self._max_bytes: int | None = None
        self._inputs: dict[str, SharedLoRAInput] = {}
        for modules in groups:
            self._inputs |= dict.fromkeys(modules, SharedLoRAInput(modules))
        self._slots: dict[LoRAShape, LoRASlots] = {}
        self._slots_of: dict[str, LoRASlots] = {}
        self._without_copies: set[LoRASlots] = set()
        self._placed: dict[LoRASlots, Mapping[str, int]] = {}  # of the step: places in the window, by digest
        self._layouts: dict[int, AdapterLayout] = {}

    @property
    def num_bytes(self) -> int:
        return sum(slots.num_bytes for slots in self._slots.values())

    @property
    def active(self) -> bool:
        return self.batch.active

    def pack(self, weights: LoRAWeights) -> LoRAWeights:
        """Two or more plain deltas of a group get one tensor for their A."""
        deltas, fused = dict(weights.deltas), list(weights.fused)
        packed = {module for group in fused for module in group.columns}
        for modules in self._groups:
            plain = [module for module in modules if module in deltas and deltas[module].plain]
            if len(plain) > 1 and packed.isdisjoint(plain):
                fused.append(_fuse(plain, deltas))
        return replace(weights, deltas=deltas, fused=fused)

    def attach(self, module: str) -> bool:
        self._inputs.setdefault(module, SharedLoRAInput((module,))).attached.add(module)
        return True

    def detach(self, module: str) -> None:
        if module in self._inputs:
            self._inputs[module].attached.discard(module)

    def add(self, digest: str, weights: LoRAWeights) -> Iterable[torch.Tensor]:
        for shared in {self._inputs[module] for module in weights.deltas if module in self._inputs}:
            shared.add(digest, weights)
        if (shape := shape_of(weights.deltas)) is not None:
            if shape not in self._slots:
                self._slots[shape] = LoRASlots(self._by_input(shape), shape, max_slots=self._max_slots)
            self._slots[shape].adapters[digest] = weights.deltas
            self._slots_of[digest] = self._slots[shape]
        return ()

    def remove(self, digest: str) -> None:
        self._slots_of.pop(digest, None)
        for shape, slots in list(self._slots.items()):
            slots.remove(digest)
            if not slots.adapters:
                del self._slots[shape]
        self._without_copies.clear()
        self._placed = {}
        for shared in self._inputs.values():
            shared.remove(digest)

    def limit(self, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        for slots in self._slots.values():
            if max_bytes is None or self.num_bytes <= max_bytes:
                return
            slots.clear()

    def begin_sorted(self, batch: Batch) -> Batch:
        """Rows without an adapter first, then adapters in slots by slot, then those computed one after another."""
        if self.batch.active:  # a failed step may have left cached terms
            for shared in self._inputs.values():
                shared.forget()
        self._place(batch)
        places = {
            digest: (number, slot)
            for number, placed in enumerate(self._placed.values())
            for digest, slot in placed.items()
        }
        last = (len(self._placed), 0)

        def key(segment: Segment) -> tuple[bool, tuple[int, int], object]:
            adapters = segment.sequence.adapters
            place = places.get(adapters[0].digest, last) if len(adapters) == 1 else last
            return bool(adapters), place, adapters

        ordered = replace(batch, segments=tuple(sorted(batch.segments, key=key)))
        self.batch.begin(ordered.segments)
        self._layouts = {}
        return ordered

    def apply(self, module: str, x: torch.Tensor, y: torch.Tensor) -> None:
        for rows, low, b in self._inputs[module].take(module, x, self.layout):
            rows.add(y, low, b)

    def layout(self, num_rows: int) -> AdapterLayout:
        if num_rows not in self._layouts:
            self._layouts[num_rows] = self._make_layout(self.batch.runs(num_rows))
        return self._layouts[num_rows]

    def check_integrity(self, digests: Iterable[str], modules: Iterable[str]) -> None:
        for slots in self._slots.values():
            slots.check_integrity()
        in_slots = {digest for slots in self._slots.values() for digest in slots.adapters}
        ensure(in_slots == self._slots_of.keys(), "slots and their index by adapter disagree")
        ensure(in_slots <= set(digests), "slots have an adapter that was removed")
        attached = {module for shared in self._inputs.values() for module in shared.attached}
        ensure(attached == set(modules), "attached and wrapped linears differ")

    def _by_input(self, shape: LoRAShape) -> Mapping[str, Sequence[str]]:
        inputs: dict[str, list[str]] = defaultdict(list)
        for module in sorted(module for module, _ in shape):
            inputs[self._inputs[module].name].append(module)
        return inputs

    def _place(self, batch: Batch) -> None:
        """Put adapters with few rows into slots, if there are two or more of a shape."""
        rows: dict[LoRASlots, dict[str, int]] = {}
        for segment in batch.segments:
            adapters = segment.sequence.adapters
            slots = self._slots_of.get(adapters[0].digest) if len(adapters) == 1 else None
            if slots is not None:
                counts = rows.setdefault(slots, {})
                counts[adapters[0].digest] = counts.get(adapters[0].digest, 0) + segment.length
        self._placed = {}
        for slots, counts in rows.items():
            digests = computed_together(counts)
            if 0 < len(digests) <= self._max_slots and (placed := self._placed_in(slots, digests)):
                self._placed[slots] = placed

    def _placed_in(self, slots: LoRASlots, digests: Sequence[str]) -> Mapping[str, int]:
        """Window indices of as many of these adapters as fit into memory; none for fewer than two."""
        if slots in self._without_copies:
            return {}
        room = self._room(slots, len(digests))
        if room < len(digests):
            digests = sorted(digests, key=lambda digest: not slots.has_copy(digest))[:room]
        if len(digests) < 2:
            return {}
        try:
            return slots.place(digests, max_slots=room)
        except (MemoryError, RuntimeError) as error:
            self._without_copies.add(slots)
            logger.warning("out of memory for batched LoRA copies; computing adapters sequentially: %s", error)
            return {}

    def _room(self, slots: LoRASlots, num_needed: int) -> int:
        """How many slots of a shape fit into memory. Frees copies that the step does not use."""
        if self._max_bytes is None:
            return self._max_slots
        others = [other for other in self._slots.values() if other is not slots]
        left = self._max_bytes - sum(other.num_bytes for other in others)
        for other in others:
            if left >= num_needed * slots.slot_bytes:
                break
            if other not in self._placed:
                left += other.num_bytes
                other.clear()
        return max(slots.capacity, left // slots.slot_bytes)

    def _make_layout(self, runs: Sequence[AdapterRun]) -> AdapterLayout:
        in_slots: dict[LoRASlots, list[AdapterRun]] = {}
        alone = []
        for run in runs:
            slots = self._slots_of.get(run.adapters[0].digest) if len(run.adapters) == 1 else None
            if slots is not None and run.adapters[0].digest in self._placed.get(slots, ()):
                in_slots.setdefault(slots, []).append(run)
            else:
                alone.append(run)
        groups = [_padded_group(slots, self._placed[slots], runs, self._device) for slots, runs in in_slots.items()]
        return AdapterLayout(alone, groups)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """The rows of a module: runs that are computed ``alone``, and ``groups`` of runs in slots."""

    alone: Sequence[AdapterRun]
    groups: Sequence[PaddedGroup]


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """Rows ``start`` to ``end`` of adapters whose copies are in one window of slots, in the order of their slots.

    Each slot of the window is padded to ``most`` rows. If some have fewer, ``gather`` [window * most] are the rows of
    the group to read (any, for padding), and ``back`` [rows] is the index of each row's result.
    """

    slots: LoRASlots
    start: int
    end: int
    most: int
    gather: torch.Tensor | None = None
    back: torch.Tensor | None = None
    scales: torch.Tensor | None = None  # [window, most, 1], unless all are 1

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """x [all rows, in] -> [window, most, in]."""
        part = x[self.start : self.end]
        if self.gather is not None:
            part = part.index_select(0, self.gather)
        return part.view(-1, self.most, x.shape[1])

    def add(self, y: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> None:
        """``y += low @ b`` on these rows: y [all rows, out], low [window, most, rank], b [window, rank, out]."""
        part = y[self.start : self.end]
        if self.back is None and y.dtype == torch.float32 and y.is_contiguous():
            part.view(-1, self.most, y.shape[1]).baddbmm_(low, b)  # half as fast as below where y is not contiguous
            return
        change = torch.bmm(low, b).view(-1, y.shape[1])
        part.add_(change if self.back is None else change.index_select(0, self.back))


LoRATerm = tuple[AdapterRun | PaddedGroup, torch.Tensor, torch.Tensor]
"""Rows, their product with a module's A, and the module's B: the arguments of the rows' ``add``."""


class SharedLoRAInput:
    """The plain deltas of modules that receive the same tensor, or of a single module.

    ``name`` is the first module. The module that is called first computes the products with the A of all.
    """

    def __init__(self, modules: tuple[str, ...]) -> None:
        self.name, self.modules = modules[0], modules
        self.attached: set[str] = set()
        self._adapters: dict[str, Sequence[tuple[FusedA, Mapping[str, torch.Tensor]]]] = {}  # with each module's B
        self._x: torch.Tensor | None = None
        self._terms: dict[str, list[LoRATerm]] = {}

    def add(self, digest: str, weights: LoRAWeights) -> None:
        factors = {module: factors_of(delta) for module, delta in weights.deltas.items() if delta.plain}
        alone = [module for module in self.modules if module in factors]
        products = []
        for fused in weights.fused:
            if fused.columns.keys() <= set(alone):
                products.append((fused, {module: factors[module][1] for module in fused.columns}))
                alone = [module for module in alone if module not in fused.columns]
        for module in alone:
            a, b = factors[module]
            products.append((FusedA(a, {module: slice(0, a.shape[1])}), {module: b}))
        if products:
            self._adapters[digest] = products

    def remove(self, digest: str) -> None:
        self._adapters.pop(digest, None)

    def take(self, module: str, x: torch.Tensor, layout: Callable[[int], AdapterLayout]) -> list[LoRATerm]:
        """The terms to add to a module's result for x [..., rows, in]; ``layout`` is called with the number of rows.

        x is held until every module took its terms. A module that is called twice is computed twice.
        """
        if x is not self._x or module not in self._terms:
            flat = x.reshape(-1, x.shape[-1])
            self._x, self._terms = x, self._compute(flat, layout(len(flat)))
        terms = self._terms.pop(module)
        if not self._terms:
            self._x = None
        return terms

    def forget(self) -> None:
        """Free the terms of a step whose modules were not all called."""
        self._x, self._terms = None, {}

    def _compute(self, x: torch.Tensor, layout: AdapterLayout) -> dict[str, list[LoRATerm]]:
        terms: dict[str, list[LoRATerm]] = {module: [] for module in self.attached}
        for group in layout.groups:
            slots = group.slots
            if self.name in slots.low:
                low = torch.bmm(group.cut(x).float(), slots.low[self.name])  # [window, most, rank of all]
                if group.scales is not None:
                    low *= group.scales
                for module in slots.inputs[self.name]:
                    terms[module].append((group, low[:, :, slots.columns[module]], slots.high[module]))
        for run in layout.alone:
            for use in run.adapters:
                for fused, high in self._adapters.get(use.digest, ()):
                    low = run.cut(x).float() @ fused.a  # [rows, rank of all]
                    if use.scale != 1.0:
                        low *= use.scale
                    for module, columns in fused.columns.items():
                        terms[module].append((run, low[:, columns], high[module]))
        return terms


def computed_together(rows: Mapping[str, int]) -> Sequence[str]:
    """The adapters to compute in one padded batch, so that the total cost is least; ``rows``: their numbers of rows."""
    fewest_first = sorted(rows, key=lambda digest: rows[digest])
    alone = sum(_ALONE + _ROW_ALONE * count for count in rows.values())
    best, cost = 0, alone
    for number, digest in enumerate(fewest_first, start=1):
        most = rows[digest]
        alone -= _ALONE + _ROW_ALONE * most
        padded = number * most + (_UNEVEN if rows[fewest_first[0]] < most else 0)
        if number > 1 and alone + padded < cost:
            best, cost = number, alone + padded
    return fewest_first[:best]


def _padded_group(
    slots: LoRASlots, places: Mapping[str, int], runs: Sequence[AdapterRun], device: torch.device
) -> PaddedGroup:
    """The group of adjacent runs in the order of their slots; ``places``: window index by adapter."""
    counts = [0] * slots.num_window
    for run in runs:
        counts[places[run.adapters[0].digest]] += run.end - run.start
    start, end, most = runs[0].start, runs[-1].end, max(counts)
    scales = list(chain.from_iterable(repeat(run.adapters[0].scale, run.end - run.start) for run in runs))
    assert sum(counts) == end - start == len(scales), "rows of adapters in slots are not adjacent"
    firsts = list(accumulate(counts, initial=0))
    gathered = [min(first + row, end - start - 1) for first in firsts[:-1] for row in range(most)]  # [window * most]
    gather = back = factors = None
    if min(counts) < most:
        places_of_rows = [slot * most + row for slot, count in enumerate(counts) for row in range(count)]
        gather, back = to_device(device, gathered, places_of_rows)
    if any(scale != 1.0 for scale in scales):
        (factors,) = to_device(device, [scales[row] for row in gathered], dtype=torch.float32)
        factors = factors.view(-1, most, 1)
    return PaddedGroup(slots, start, end, most, gather, back, factors)


def _fuse(modules: Sequence[str], deltas: dict[str, LoRADelta]) -> FusedA:
    """Concatenate the A of these modules' plain deltas; in ``deltas`` they become views of it."""
    parts = [factors_of(deltas[module])[0].t() for module in modules]  # [rank, in], as the file has them
    whole = torch.cat(parts)
    ends = list(accumulate(len(part) for part in parts))
    columns = {}
    for module, part, end in zip(modules, parts, ends, strict=True):
        columns[module] = slice(end - len(part), end)
        deltas[module] = replace(deltas[module], a=whole[columns[module]].t())
    return FusedA(whole.t(), columns)
