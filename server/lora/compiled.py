"""Plain deltas of linears by a routine compiled for this CPU, which takes whatever mixture a step has as it is.

Nothing is copied side by side, and no seat has to be filled: an adapter is two addresses for each linear.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

from cpu_kernels.blocks import HALF, ROW_BLOCK, STEP, padded
from cpu_kernels.kernels import Kernels
from cpu_kernels.lora_deltas import ENTRY, HEAD, RUN
from cpu_kernels.lora_tiles import LISTED, TILE
from server.integrity import IntegrityError
from server.lora.delta import Delta
from server.lora.rows import Layout, Rows

_FEWEST = 8
_LINE = 64
_USES = 4
"""Adapters of a sequence that a head has room for from the beginning."""


class CompiledDeltas:
    """The tables of a bank's linears.

    What a routine is given are addresses that stay while ``generation`` does; what is there changes from step to step.
    """

    def __init__(self, modules: Sequence[str], rows: Rows, kernels: Kernels, *, max_seqs: int) -> None:
        self.generation = 0
        assert kernels.add_deltas is not None
        self._rows, self._add_deltas, self._launch = rows, kernels.add_deltas, kernels.launch
        self._cells = torch.zeros(len(modules), dtype=torch.long)  # the address of each linear's table
        self._cell_of = {module: self._cells.data_ptr() + 8 * number for number, module in enumerate(modules)}
        self._tables: dict[str, torch.Tensor] = {}  # int64 [capacity, ENTRY]
        self._capacity = _FEWEST
        self._indices: dict[str, int] = {}
        self._free = list(range(_FEWEST))
        self._ranks: dict[str, int] = {}
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._heads = [torch.zeros(HEAD + RUN * _USES * max_seqs, dtype=torch.long) for _ in range(2)]
        self._low = torch.empty(0, dtype=torch.uint8)
        self._most_parts = 1

    @property
    def digests(self) -> Set[str]:
        """The adapters that have a place in the tables."""
        return self._indices.keys()

    def kept(self, digest: str) -> Sequence[torch.Tensor]:
        """The tensors of an adapter whose addresses the tables have."""
        return self._kept[digest]

    def add(self, digest: str, deltas: Mapping[str, Delta]) -> None:
        """Take an adapter's plain deltas of linears. Where this fails, ``remove`` clears what there is of it."""
        if not self._free:
            self._grow()
        index = self._indices[digest] = self._free.pop()
        kept, largest = self._kept.setdefault(digest, []), 0
        for module, delta in deltas.items():
            if delta.kind != "linear":
                continue
            table = self.table(module)
            if delta.plain and delta.tiles is not None:
                tiles = delta.tiles
                kept.append(tiles.memory)
                largest = max(largest, tiles.rank)
                table[index] = torch.tensor([tiles.a_address, tiles.rank, tiles.b_address, tiles.rank])
            elif delta.plain and delta.a is not None and delta.b is not None:
                a, b = delta.a.t(), delta.b.contiguous()  # [rank, in], [rank, out]
                a = a if a.stride(1) == 1 else a.contiguous()
                kept += (a, b)
                largest = max(largest, len(a))
                table[index] = torch.tensor([a.data_ptr(), a.stride(0), b.data_ptr(), len(a)])
        self._ranks[digest] = largest

    def remove(self, digest: str) -> None:
        """Forget an adapter, also one that was half added; one that is not there is no error.

        Its place is free only when no table has an address of it, so that a failure half-way can be made good by
        removing it again.
        """
        if digest not in self._indices:
            return
        for table in self._tables.values():
            table[self._indices[digest]] = 0
        self._ranks.pop(digest, None)
        self._kept.pop(digest, None)
        self._free.append(self._indices.pop(digest))

    def begin(self) -> None:
        """Note the runs of the step at hand: of all rows, and of those that are sampled."""
        rows = self._rows
        layouts = [rows.of(count) if rows.active else Layout() for count in (rows.num_rows, rows.num_sampled)]
        noted = [self._noted(layout) for layout in layouts]
        needed = max(one.num_bytes(self._most_parts) for one in noted) + _LINE
        if self._low.nbytes < needed:
            self._low = torch.empty(2 * needed, dtype=torch.uint8)
        address = -(-self._low.data_ptr() // _LINE) * _LINE
        for place, one in enumerate(noted):
            if HEAD + len(one.numbers) > len(self._heads[place]):
                self._heads[place] = torch.zeros(2 * (HEAD + len(one.numbers)), dtype=torch.long)
                self.generation += 1
            lists = address + one.low_bytes(self._most_parts)
            head = [len(one.numbers) // RUN, address, one.rank, address, one.tile_bytes, lists, *one.numbers]
            self._heads[place][: len(head)] = torch.tensor(head)

    def add_to(self, module: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """``y += x @ a @ b`` on the rows of each adapter: x [..., rows, in], y [..., rows, out], rows in one piece."""
        self._add_deltas(x, y, self.head(x.numel() // x.shape[-1]), self._cell_of[module])

    @property
    def is_recording(self) -> bool:
        """Whether calls are recorded for replay, with other adapters too."""
        return self._launch.is_recording

    def of_product(self, modules: Sequence[tuple[str, int]]) -> ProductDeltas:
        """For the product of linears, by their names and numbers of outputs, multiples of 16, in order."""
        numbers, first = [len(modules)], 0
        for module, size in modules:
            numbers += [self._cell_of[module], first, first + size // HALF]
            first += size // HALF
        self._most_parts = max(self._most_parts, len(modules))
        return ProductDeltas(self, torch.tensor(numbers))

    def head(self, num_rows: int) -> int:
        """The address of the runs that a module which got so many rows reads; 0 where no row needs any."""
        rows = self._rows
        if not rows.active and not self.is_recording:
            return 0
        if num_rows not in (rows.num_rows, rows.num_sampled):
            raise IntegrityError(f"a module got {num_rows} of {rows.num_rows} rows")
        return self._heads[num_rows != rows.num_rows].data_ptr()

    def _noted(self, layout: Layout) -> _Noted:
        noted = _Noted()
        for run in layout.runs:
            for use in run.uses:
                index = self._indices[use.digest]
                noted.numbers += [run.start, run.end, index, _bits(use.scale), noted.num_rows, noted.num_tiles]
                noted.num_rows += run.end - run.start
                noted.num_tiles += 2 * (-(-run.end // ROW_BLOCK) - run.start // ROW_BLOCK)
                noted.rank = max(noted.rank, self._ranks[use.digest])
        return noted

    def table(self, module: str) -> torch.Tensor:
        """A linear's table; the routine reads it for every linear that is wrapped, so it must be there before."""
        if module not in self._tables:
            self._place(module, torch.zeros(self._capacity, ENTRY, dtype=torch.long))
        return self._tables[module]

    def _place(self, module: str, table: torch.Tensor) -> None:
        """Make it the linear's table. The address that is read is never that of memory which is gone."""
        before = self._tables.get(module)
        number = (self._cell_of[module] - self._cells.data_ptr()) // 8
        try:
            self._tables[module] = table
            self._cells[number] = table.data_ptr()
        except BaseException:
            if before is None:
                self._tables.pop(module, None)
            else:
                self._tables[module] = before
            raise

    def _grow(self) -> None:
        """Room for twice as many adapters."""
        capacity = 2 * self._capacity
        larger = {module: torch.zeros(capacity, ENTRY, dtype=torch.long) for module in self._tables}
        for module, table in larger.items():
            table[: self._capacity] = self._tables[module][: self._capacity]
            self._place(module, table)
        free = list(range(self._capacity, capacity))
        self._capacity, self._free = capacity, free


@dataclass
class _Noted:
    """A step's runs as routines read them, and the memory they take."""

    numbers: list[int] = field(default_factory=list)
    num_rows: int = 0
    num_tiles: int = 0
    rank: int = 0

    @property
    def tile_bytes(self) -> int:
        """Of 16 rows' x @ A of one linear."""
        return -(-self.rank // STEP) * TILE

    def low_bytes(self, parts: int) -> int:
        """Of all rows' x @ A: in float32, or in tiles of so many linears of a product."""
        return padded(max(4 * self.num_rows * self.rank, parts * self.num_tiles * self.tile_bytes), _LINE)

    def num_bytes(self, parts: int) -> int:
        """Of that and of lists of runs."""
        return self.low_bytes(parts) + 8 * parts * (1 + LISTED * (len(self.numbers) // RUN))


class ProductDeltas:
    """What a product of several linears is told of the adapters of its rows."""

    def __init__(self, deltas: CompiledDeltas, parts: torch.Tensor) -> None:
        self._deltas, self._parts = deltas, parts

    def of(self, num_rows: int) -> tuple[int, int]:
        """The addresses of runs and of the linears, both 0 where no row needs them."""
        head = self._deltas.head(num_rows)
        return (head, self._parts.data_ptr()) if head else (0, 0)


def _bits(factor: float) -> int:
    """Of a float32."""
    bits: int = struct.unpack("<i", struct.pack("<f", factor))[0]
    return bits
