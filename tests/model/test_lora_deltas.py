"""LoRA deltas of a step's rows: the C kernel on every tier of this CPU, against products in double precision."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from cpu_kernels.lora_deltas import AddDeltas
from cpu_kernels.native_kernel import Launcher
from cpu_kernels.tiers import available_tiers
from tests.guarded import guarded

TIERS = [tier for tier in available_tiers() if tier in ("generic", "avx2", "avx512vnni")]
RANKS = (1, 2, 3, 8, 17, 64, 256)
ERROR = 1e-5
"""Largest error of a delta, in units of the same sum of absolute values."""


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Adapter:
    """A [rank, inputs] and B [rank, outputs] of a linear, where the adapter changes it."""

    a: torch.Tensor
    b: torch.Tensor

    @classmethod
    def random(cls, rank: int, inputs: int, outputs: int) -> Adapter:
        generator = torch.Generator().manual_seed(rank)
        a, b = (torch.randn(rank, size, generator=generator) for size in (inputs, outputs))
        return cls(guarded(a), guarded(b))


@dataclass(frozen=True)
class Run:
    """Rows of an adapter, by its number."""

    start: int
    end: int
    adapter: int
    factor: float = 1.0


class Linear:
    """One linear's table of adapters, the second of which does not change it."""

    def __init__(self, tier: str, adapters: Sequence[Adapter]) -> None:
        self.adapters = [adapters[0], None, *adapters[1:]]
        self._add = AddDeltas(Launcher(tier))
        entries = [
            [0, 0, 0, 0] if it is None else [it.a.data_ptr(), it.a.stride(0), it.b.data_ptr(), len(it.a)]
            for it in self.adapters
        ]
        self._table = guarded(torch.tensor(entries))
        self._cell = guarded(torch.tensor([self._table.data_ptr()]))

    def add(self, x: torch.Tensor, y: torch.Tensor, runs: Sequence[Run]) -> None:
        """``y += factor * x @ A @ B`` of all runs, in their order."""
        max_rank = max((len(adapter.a) for adapter in self.adapters if adapter is not None), default=0)
        low = guarded(torch.full((sum(run.end - run.start for run in runs), max_rank), torch.nan))
        numbers = [len(runs), low.data_ptr(), max_rank, 0, 0, 0]
        rows_before = 0
        for run in runs:
            (factor,) = struct.unpack("<i", struct.pack("<f", run.factor))
            numbers += [run.start, run.end, run.adapter, factor, rows_before, 0]
            rows_before += run.end - run.start
        tasks = guarded(torch.tensor(numbers))
        self._add(x, y, tasks.data_ptr(), self._cell.data_ptr())

    def deltas(self, x: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
        """The deltas of the rows [rows, outputs]."""
        assert self.adapters[0] is not None
        y = guarded(torch.zeros(len(x), self.adapters[0].b.shape[1]))
        self.add(guarded(x), y, runs)
        return y

    def check(self, found: torch.Tensor, x: torch.Tensor, runs: Sequence[Run]) -> None:
        """The deltas are those in double precision."""
        expected = torch.zeros(found.shape, dtype=torch.float64)
        size = torch.full_like(expected, 1e-30)
        for run in runs:
            adapter, rows = self.adapters[run.adapter], slice(run.start, run.end)
            if adapter is not None:
                expected[rows] += run.factor * (x[rows].double() @ adapter.a.double().t()) @ adapter.b.double()
                low_size = x[rows].double().abs() @ adapter.a.double().abs().t()
                size[rows] += abs(run.factor) * low_size @ adapter.b.double().abs()
        assert float(((found - expected).abs() / size).max()) < ERROR


def random_rows(count: int, inputs: int) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("inputs", [1, 15, 16, 100, 896])
@pytest.mark.parametrize("outputs", [1, 63, 64, 200, 1100])
def test_every_size_is_the_product_in_double_precision(tier: str, inputs: int, outputs: int, threads: int) -> None:
    linear = Linear(tier, [Adapter.random(rank, inputs, outputs) for rank in RANKS])
    lengths = (1, 5, 2, 4, 33, 1, 7, 3)
    runs, start = [], 2
    for number, length in enumerate(lengths):
        runs.append(Run(start, start + length, number, (1.0, -0.5)[number % 2]))
        start += length
    runs += [Run(0, 1, 3), Run(0, 1, 4, 2.0), Run(0, 1, 3, -1.0)]  # a composition of adapters
    x = random_rows(start + 1, inputs)
    linear.check(linear.deltas(x, runs), x, runs)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("inputs", "outputs"), [(100, 200), (896, 1216)])
def test_a_row_is_the_same_to_the_bit_alone_in_a_batch_and_wherever_a_prompt_is_cut(
    tier: str, rank: int, inputs: int, outputs: int, threads: int
) -> None:
    linear = Linear(tier, [Adapter.random(rank, inputs, outputs), Adapter.random(5, inputs, outputs)])
    x = random_rows(75, inputs)
    whole = linear.deltas(x, [Run(0, 75, 0, 0.3)])
    alone = torch.cat([linear.deltas(row[None], [Run(0, 1, 0, 0.3)]) for row in x])
    assert torch.equal(whole, alone)
    for cut in (1, 3, 4, 31, 32, 74):
        parts = [linear.deltas(x[:cut], [Run(0, cut, 0, 0.3)]), linear.deltas(x[cut:], [Run(0, 75 - cut, 0, 0.3)])]
        assert torch.equal(whole, torch.cat(parts)), cut
    others = linear.deltas(x, [Run(0, 1, 2), Run(1, 40, 0, 0.3), Run(40, 41, 2), Run(41, 75, 0, 0.3)])
    mine = [*range(1, 40), *range(41, 75)]
    assert torch.equal(whole[mine], others[mine])


@pytest.mark.parametrize("tier", TIERS)
def test_results_are_rows_of_a_wider_tensor_and_all_else_stays(tier: str) -> None:
    linear = Linear(tier, [Adapter.random(9, 48, 70)])
    x, wide = random_rows(6, 48), torch.randn(6, 200)
    y, before = wide[:, 100:170], wide.clone()
    linear.add(x, y, [Run(1, 6, 0)])
    assert torch.equal(wide[:, :100], before[:, :100]) and torch.equal(wide[:, 170:], before[:, 170:])
    linear.check(y.double() - before[:, 100:170], x, [Run(1, 6, 0)])
    assert torch.equal(y[0], before[0, 100:170])


@pytest.mark.parametrize("tier", TIERS)
def test_no_tasks_and_adapters_that_do_not_change_the_linear_leave_the_rows(tier: str, threads: int) -> None:
    linear = Linear(tier, [Adapter.random(4, 32, 64)])
    x = random_rows(3, 32)
    assert not linear.deltas(x, []).any()
    assert not linear.deltas(x, [Run(0, 3, 1)]).any()


@pytest.mark.parametrize("rank", RANKS)
def test_tiers_with_fused_products_and_sums_give_the_same_bits(rank: int) -> None:
    """Those of x86-64; the generic tier rounds a product before it adds it."""
    x, adapter = random_rows(40, 900), Adapter.random(rank, 900, 333)
    runs = [Run(0, 1, 0), Run(1, 2, 0, 0.7), Run(2, 40, 0)]
    found = [Linear(tier, [adapter]).deltas(x, runs) for tier in TIERS if tier != "generic"]
    assert all(torch.equal(deltas, found[0]) for deltas in found)
