"""Deltas inside of a product of integers: what each adapter gives by itself, and a row the same to the bit as alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpu_kernels.int8_weights import Int8Rows, Outliers
from cpu_kernels.kernels import Kernels
from server.lora.bank import LoRABank
from server.lora.delta import LoRADelta
from server.lora.native import LoRATiles, NativeLoRA
from server.lora.weights import LoRAWeights
from server.quantization.int8_modules import FusedLinear, Int8Linear, WeightDigest, linears_with_deltas
from server.sequence import Batch, LoRARequest
from tests.instruction_sets import needs
from tests.model.test_low_rank import segments

pytestmark = needs("AMX")  # without its tiles a kernel of its own adds deltas
RANKS = (1, 2, 8, 9, 16, 17, 24, 33, 64)
LENGTHS = (1, 1, 2, 3, 15, 16, 17, 33, 70)
SIZES = {(896, (896, 128, 128)): False, (32, (16,)): False, (64, (160, 160)): True, (4864, (96,)): True}
"""Inputs and outputs of the linears of a product, and whether it has outliers."""


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def in_floats(tiles: LoRATiles, num_inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a [in, rank] and b [rank, out], float32, as they were rounded."""
    a, b = tiles._a(num_inputs).float(), tiles._b().float()
    return a.transpose(1, 2).reshape(-1, tiles.rank), b.permute(1, 3, 0, 2).reshape(tiles.rank, -1)


class Stage:
    """One product's linears on a bank, beside the same product without adapters."""

    def __init__(self, num_inputs: int, sizes: Sequence[int], *, outliers: bool = False) -> None:
        self.source = torch.Generator().manual_seed(num_inputs)
        total = sum(sizes)
        integers = torch.randint(-127, 128, (total, num_inputs), dtype=torch.int8, generator=self.source)
        rows = Int8Rows(integers, torch.rand(total, generator=self.source) / 1000)
        apart = None
        if outliers:
            columns = torch.tensor([1, num_inputs // 2])
            apart = Outliers.of(columns, [torch.randn(total, num_inputs, generator=self.source)])
        kernels = Kernels(linear="AMX", native=True).ready()
        self.kernel = kernels.linear(rows, torch.randn(total, generator=self.source), apart)
        self.model = nn.Module()
        product = FusedLinear(self.kernel, sizes)
        self.names = [f"linear{number}" for number in range(len(sizes))]
        for number, (name, size) in enumerate(zip(self.names, sizes, strict=True)):
            stock = nn.Linear(num_inputs, size, bias=False)
            self.model.add_module(name, Int8Linear(stock, WeightDigest.of(stock.weight), product, number))
        self.model.register_parameter("some", nn.Parameter(torch.zeros(1)))
        products = linears_with_deltas(dict(self.model.named_modules()))
        self.bank = LoRABank(self.model, NativeLoRA(["", *self.names], products, kernels=kernels, max_seqs=4))
        self._order = torch.empty(0, dtype=torch.long)
        self.sizes, self.num_inputs, self._product = sizes, num_inputs, product
        self.deltas: dict[str, Mapping[str, LoRADelta]] = {}

    def add(self, digest: str, rank: int, modules: Sequence[str]) -> None:
        """An adapter with random numbers on these linears."""
        deltas = {}
        for name in modules:
            size = self.sizes[self.names.index(name)]
            a = torch.randn(rank, self.num_inputs, generator=self.source).t()
            b = torch.randn(rank, size, generator=self.source)
            deltas[name] = LoRADelta("linear", a, b)
        packed = self.bank.backend.pack(LoRAWeights(deltas))
        self.deltas[digest] = packed.deltas
        self.bank.add(digest, packed)

    def step(self, uses: Sequence[tuple[LoRARequest, ...]], lengths: Sequence[int], x: torch.Tensor) -> torch.Tensor:
        """The linears' results for rows x [rows, in] of sequences, side by side."""
        self.begin(uses, lengths)
        inputs = x[None, self._order]
        return self._in_order(torch.cat([self.model.get_submodule(name)(inputs)[0] for name in self.names], dim=-1))

    def begin(self, uses: Sequence[tuple[LoRARequest, ...]], lengths: Sequence[int]) -> None:
        """A step, whose rows the bank puts into another order."""
        batch = self.bank.begin_sorted(Batch(segments(uses, lengths)))
        ends = list(accumulate(lengths))
        ids = [segment.sequence.id for segment in batch.segments]
        self._order = torch.cat([torch.arange(ends[number] - lengths[number], ends[number]) for number in ids])

    def gated(self, x: torch.Tensor, *, by_gelu: bool) -> torch.Tensor:
        """The first linear's units times the second's, of the step at hand."""
        units = self._product.gated((0, 1), x[None, self._order], by_gelu=by_gelu)
        assert units is not None
        return self._in_order(units[0])

    def _in_order(self, y: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(y).index_copy_(0, self._order, y)

    def added(self, uses: tuple[LoRARequest, ...], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is to be added to rows x of one sequence, and how much was added up for it; both float64."""
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, size in zip(self.names, self.sizes, strict=True):
            total = torch.zeros(len(x), size, dtype=torch.float64)
            most = torch.zeros_like(total)
            for use in uses:
                delta = self.deltas[use.digest].get(name)
                if delta is not None and delta.tiles is not None:
                    a, b = (one.double() for one in in_floats(delta.tiles, self.num_inputs))
                    total += use.scale * (x.bfloat16().double() @ a) @ b
                    most += abs(use.scale) * (x.double().abs() @ a.abs()) @ b.abs()
            parts.append((total, most))
        return torch.cat([total for total, _ in parts], -1), torch.cat([most for _, most in parts], -1)


def mixture(stage: Stage, source: random.Random) -> tuple[list[tuple[LoRARequest, ...]], list[int]]:
    """Sequences of the base, of each adapter, and of compositions, some of them neighbours of their like."""
    uses: list[tuple[LoRARequest, ...]] = [(), ()]
    for digest in stage.deltas:
        uses += [(LoRARequest(digest, source.choice((1.0, -0.5, 3.0))),)] * source.choice((1, 1, 2))
    uses.append(tuple(LoRARequest(digest, 0.5) for digest in stage.deltas)[:3])
    source.shuffle(uses)
    return uses, [source.choice(LENGTHS) for _ in uses]


@torch.inference_mode()
@pytest.mark.parametrize(("num_inputs", "sizes"), SIZES)
def test_every_row_gets_its_own_adapters_and_is_the_same_alone(
    threads: int, num_inputs: int, sizes: tuple[int, ...]
) -> None:
    stage, source = Stage(num_inputs, sizes, outliers=SIZES[num_inputs, sizes]), random.Random(num_inputs)
    for rank in RANKS:
        stage.add(str(rank), rank, stage.names)
    stage.add("last", 4, stage.names[-1:])
    uses, lengths = mixture(stage, source)
    x = torch.randn(sum(lengths), num_inputs, generator=stage.source)
    found, base, row = stage.step(uses, lengths, x), stage.kernel(x), 0
    for mine, length in zip(uses, lengths, strict=True):
        here = slice(row, row + length)
        if not mine:
            assert torch.equal(found[here], base[here])
        expected, most = stage.added(mine, x[here])
        error = (found[here].double() - base[here].double() - expected).abs()
        assert bool((error <= most * 2**-9 + base[here].abs().double() * 1e-6).all())  # x @ a is rounded as well
        for count in (1, 2, 5, 32, 40):
            if count <= length:
                assert torch.equal(stage.step([mine], [count], x[row : row + count]), found[row : row + count])
        row += length


@torch.inference_mode()
@pytest.mark.parametrize("by_gelu", [False, True], ids=["silu", "gelu"])
@pytest.mark.parametrize("outliers", [False, True], ids=["", "outliers"])
def test_gated_units_are_made_of_changed_gates_and_ups(threads: int, by_gelu: bool, outliers: bool) -> None:
    stage = Stage(64, (160, 160), outliers=outliers)
    stage.add("a", 8, stage.names)
    stage.add("b", 20, stage.names[1:])
    uses = [(LoRARequest("a"),), (), (LoRARequest("b", 2.0),), (LoRARequest("a"), LoRARequest("b")), ()]
    for lengths in ((1, 1, 1, 1, 1), (2, 3, 9, 1, 4), (70, 3, 40, 1, 100)):
        x = torch.randn(sum(lengths), 64, generator=stage.source)
        gates, ups = stage.step(uses, lengths, x).split(160, -1)
        units = stage.gated(x, by_gelu=by_gelu)
        expected = (F.gelu(gates, approximate="tanh") if by_gelu else F.silu(gates)) * ups
        assert torch.allclose(units, expected, rtol=1e-4, atol=1e-4)
        row = 0
        for mine, length in zip(uses, lengths, strict=True):
            stage.begin([mine], [length])
            assert torch.equal(stage.gated(x[row : row + length], by_gelu=by_gelu), units[row : row + length])
            row += length


@torch.inference_mode()
def test_adapters_that_come_and_go(threads: int) -> None:
    """Tables grow and places are used again; with the last adapter the product is the base's."""
    stage = Stage(64, (96, 32))
    x = torch.randn(6, 64, generator=stage.source)
    for number in range(20):
        stage.add(str(number), 1 + number, stage.names[number % 2 :])
        if number % 3 == 2:
            stage.bank.remove(str(number - 1))
            del stage.deltas[str(number - 1)]
        uses = [(LoRARequest(digest),) for digest in list(stage.deltas)[-3:]]
        found = stage.step(uses, [2] * len(uses), x[: 2 * len(uses)])
        for place, mine in enumerate(uses):
            here = slice(2 * place, 2 * place + 2)
            expected, most = stage.added(mine, x[here])
            assert bool(((found[here].double() - stage.kernel(x)[here].double() - expected).abs() <= most / 500).all())
    for digest in list(stage.deltas):
        stage.bank.remove(digest)
    assert torch.equal(stage.step([()], [6], x), stage.kernel(x))
    assert all(product.deltas is None for product, _ in linears_with_deltas(dict(stage.model.named_modules())))


def test_what_is_packed_is_what_was_given_rounded() -> None:
    source = torch.Generator().manual_seed(0)
    for rank in RANKS:
        a, b = torch.randn(rank, 64, generator=source).t(), torch.randn(rank, 48, generator=source)
        tiles = LoRATiles.of(a, b)
        found_a, found_b = in_floats(tiles, 64)
        assert torch.equal(found_a[:, :rank], a.bfloat16().float()) and not found_a[:, rank:].any()
        assert torch.equal(found_b[:rank], b.bfloat16().float()) and not found_b[rank:].any()
        assert tiles.memory.nbytes <= 2 * (64 + 48) * (rank + 1) + 1024


def test_sizes_that_are_no_whole_tiles_are_left_to_the_other_kernel() -> None:
    for num_inputs, sizes in ((40, (32,)), (64, (40,)), (64, (32, 8))):
        stage = Stage(num_inputs, sizes)
        stage.add("it", 2, stage.names)
        assert all(delta.tiles is None for delta in stage.deltas["it"].values())
