"""Low-rank deltas by native kernels: tables have the addresses of each adapter's A and B, by linear."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch

from cpu_kernels.blocks import BF16_STEP, HALF_BLOCK, PANEL_ROWS, padded
from cpu_kernels.kernels import Kernels
from cpu_kernels.linear import Deltas
from cpu_kernels.lora_deltas import ADAPTER_ENTRY_SIZE, LISTED_TASK_SIZE, TASK_HEADER_SIZE, TASK_SIZE, TILE
from server.integrity import ensure
from server.lora.backend import AdapterRun, BatchAdapters
from server.lora.delta import LoRADelta
from server.lora.weights import LoRAWeights
from server.sequence import Batch

_MIN_ADAPTERS = 8
"""Initial capacity of the tables, in adapters."""
_ADAPTERS_OF_SEQUENCE = 4
_LINE, _BF16_BYTES = 64, 2

Outputs = Sequence[tuple[str, int]]
"""The linears of one packed linear: name, and number of outputs, a multiple of 16."""


class AddsDeltas(Protocol):
    """A packed linear that adds ``deltas`` itself, if they are set."""

    deltas: Deltas | None


class NativeLoRA:
    """One kernel call per linear, or none if a packed linear adds the deltas itself.

    ``modules`` may be wrapped; ``packed_linears`` add the deltas of their linears. Each linear has a table with a row
    for every adapter, and a step has task tables: which rows use which adapters. Task tables keep their addresses while
    ``generation`` is the same; their content changes with each step.
    """

    makes_copies: ClassVar[bool] = False

    def __init__(
        self,
        modules: Sequence[str],
        packed_linears: Sequence[tuple[AddsDeltas, Outputs]] = (),
        *,
        kernels: Kernels,
        max_seqs: int,
    ) -> None:
        assert kernels.add_deltas is not None
        self.batch = BatchAdapters()
        self.generation = 0
        self._add_deltas, self._launch = kernels.add_deltas, kernels.launch
        self._packed_of = {name: (packed, outputs) for packed, outputs in packed_linears for name, _ in outputs}
        self._cells = torch.zeros(len(modules), dtype=torch.long)  # the address of each linear's table
        self._cell_of = {module: number for number, module in enumerate(modules)}
        self._tables: dict[str, torch.Tensor] = {}  # int64 [capacity, ADAPTER_ENTRY_SIZE], of linears that are wrapped
        self._capacity = _MIN_ADAPTERS
        self._indices: dict[str, int] = {}
        self._free = list(range(_MIN_ADAPTERS))
        self._ranks: dict[str, int] = {}
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._no_replay: set[str] = set()
        size = TASK_HEADER_SIZE + TASK_SIZE * _ADAPTERS_OF_SEQUENCE * max_seqs
        self._task_tables = [torch.zeros(size, dtype=torch.long) for _ in range(2)]  # of all rows, of the head's
        self._low = torch.empty(0, dtype=torch.uint8)
        self._max_linears = max((len(outputs) for _, outputs in packed_linears), default=1)

    @property
    def num_bytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())

    @property
    def active(self) -> bool:
        return self.batch.active or self._launch.is_recording

    @property
    def can_replay(self) -> bool:
        runs = self.batch.runs(self.batch.num_rows)
        return not any(use.digest in self._no_replay for run in runs for use in run.adapters)

    def pack(self, weights: LoRAWeights) -> LoRAWeights:
        """Linears whose packed linear adds the deltas get tiles."""
        deltas = dict(weights.deltas)
        for module in deltas.keys() & self._packed_of.keys():
            deltas[module] = _in_tiles(deltas[module])
        return replace(weights, deltas=deltas)

    def attach(self, module: str) -> bool:
        if module not in self._tables:
            self._set_table(module, torch.zeros(self._capacity, ADAPTER_ENTRY_SIZE, dtype=torch.long))
        if module not in self._packed_of:
            return True
        packed, outputs = self._packed_of[module]
        if packed.deltas is None:
            packed.deltas = self._deltas_of(outputs)
        return False

    def detach(self, module: str) -> None:
        if module in self._packed_of:
            packed, outputs = self._packed_of[module]
            if self._tables.keys().isdisjoint(name for name, _ in outputs if name != module):
                packed.deltas = None
        if module in self._tables:
            self._cells[self._cell_of[module]] = 0
            del self._tables[module]

    def add(self, digest: str, weights: LoRAWeights) -> Iterable[torch.Tensor]:
        if not self._free:
            self._grow()
        index = self._indices[digest] = self._free.pop()  # one statement: no error in between loses an index
        kept = self._kept.setdefault(digest, [])
        max_rank = 0
        for module, delta in weights.deltas.items():
            if not delta.plain or delta.kind == "rows":
                self._no_replay.add(digest)
            if delta.plain and delta.kind == "linear":
                tensors, entry = _entry(delta)
                kept += tensors
                self._tables[module][index] = torch.tensor(entry)
                max_rank = max(max_rank, entry[-1])
        self._ranks[digest] = max_rank
        return kept

    def remove(self, digest: str) -> None:
        """Clears all table entries before the index is free, so that a second call completes a failed one."""
        self._no_replay.discard(digest)
        if digest not in self._indices:
            return
        for table in self._tables.values():
            table[self._indices[digest]] = 0
        self._ranks.pop(digest, None)
        self._kept.pop(digest, None)
        self._free.append(self._indices.pop(digest))

    def limit(self, max_bytes: int | None) -> None:
        """There are no copies."""

    def begin_sorted(self, batch: Batch) -> Batch:
        """Rows without an adapter first, then those of each adapter."""
        ordered = replace(batch, segments=tuple(sorted(batch.segments, key=lambda segment: segment.sequence.adapters)))
        self.batch.begin(ordered.segments)
        counts = dict.fromkeys((self.batch.num_rows, self.batch.num_logits))  # one table if the head gets all rows
        tables = [LoRATaskTable(self.batch.runs(count), self._indices, self._ranks) for count in counts]
        num_bytes = _LINE + max(table.num_bytes(self._max_linears) for table in tables)
        if self._low.nbytes < num_bytes:
            self._low = torch.empty(2 * num_bytes, dtype=torch.uint8)
        address = padded(self._low.data_ptr(), _LINE)
        for index, table in enumerate(tables):
            numbers = table.numbers(address, self._max_linears)
            if len(numbers) > len(self._task_tables[index]):
                self._task_tables[index] = torch.zeros(2 * len(numbers), dtype=torch.long)
                self.generation += 1
            self._task_tables[index][: len(numbers)] = torch.tensor(numbers)
        return ordered

    def apply(self, module: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Rows of y may have any stride; the numbers of a row are contiguous."""
        self._add_deltas(x, y, self.task_table(x.numel() // x.shape[-1]), self._cell(module))

    def task_table(self, num_rows: int) -> int:
        """Address of the task table of a module that received ``num_rows`` rows; 0 if no row has an adapter."""
        if not self.active:
            return 0
        of_all_rows, of_head_rows = self._task_tables
        if num_rows == self.batch.num_rows:
            return of_all_rows.data_ptr()
        ensure(num_rows == self.batch.num_logits, f"a module got {num_rows} of {self.batch.num_rows} rows")
        return of_head_rows.data_ptr()

    def check_integrity(self, digests: Iterable[str], modules: Iterable[str]) -> None:
        ensure(self._indices.keys() == set(digests), "tables have other adapters than there are")
        ensure(self._tables.keys() == set(modules), "tables are read for other linears than are wrapped")

    def _deltas_of(self, outputs: Outputs) -> PackedLinearDeltas:
        numbers = [len(outputs)]
        first = 0
        for module, size in outputs:
            end = first + size // HALF_BLOCK
            numbers += [self._cell(module), first, end]
            first = end
        return PackedLinearDeltas(self, torch.tensor(numbers))

    def _cell(self, module: str) -> int:
        return self._cells.data_ptr() + 8 * self._cell_of[module]

    def _set_table(self, module: str, table: torch.Tensor) -> None:
        """Set the linear's table. Kernels never read the address of freed memory."""
        before = self._tables.get(module)
        try:
            self._tables[module] = table
            self._cells[self._cell_of[module]] = table.data_ptr()
        except BaseException:
            if before is None:
                self._tables.pop(module, None)
            else:
                self._tables[module] = before
            raise

    def _grow(self) -> None:
        """Double the capacity of all tables."""
        capacity = 2 * self._capacity
        larger = {module: torch.zeros(capacity, ADAPTER_ENTRY_SIZE, dtype=torch.long) for module in self._tables}
        for module, table in larger.items():
            table[: self._capacity] = self._tables[module][: self._capacity]
            self._set_table(module, table)
        free = list(range(self._capacity, capacity))
        self._capacity, self._free = capacity, free  # one statement: no error in between leaves them inconsistent


class PackedLinearDeltas:
    """The deltas that a packed linear adds to its results."""

    def __init__(self, backend: NativeLoRA, linears: torch.Tensor) -> None:
        self._backend, self._linears = backend, linears

    def of(self, num_rows: int) -> tuple[int, int]:
        """Addresses of the task table and of the linears; both 0 if no row has an adapter."""
        tasks = self._backend.task_table(num_rows)
        return (tasks, self._linears.data_ptr()) if tasks else (0, 0)


class LoRATaskTable:
    """A step's runs in the layout of the kernels, and the size of their work space."""

    def __init__(self, runs: Sequence[AdapterRun], indices: Mapping[str, int], ranks: Mapping[str, int]) -> None:
        self._numbers: list[int] = []
        self._num_rows = self._num_tiles = self._max_rank = 0
        for run in runs:
            num_panels = padded(run.end, PANEL_ROWS) // PANEL_ROWS - run.start // PANEL_ROWS
            num_tiles = 2 * num_panels
            for use in run.adapters:
                self._numbers += [run.start, run.end, indices[use.digest], _float_bits(use.scale)]
                self._numbers += [self._num_rows, self._num_tiles]
                self._num_rows += run.end - run.start
                self._num_tiles += num_tiles
                self._max_rank = max(self._max_rank, ranks[use.digest])

    @property
    def _tile_bytes(self) -> int:
        """Bytes of ``x @ A`` of 16 rows and one linear, in tiles."""
        return padded(self._max_rank, BF16_STEP) // BF16_STEP * TILE

    def _low_bytes(self, num_linears: int) -> int:
        """Bytes of ``x @ A`` of all rows: in float32, or in tiles for each linear of a packed linear."""
        in_floats = 4 * self._num_rows * self._max_rank
        in_tiles = num_linears * self._num_tiles * self._tile_bytes
        return padded(max(in_floats, in_tiles), _LINE)

    def num_bytes(self, num_linears: int) -> int:
        """Bytes of the work space: ``x @ A`` and lists of tasks."""
        num_tasks = len(self._numbers) // TASK_SIZE
        return self._low_bytes(num_linears) + 8 * num_linears * (1 + LISTED_TASK_SIZE * num_tasks)

    def numbers(self, address: int, num_linears: int) -> list[int]:
        """Head and tasks; the work space of ``num_bytes`` is at ``address``."""
        lists = address + self._low_bytes(num_linears)
        head = [len(self._numbers) // TASK_SIZE, address, self._max_rank, address, self._tile_bytes, lists]
        return head + self._numbers


def _in_tiles(delta: LoRADelta) -> LoRADelta:
    """A plain delta in tiles; any other delta is returned unchanged."""
    if not delta.plain or delta.a is None or delta.b is None:
        return delta
    return replace(delta, a=None, b=None, tiles=LoRATiles.of(delta.a, delta.b))


def _entry(delta: LoRADelta) -> tuple[list[torch.Tensor], list[int]]:
    """A plain delta's tensors, and its table entry, the rank last."""
    if (tiles := delta.tiles) is not None:
        return [tiles.memory], [tiles.a_address, tiles.rank, tiles.b_address, tiles.rank]
    assert delta.a is not None and delta.b is not None
    a, b = delta.a.t(), delta.b.contiguous()  # [rank, in], [rank, out]
    a = a if a.stride(1) == 1 else a.contiguous()
    return [a, b], [a.data_ptr(), a.stride(0), b.data_ptr(), len(a)]


def _float_bits(factor: float) -> int:
    bits: int = struct.unpack("<i", struct.pack("<f", factor))[0]
    return bits


@dataclass(frozen=True, eq=False)
class LoRATiles:
    """A and B in the layout of AMX tiles, in bfloat16: pairs along the summed dimension are adjacent.

    ``b`` [out / 16, rank / 2, 16, 2] and behind it ``a`` [in / 2, rank, 2] are in one flat ``memory``. ``rank`` is
    even; an added rank is zeros. The last tile of B reads into A, and the last one of A into the padding behind it.
    """

    memory: torch.Tensor
    rank: int
    num_outputs: int

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor) -> LoRATiles:
        """From a [in, rank] and b [rank, out]; in is a multiple of 32, out of 16."""
        (num_inputs, rank), num_outputs = a.shape, b.shape[1]
        assert num_inputs % BF16_STEP == num_outputs % HALF_BLOCK == 0
        even = rank + rank % 2
        size = num_outputs * even + max(num_inputs * even + _LINE // _BF16_BYTES, TILE // _BF16_BYTES)
        tiles = cls(torch.zeros(size, dtype=torch.bfloat16), even, num_outputs)
        tiles._a(num_inputs)[:, :rank].copy_(a.view(num_inputs // 2, 2, rank).transpose(1, 2))
        for first in range(2):
            half = b[first::2].view(-1, num_outputs // HALF_BLOCK, HALF_BLOCK)
            tiles._b()[:, : len(half), :, first].copy_(half.transpose(0, 1))
        return tiles

    @property
    def b_address(self) -> int:
        """Address of B."""
        return self.memory.data_ptr()

    @property
    def a_address(self) -> int:
        """Address of A."""
        return self.b_address + self.memory.itemsize * self.num_outputs * self.rank

    def _a(self, num_inputs: int) -> torch.Tensor:
        first = self.num_outputs * self.rank
        return self.memory[first : first + num_inputs * self.rank].view(-1, self.rank, 2)

    def _b(self) -> torch.Tensor:
        return self.memory[: self.num_outputs * self.rank].view(-1, self.rank // 2, HALF_BLOCK, 2)
