"""Decoding rows attend to the KV cache by a native kernel: as the formula says, to the bit alone and in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from cpu_kernels.decode_attention import DecodeAttention
from cpu_kernels.kernels import Kernels
from tests.instruction_sets import NUMBA, needs

pytestmark = needs(NUMBA)
MAX_LEN = 200
LENGTHS = (1, 2, 15, 16, 17, 33, 190)
SHAPES = [(1, 1, 16, 16), (2, 4, 64, 64), (2, 7, 64, 64), (3, 1, 80, 80), (1, 8, 128, 128), (2, 3, 80, 16)]
SHAPES += [(2, 2, 16, 128)]
"""KV heads, query heads of each, numbers of a key, numbers of a value."""


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    made: torch.dtype = request.param
    return made


def kernel_for(dtype: torch.dtype) -> DecodeAttention:
    found = Kernels(native=True).ready().decode_attention(dtype)
    assert found is not None
    return found


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Row:
    """Of a batch: where it belongs, and the first key it sees."""

    slot: int
    position: int
    first: int = 0


@dataclass(frozen=True)
class Batch:
    """Queries, keys and values of rows as modelling code gives them, [1, heads, rows, dim], and a cache."""

    rows: Sequence[Row]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float

    @classmethod
    def of(cls, rows: Sequence[Row], shape: tuple[int, int, int, int], dtype: torch.dtype) -> Batch:
        """Numbers at random; whatever no row may see is NaN."""
        kv_heads, group, dim, value_dim = shape
        joint = random(1, len(rows), kv_heads * (group * dim + dim + value_dim))
        sizes = [kv_heads * group * dim, kv_heads * dim, kv_heads * value_dim]
        dims = (dim, dim, value_dim)
        parts = zip(joint.split(sizes, -1), dims, strict=True)
        q, k, v = (part.view(1, len(rows), -1, size).transpose(1, 2) for part, size in parts)
        num_slots = max(row.slot for row in rows) + 2
        keys = random(num_slots, kv_heads + 1, MAX_LEN + 1, dim, seed=1)[:, :kv_heads, :MAX_LEN].to(dtype)
        values = random(num_slots, kv_heads + 2, MAX_LEN, value_dim, seed=2)[:, :kv_heads].to(dtype)
        seen = torch.zeros(num_slots, MAX_LEN, dtype=torch.bool)
        for row in rows:
            seen[row.slot, row.first : row.position] = True
        for kept in (keys, values):
            kept.transpose(1, 2)[~seen] = torch.nan
        return cls(rows, q, k, v, keys, values, dim**-0.5)

    def compute(self, chosen: Sequence[int] | None = None, singles: Sequence[int] | None = None) -> torch.Tensor:
        """Of some rows, as a batch of their own; the cache is written into. float32 [rows, heads, value_dim]."""
        chosen = range(len(self.rows)) if chosen is None else chosen
        rows, at = [self.rows[number] for number in chosen], torch.tensor(chosen)
        slots, positions = torch.tensor([row.slot for row in rows]), torch.tensor([row.position for row in rows])
        singles = range(len(rows)) if singles is None else singles
        attending = torch.tensor([(number, rows[number].first) for number in singles], dtype=torch.long)
        longest = max((rows[number].position + 1 - rows[number].first for number in singles), default=0)
        q, k, v = (
            whole if len(rows) == len(self.rows) else whole.transpose(1, 2)[:, at].transpose(1, 2)
            for whole in (self.q, self.k, self.v)
        )
        attend = kernel_for(self.keys.dtype)
        assert attend.can_attend(q, k, v)
        return attend(q, k, v, self.keys, self.values, slots, positions, attending, longest, self.scale)

    def exact(self) -> torch.Tensor:
        """What it should be, float64 [rows, heads, value_dim], once the cache was written into."""
        kv_heads = self.k.shape[1]
        found = []
        for number, row in enumerate(self.rows):
            seen = slice(row.first, row.position + 1)
            keys, values = (kept[row.slot, :, seen].double() for kept in (self.keys, self.values))
            query = self.q[0, :, number].double().view(kv_heads, -1, self.q.shape[-1])
            weights = (query @ keys.transpose(1, 2) * self.scale).softmax(-1)
            found.append((weights @ values).flatten(0, 1))
        return torch.stack(found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_attend_as_the_formula_says_and_alone_as_in_batches(
    shape: tuple[int, int, int, int], dtype: torch.dtype, threads: int
) -> None:
    """At all lengths, from the first key or a window on, beside NaN in whatever they may not see."""
    rows = [Row(number, length - 1) for number, length in enumerate(LENGTHS)]
    rows += [Row(len(rows) + number, 189, first) for number, first in enumerate((1, 16, 37, 174, 189))]
    batch = Batch.of(rows, shape, dtype)
    found = batch.compute()
    torch.testing.assert_close(found, batch.exact().float(), rtol=1e-5, atol=2e-6)
    for number in range(len(rows)):
        assert torch.equal(batch.compute([number])[0], found[number]), rows[number]
    some = [11, 3, 6, 0, 8]
    assert torch.equal(batch.compute(some), found[some])


def test_drafts_of_a_sequence_see_one_another_up_to_themselves(dtype: torch.dtype, threads: int) -> None:
    rows = [Row(1, 5), *(Row(0, position, 3) for position in range(28, 36)), Row(2, 0)]
    batch = Batch.of(rows, (2, 3, 64, 64), dtype)
    found = batch.compute()
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, batch.exact().float(), rtol=1e-5, atol=2e-6)
    again = Batch.of(rows, (2, 3, 64, 64), dtype)
    one_by_one = torch.cat([again.compute([number]) for number in range(len(rows))])
    assert torch.equal(one_by_one, found)


def test_rows_that_do_not_attend_are_written_all_the_same(dtype: torch.dtype, threads: int) -> None:
    """Those of a prompt's chunk, for whom torch attends afterwards."""
    rows = [Row(0, 20), *(Row(1, position) for position in range(7)), Row(2, 3)]
    batch, whole, none = (Batch.of(rows, (2, 2, 64, 80), dtype) for _ in range(3))
    found, expected = batch.compute(singles=[0, 8]), whole.compute()
    none.compute(singles=[])
    assert torch.equal(found[[0, 8]], expected[[0, 8]])
    for other in (batch, none):
        for ours, theirs in ((other.keys, whole.keys), (other.values, whole.values)):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))
    for number, row in enumerate(rows):
        assert torch.equal(batch.keys[row.slot, :, row.position], batch.k[0, :, number].to(dtype))
        assert torch.equal(batch.values[row.slot, :, row.position], batch.v[0, :, number].to(dtype))


def test_keys_and_values_are_rounded_as_torch_does(dtype: torch.dtype, threads: int) -> None:
    """All kinds of bits, denormals, ties and infinities among them, and the ends; of NaN it is NaN that counts."""
    bits = torch.randint(-(2**31), 2**31, (64 * 128,), generator=torch.Generator().manual_seed(0))
    ends = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF]
    ends += [0x7F800000, 0x7F800001, 0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF]
    for half in bits.split(64 * 64):
        half[: 2 * len(ends)] = torch.tensor([*ends, *(end - 2**31 for end in ends)])
    numbers = bits.to(torch.int32).view(torch.float32)
    rows = [Row(number, 3) for number in range(32)]
    batch = Batch.of(rows, (2, 1, 64, 64), dtype)
    batch.k.copy_(numbers[: 64 * 64].view(32, 2, 64).transpose(0, 1))
    batch.v.copy_(numbers[64 * 64 :].view(32, 2, 64).transpose(0, 1))
    batch.compute()
    for given, kept in ((batch.k, batch.keys), (batch.v, batch.values)):
        ours = kept[: len(rows), :, 3].transpose(0, 1).contiguous()
        torchs = given[0].to(dtype).contiguous()
        words = torch.int16 if dtype == torch.bfloat16 else torch.int32
        assert torch.equal(ours.isnan(), torchs.isnan()) and bool(ours.isnan().any())
        at = ~torchs.isnan()
        assert torch.equal(ours.view(words)[at], torchs.view(words)[at])
        assert bool((torchs[at].abs() < 2.0**-126).any()) and bool(torchs[at].isinf().any())


def test_a_row_of_nan_or_infinity_keeps_to_itself(dtype: torch.dtype, threads: int) -> None:
    rows = [Row(number, 17) for number in range(5)]
    shape = (2, 2, 64, 64)
    clean = Batch.of(rows, shape, dtype).compute()
    for name in ("q", "k", "v"):
        for number in (torch.nan, torch.inf):
            batch = Batch.of(rows, shape, dtype)
            getattr(batch, name)[0, :, 2] = number
            found = batch.compute()
            assert not found[2].isfinite().any(), (name, number)
            assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_scores_far_apart_leave_one_key_and_equal_ones_the_mean(dtype: torch.dtype) -> None:
    batch = Batch.of([Row(0, 19), Row(1, 19)], (1, 1, 16, 16), dtype)
    batch.q[0, :, 0], batch.q[0, :, 1] = 1e4, 0.0
    batch.keys[0, :, :19], batch.k[0, :, 0] = -1e4, -1e4
    batch.keys[0, :, 7] = 1e4
    found = batch.compute()
    assert torch.equal(found[0, 0], batch.values[0, 0, 7].float())
    torch.testing.assert_close(found[1, 0], batch.values[1, 0, :20].float().mean(0), rtol=1e-5, atol=1e-6)


def test_it_serves_heads_of_whole_vectors_in_one_piece() -> None:
    attend = kernel_for(torch.float32)
    x = random(1, 4, 3, 64)
    assert attend.can_attend(x, x, x) and attend.can_attend(x.transpose(1, 2), x, x[..., :16])
    assert not attend.can_attend(x[..., :24], x[..., :24], x) and not attend.can_attend(x, x, x[..., :24])
    assert not attend.can_attend(x.bfloat16(), x, x) and not attend.can_attend(x[..., ::2], x[..., :32], x)
    assert not attend.can_attend(x, x, x[..., ::2])
