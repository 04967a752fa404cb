"""Low-rank deltas by native kernels: an adapter is two addresses for each linear, whatever mixture a step has."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch

from cpu_kernels.blocks import BF16_STEP, HALF_BLOCK, PANEL_ROWS, padded
from cpu_kernels.kernels import Kernels
from cpu_kernels.linear import Deltas
from cpu_kernels.lora_deltas import ADAPTER_ENTRY_SIZE, TASK_HEADER_SIZE, TASK_SIZE
from cpu_kernels.lora_tiles import LISTED_TASK_SIZE, TILE
from server.integrity import IntegrityError, ensure
from server.lora.backend import AdapterRun, BatchAdapters
from server.lora.delta import LoRADelta
from server.lora.weights import LoRAWeights
from server.sequence import Batch

_MIN_ADAPTERS = 8
"""Adapters that tables have room for from the beginning."""
_ADAPTERS_OF_SEQUENCE = 4
_LINE, _BF16_BYTES = 64, 2

Outputs = Sequence[tuple[str, int]]
"""Linears that are computed by one product: name, and number of outputs, a multiple of 16."""


class AddsDeltas(Protocol):
    """A product of several linears that adds ``deltas`` itself, if they are set."""

    deltas: Deltas | None


class NativeLoRA:
    """One kernel call for a linear, or none where the linear's product adds the deltas itself.

    ``modules`` may be wrapped; ``products`` add the deltas of their linears. Each linear has a table with a row for
    every adapter, and a step has task tables: which rows use which adapters. Their addresses stay while ``generation``
    does; what is there changes from step to step.
    """

    makes_copies: ClassVar[bool] = False

    def __init__(
        self,
        modules: Sequence[str],
        products: Sequence[tuple[AddsDeltas, Outputs]] = (),
        *,
        kernels: Kernels,
        max_seqs: int,
    ) -> None:
        assert kernels.add_deltas is not None
        self.batch = BatchAdapters()
        self.generation = 0
        self._add_deltas, self._launch = kernels.add_deltas, kernels.launch
        self._product_of = {name: (product, outputs) for product, outputs in products for name, _ in outputs}
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
        self._task_tables = [torch.zeros(size, dtype=torch.long) for _ in range(2)]  # of all rows, of those sampled
        self._low = torch.empty(0, dtype=torch.uint8)
        self._max_linears = max((len(outputs) for _, outputs in products), default=1)

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
        """In tiles where a product adds the deltas."""
        deltas = dict(weights.deltas)
        for module in deltas.keys() & self._product_of.keys():
            deltas[module] = _in_tiles(deltas[module])
        return replace(weights, deltas=deltas)

    def attach(self, module: str) -> bool:
        if module not in self._tables:
            self._set_table(module, torch.zeros(self._capacity, ADAPTER_ENTRY_SIZE, dtype=torch.long))
        if module not in self._product_of:
            return True
        product, outputs = self._product_of[module]
        if product.deltas is None:
            product.deltas = self._deltas_of(outputs)
        return False

    def detach(self, module: str) -> None:
        if module in self._product_of:
            product, outputs = self._product_of[module]
            if self._tables.keys().isdisjoint(name for name, _ in outputs if name != module):
                product.deltas = None
        if module in self._tables:
            self._cells[self._cell_of[module]] = 0
            del self._tables[module]

    def add(self, digest: str, weights: LoRAWeights) -> Iterable[torch.Tensor]:
        if not self._free:
            self._grow()
        index = self._indices[digest] = self._free.pop()
        kept, max_rank = self._kept.setdefault(digest, []), 0
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
        """Its place is free only when no table has an address of it, so that a second call finishes a failed one."""
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

    def begin(self, batch: Batch) -> Batch:
        """Rows of the base first, then those of each adapter."""
        ordered = replace(batch, segments=tuple(sorted(batch.segments, key=lambda one: one.sequence.adapters)))
        self.batch.begin(ordered.segments)
        counts = dict.fromkeys((self.batch.num_rows, self.batch.num_sampled))  # where all are sampled: one table
        tables = [LoRATaskTable(self.batch.runs(count), self._indices, self._ranks) for count in counts]
        num_bytes = _LINE + max(table.num_bytes(self._max_linears) for table in tables)
        if self._low.nbytes < num_bytes:
            self._low = torch.empty(2 * num_bytes, dtype=torch.uint8)
        address = padded(self._low.data_ptr(), _LINE)
        for place, table in enumerate(tables):
            numbers = table.numbers(address, self._max_linears)
            if len(numbers) > len(self._task_tables[place]):
                self._task_tables[place] = torch.zeros(2 * len(numbers), dtype=torch.long)
                self.generation += 1
            self._task_tables[place][: len(numbers)] = torch.tensor(numbers)
        return ordered

    def apply(self, module: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """y's rows may be apart, the numbers of a row may not."""
        self._add_deltas(x, y, self.task_table(x.numel() // x.shape[-1]), self._cell(module))

    def task_table(self, num_rows: int) -> int:
        """The address of the tasks of a module that got so many rows; 0 where no row has any."""
        if not self.active:
            return 0
        if num_rows not in (self.batch.num_rows, self.batch.num_sampled):
            raise IntegrityError(f"a module got {num_rows} of {self.batch.num_rows} rows")
        return self._task_tables[num_rows != self.batch.num_rows].data_ptr()

    def check_integrity(self, digests: Iterable[str], modules: Iterable[str]) -> None:
        ensure(self._indices.keys() == set(digests), "tables have other adapters than there are")
        ensure(self._tables.keys() == set(modules), "tables are read for other linears than are wrapped")

    def _deltas_of(self, outputs: Outputs) -> ProductDeltas:
        numbers, first = [len(outputs)], 0
        for module, size in outputs:
            numbers += [self._cell(module), first, first + size // HALF_BLOCK]
            first += size // HALF_BLOCK
        return ProductDeltas(self, torch.tensor(numbers))

    def _cell(self, module: str) -> int:
        return self._cells.data_ptr() + 8 * self._cell_of[module]

    def _set_table(self, module: str, table: torch.Tensor) -> None:
        """Make it the linear's table. The address that is read is never that of memory which is gone."""
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
        """Room for twice as many adapters."""
        capacity = 2 * self._capacity
        larger = {module: torch.zeros(capacity, ADAPTER_ENTRY_SIZE, dtype=torch.long) for module in self._tables}
        for module, table in larger.items():
            table[: self._capacity] = self._tables[module][: self._capacity]
            self._set_table(module, table)
        free = list(range(self._capacity, capacity))
        self._capacity, self._free = capacity, free


class ProductDeltas:
    """What a product of several linears is told of the adapters of its rows."""

    def __init__(self, backend: NativeLoRA, linears: torch.Tensor) -> None:
        self._backend, self._linears = backend, linears

    def of(self, num_rows: int) -> tuple[int, int]:
        """The addresses of tasks and of the linears, both 0 where no row needs them."""
        tasks = self._backend.task_table(num_rows)
        return (tasks, self._linears.data_ptr()) if tasks else (0, 0)


class LoRATaskTable:
    """A step's runs as kernels read them, and the memory that they take."""

    def __init__(self, runs: Sequence[AdapterRun], indices: Mapping[str, int], ranks: Mapping[str, int]) -> None:
        self._numbers: list[int] = []
        self._num_rows = self._num_tiles = self._max_rank = 0
        for run in runs:
            num_tiles = 2 * (-(-run.end // PANEL_ROWS) - run.start // PANEL_ROWS)
            for use in run.adapters:
                place = (self._num_rows, self._num_tiles)
                self._numbers += [run.start, run.end, indices[use.digest], _float_bits(use.scale), *place]
                self._num_rows += run.end - run.start
                self._num_tiles += num_tiles
                self._max_rank = max(self._max_rank, ranks[use.digest])

    @property
    def _tile_bytes(self) -> int:
        """Of 16 rows' x @ A of one linear."""
        return -(-self._max_rank // BF16_STEP) * TILE

    def _low_bytes(self, num_linears: int) -> int:
        """Of all rows' x @ A: in float32, or in tiles of so many linears of a product."""
        return padded(max(4 * self._num_rows * self._max_rank, num_linears * self._num_tiles * self._tile_bytes), _LINE)

    def num_bytes(self, num_linears: int) -> int:
        """Of that and of lists of tasks."""
        num_tasks = len(self._numbers) // TASK_SIZE
        return self._low_bytes(num_linears) + 8 * num_linears * (1 + LISTED_TASK_SIZE * num_tasks)

    def numbers(self, address: int, num_linears: int) -> list[int]:
        """Head and tasks; at ``address`` are ``num_bytes`` to work in."""
        lists = address + self._low_bytes(num_linears)
        head = [len(self._numbers) // TASK_SIZE, address, self._max_rank, address, self._tile_bytes, lists]
        return head + self._numbers


def _in_tiles(delta: LoRADelta) -> LoRADelta:
    """One that is not plain, or in tiles already, stays as it is."""
    if not delta.plain or delta.a is None or delta.b is None:
        return delta
    return replace(delta, a=None, b=None, tiles=LoRATiles.of(delta.a, delta.b))


def _entry(delta: LoRADelta) -> tuple[list[torch.Tensor], list[int]]:
    """A plain delta's tensors, and what tables have of it, the rank last."""
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
    """A and B as tiles of AMX read them, in bfloat16: pairs of what is summed over side by side.

    ``b`` [out / 16, rank / 2, 16, 2] and behind it ``a`` [in / 2, rank, 2] are in one flat ``memory``. ``rank`` is
    that in memory, an even number; a rank that the adapter has not is zeros. Whole tiles reach from B into A, and from
    A into a line more.
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
        """Where B begins."""
        return self.memory.data_ptr()

    @property
    def a_address(self) -> int:
        """Where A begins."""
        return self.b_address + self.memory.itemsize * self.num_outputs * self.rank

    def _a(self, num_inputs: int) -> torch.Tensor:
        first = self.num_outputs * self.rank
        return self.memory[first : first + num_inputs * self.rank].view(-1, self.rank, 2)

    def _b(self) -> torch.Tensor:
        return self.memory[: self.num_outputs * self.rank].view(-1, self.rank // 2, HALF_BLOCK, 2)
