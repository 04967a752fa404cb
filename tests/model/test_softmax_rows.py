"""Softmax weights and their sums by block in C, on every tier of this CPU, and the tokens that are drawn by them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from cpu_kernels.native_kernel import Launcher
from cpu_kernels.softmax import BLOCK, SoftmaxRows
from cpu_kernels.tiers import available_tiers
from server.model.categorical import StoredWeights, block_sums
from server.model.drawing import draw_tokens
from server.sequence import SampleRow, Sequence
from tests.guarded import guarded
from tests.model.test_sampler import LARGE_VOCAB, SETTINGS, rows

TIERS = [tier for tier in available_tiers() if tier in ("generic", "avx2", "avx512vnni")]
WIDTHS = (1, 7, 16, 255, 256, 300, 5003)
TEMPERATURES = (1.0, 0.3, 2.0)
every_tier = pytest.mark.parametrize("tier", TIERS)


@pytest.fixture(params=[1, 2, 3], ids=["one_thread", "two_threads", "three_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def softmax_rows(tier: str, logits: torch.Tensor, temperatures: tuple[float, ...] = TEMPERATURES) -> SoftmaxRows:
    return SoftmaxRows(Launcher(tier), guarded(logits), logits.amax(-1), temperatures)


def reference(logits: torch.Tensor) -> StoredWeights:
    """The same in double precision by torch."""
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / torch.tensor(TEMPERATURES)[:, None]
    return StoredWeights(scaled.exp())


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To a unit in the last place of the exponent, which is up to 126."""
    torch.testing.assert_close(found.double(), expected, rtol=1.5e-5, atol=1e-37)


@every_tier
@pytest.mark.parametrize("width", WIDTHS)
def test_weights_and_sums_are_those_in_double_precision(tier: str, width: int, threads: int) -> None:
    logits = rows(len(TEMPERATURES), vocab=width)
    weights, expected = softmax_rows(tier, logits), reference(logits)
    for _ in range(2):  # with the largest weights of the blocks known, and before
        assert_near(weights.block_sums(), expected.block_sums())
    assert_near(weights.largest(), expected.largest())
    num_blocks = weights.block_sums().shape[1]
    for block in range(num_blocks):
        blocks = torch.tensor([block, num_blocks - 1, 0])
        assert_near(weights.block_weights(blocks), expected.block_weights(blocks))
    for row in range(len(logits)):
        assert_near(weights.row_weights(row), expected.row_weights(row))
        assert weights.row_weights(row).max() == 1.0


@every_tier
def test_sums_above_a_floor_leave_out_weights_that_are_not_greater(tier: str, threads: int) -> None:
    weights = softmax_rows(tier, rows(3, vocab=5003))
    weights.block_sums()
    stored = torch.stack([weights.row_weights(row) for row in range(3)])
    floor = float(stored[2, 700])
    for num_blocks in (1, 5, 20):
        found = weights.block_sums_above([2, 0], [floor, 0.25], num_blocks)
        part = stored[[2, 0], : num_blocks * BLOCK]
        kept = torch.where(part > torch.tensor([[floor], [0.25]]), part, 0.0)
        torch.testing.assert_close(found, block_sums(kept).double(), rtol=1e-6, atol=0.0)
    weights.set_floors([0.0, 0.125, floor])
    kept = torch.where(stored > torch.tensor([[0.0], [0.125], [floor]]), stored, 0.0)
    torch.testing.assert_close(weights.block_sums(), block_sums(kept).double(), rtol=1e-6, atol=0.0)
    assert torch.equal(weights.row_weights(2), kept[2])
    assert torch.equal(weights.block_weights(torch.tensor([0, 1, 2]))[2], kept[2, 2 * BLOCK : 3 * BLOCK])
    above = weights.block_sums_above([1], [0.0625], 20)
    assert torch.equal(above, weights.block_sums()[1:2]), "the higher floor of both counts"


@every_tier
def test_minus_infinity_has_no_weight_and_small_weights_are_none(tier: str) -> None:
    logits = torch.full((1, 600), -math.inf)
    logits[0, [3, 300, 599]] = torch.tensor([50.0, -50.0, 49.0])
    weights = softmax_rows(tier, logits, (1.0,))
    row = weights.row_weights(0)
    assert row.nonzero()[:, 0].tolist() == [3, 599]
    assert weights.block_sums()[0].tolist() == [1.0, 0.0, float(row[599])]


@every_tier
def test_a_row_is_the_same_to_the_bit_beside_any_others_with_any_number_of_threads(tier: str, threads: int) -> None:
    logits, count = rows(8, vocab=5003), 8
    temperatures = tuple(0.5 + number / 4 for number in range(count))
    alone = [softmax_rows(tier, logits[n : n + 1], temperatures[n : n + 1]) for n in range(count)]
    order = random.Random(threads).sample(range(count), count)
    together = softmax_rows(tier, logits[order], tuple(temperatures[n] for n in order))
    for _ in range(2):
        assert torch.equal(together.block_sums(), torch.cat([alone[n].block_sums() for n in order]))
    for place, number in enumerate(order):
        assert torch.equal(together.row_weights(place), alone[number].row_weights(0))


def test_tiers_with_fused_products_and_sums_give_the_same_bits() -> None:
    """Those of x86-64; the generic tier rounds a product before it adds it."""
    logits = rows(3, vocab=5003)
    found = [softmax_rows(tier, logits).block_sums() for tier in TIERS if tier != "generic"]
    assert all(torch.equal(sums, found[0]) for sums in found)


@every_tier
@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_the_tokens_are_those_that_torchs_softmax_gives_with_the_same_seeds(tier: str, spread: float) -> None:
    """But for one in a hundred, where two candidates are as near as rounding."""
    num_tokens, num_others = 0, 0
    launch = Launcher(tier)
    for number, params in enumerate(SETTINGS):
        logits = rows(8, vocab=LARGE_VOCAB, seed=number) * spread
        draws = [SampleRow(Sequence(row, (1,), 9, replace(params, seed=row)), number) for row in range(len(logits))]
        largest = logits.amax(-1)
        found = draw_tokens(logits, largest, draws, partial(SoftmaxRows, launch))
        expected = draw_tokens(logits, largest, draws)
        num_tokens += len(found)
        num_others += sum(token != other for token, other in zip(found, expected, strict=True))
    assert num_others <= num_tokens // 100
