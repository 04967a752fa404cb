"""Rows attend to the KV cache by a kernel in C: as the formula says, and with the same bits alone, in batches, however
their prompt is cut, and behind keys that decoding wrote. On every tier of this CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from cpu_kernels.attention import Attention
from cpu_kernels.native_kernel import Launcher
from cpu_kernels.tiers import available_tiers
from tests.guarded import guarded

MAX_LEN = 200
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 65, 190)
SHAPES = [(1, 1, 16, 16), (2, 4, 64, 64), (2, 7, 64, 64), (3, 1, 80, 80), (1, 8, 128, 128), (2, 3, 80, 16)]
SHAPES += [(2, 2, 16, 128), (2, 3, 24, 40), (1, 2, 7, 5)]
"""KV heads, query heads of each, numbers of a key, numbers of a value."""
VECTOR_TIERS = [tier for tier in available_tiers() if tier in ("generic", "avx2", "avx512vnni")]


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


@pytest.fixture(params=VECTOR_TIERS)
def attend(request: pytest.FixtureRequest) -> Attention:
    return Attention(Launcher(request.param))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Row:
    """Of a batch: where it belongs."""

    slot: int
    position: int


@dataclass(frozen=True)
class Rules:
    """What a row sees, and what becomes of its scores."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Queries, keys and values of rows as modelling code gives them, [1, heads, rows, dim], and a cache."""

    rows: Sequence[Row]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rules: Rules

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        *,
        window: int | None = None,
        max_len: int = MAX_LEN,
    ) -> Batch:
        """Numbers at random; whatever no row may see is NaN."""
        kv_heads, group, dim, value_dim = shape
        joint = random(1, len(rows), kv_heads * (group * dim + dim + value_dim))
        sizes = [kv_heads * group * dim, kv_heads * dim, kv_heads * value_dim]
        dims = (dim, dim, value_dim)
        parts = zip(joint.split(sizes, -1), dims, strict=True)
        q, k, v = (part.view(1, len(rows), -1, size).transpose(1, 2) for part, size in parts)
        num_slots = max(row.slot for row in rows) + 2
        keys = random(num_slots, kv_heads + 1, max_len + 1, dim, seed=1)[:, :kv_heads, :max_len].to(dtype)
        values = random(num_slots, kv_heads + 2, max_len, value_dim, seed=2)[:, :kv_heads].to(dtype)
        rules = Rules(dim**-0.5, window)
        seen = torch.zeros(num_slots, max_len, dtype=torch.bool)
        for row in rows:
            seen[row.slot, first_key(row, rules) : row.position] = True
        for kept in (keys, values):
            kept.transpose(1, 2)[~seen] = torch.nan
        return cls(rows, q, k, v, keys, values, rules)

    def compute(
        self, attend: Attention, chosen: Sequence[int] | None = None, spans: Sequence[tuple[int, int]] | None = None
    ) -> torch.Tensor:
        """Of some rows, as a batch of their own; the cache is written into. float32 [rows, heads, value_dim]."""
        chosen = range(len(self.rows)) if chosen is None else chosen
        rows, at = [self.rows[number] for number in chosen], torch.tensor(chosen)
        slots, positions = torch.tensor([row.slot for row in rows]), torch.tensor([row.position for row in rows])
        attending = torch.tensor([(0, len(rows))] if spans is None else spans, dtype=torch.long).view(-1, 2)
        q, k, v = (
            whole if len(rows) == len(self.rows) else whole.transpose(1, 2)[:, at].transpose(1, 2)
            for whole in (self.q, self.k, self.v)
        )
        rules = self.rules
        return attend(
            q, k, v, self.keys, self.values, slots, positions, attending,
            scale=rules.scale, window=rules.window, softcap=rules.softcap, sinks=rules.sinks,
        )  # fmt: skip

    def exact(self) -> torch.Tensor:
        """What it should be, float64 [rows, heads, value_dim], once the cache was written into."""
        kv_heads, rules = self.k.shape[1], self.rules
        found = []
        for number, row in enumerate(self.rows):
            seen = slice(first_key(row, rules), row.position + 1)
            keys, values = (kept[row.slot, :, seen].double() for kept in (self.keys, self.values))
            query = self.q[0, :, number].double().view(kv_heads, -1, self.q.shape[-1])
            scores = query @ keys.transpose(1, 2) * rules.scale
            if rules.softcap is not None:
                scores = torch.tanh(scores / rules.softcap) * rules.softcap
            if rules.sinks is not None:
                scores = torch.cat([scores, rules.sinks.double().view(kv_heads, -1, 1)], -1)
            weights = scores.softmax(-1)[..., : keys.shape[1]]
            found.append((weights @ values).flatten(0, 1))
        return torch.stack(found)


def first_key(row: Row, rules: Rules) -> int:
    return 0 if rules.window is None else max(0, row.position - rules.window + 1)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 1, 17, 154])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_attend_as_the_formula_says_and_alone_as_in_batches(
    attend: Attention, shape: tuple[int, int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    """At all lengths, from the first key or a window on, beside NaN in whatever they may not see."""
    rows = [Row(number, length - 1) for number, length in enumerate(LENGTHS)]
    batch = Batch.of(rows, shape, dtype, window=window)
    found = batch.compute(attend)
    assert_close(found, batch.exact())
    for number in range(len(rows)):
        assert torch.equal(batch.compute(attend, [number])[0], found[number]), rows[number]
    some = [7, 3, 6, 0, 8]
    assert torch.equal(batch.compute(attend, some), found[some])


@pytest.mark.parametrize("shape", [(2, 7, 64, 64), (3, 1, 24, 40)], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_soft_caps_and_sinks_are_as_the_formula_says(
    attend: Attention, shape: tuple[int, int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    rows = [*(Row(0, position) for position in range(100)), *(Row(number, 150) for number in range(1, 4))]
    batch = Batch.of(rows, shape, dtype, window=window)
    batch.q.mul_(3.0)
    sinks = torch.linspace(-4.0, 4.0, shape[0] * shape[1])
    for rules in (
        replace(batch.rules, softcap=2.0),
        replace(batch.rules, sinks=sinks),
        replace(batch.rules, softcap=30.0, sinks=sinks),
    ):
        ruled = replace(batch, rules=rules)
        found = ruled.compute(attend)
        torch.testing.assert_close(found, ruled.exact().float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(ruled.compute(attend, [70, 102]), found[[70, 102]])


def test_drafts_of_a_sequence_see_one_another_up_to_themselves(
    attend: Attention, dtype: torch.dtype, threads: int
) -> None:
    rows = [Row(1, 5), *(Row(0, position) for position in range(28, 36)), Row(2, 0)]
    batch = Batch.of(rows, (2, 3, 64, 64), dtype)
    found = batch.compute(attend)
    assert bool(found.isfinite().all())
    assert_close(found, batch.exact())
    again = Batch.of(rows, (2, 3, 64, 64), dtype)
    one_by_one = torch.cat([again.compute(attend, [number]) for number in range(len(rows))])
    assert torch.equal(one_by_one, found)


@pytest.mark.parametrize("window", [None, 50, 64])
def test_a_row_has_the_same_bits_wherever_its_prompt_is_cut(
    attend: Attention, window: int | None, dtype: torch.dtype, threads: int
) -> None:
    """Pieces of all lengths, beside rows of others, and one token at a time, as decoding writes them."""
    length = 140
    rows = [*(Row(0, position) for position in range(length)), Row(1, 170)]
    batch = Batch.of(rows, (2, 3, 32, 32), dtype, window=window)
    whole = batch.compute(attend)
    assert_close(whole, batch.exact())
    for cut in range(1, length):
        again = batch.compute(attend, [*range(cut, length), length] if cut % 2 else range(cut, length))
        assert torch.equal(again[: length - cut], whole[cut:length]), cut
    decoded = Batch.of(rows, (2, 3, 32, 32), dtype, window=window)
    for row in range(length):
        assert torch.equal(decoded.compute(attend, [row])[0], whole[row]), row


@pytest.mark.parametrize("window", [None, 700])
def test_so_it_has_in_a_sequence_whose_sums_have_several_parts(
    attend: Attention, window: int | None, dtype: torch.dtype, threads: int
) -> None:
    """A part has 512 keys; two threads compute the parts of a single row, and merge them."""
    length = 1600
    rows = [Row(0, position) for position in range(length)]
    batch = Batch.of(rows, (1, 2, 16, 16), dtype, window=window, max_len=2000)
    whole = batch.compute(attend)
    assert_close(whole, batch.exact())
    for cuts in ((0, 1, 511, 512, 513, length), (0, 900, 1023, 1025, length)):
        for begin, end in pairwise(cuts):
            assert torch.equal(batch.compute(attend, range(begin, end)), whole[begin:end]), (begin, end)
    for row in (511, 512, 1023, 1024, 1500, 1599):
        assert torch.equal(batch.compute(attend, [row])[0], whole[row]), row


def test_with_fma_all_tiers_have_the_same_bits_and_without_it_nearly_so(dtype: torch.dtype) -> None:
    rows = [*(Row(0, position) for position in range(100, 190)), Row(1, 77)]
    found = {tier: Batch.of(rows, (2, 7, 64, 64), dtype).compute(Attention(Launcher(tier))) for tier in VECTOR_TIERS}
    *others, generic = found.values()
    for first, second in pairwise(others):
        assert torch.equal(first, second)
    for each in others:
        assert_close(each, generic)


def test_nothing_is_read_or_written_behind_the_end_of_a_buffer(attend: Attention, dtype: torch.dtype) -> None:
    class Guarded(Launcher):
        def workspace(self, name: str, num_bytes: int, *, reuse: bool) -> torch.Tensor:
            kept.append(guarded(torch.zeros(num_bytes, dtype=torch.uint8)))
            return kept[-1]

    kept: list[torch.Tensor] = []
    within = Attention(Guarded(attend._launch._tier))
    for shape in SHAPES:
        for length in (1, 17, 64, 79, 600):
            rows = [Row(0, position) for position in range(length - min(length, 20), length)]
            batch = Batch.of(rows, shape, dtype, max_len=length)
            tensors = (batch.q, batch.k, batch.v, batch.keys[:1], batch.values[:1])
            q, k, v, keys, values = (guarded(tensor.contiguous()) for tensor in tensors)
            tight = replace(batch, q=q, k=k, v=v, keys=keys, values=values)
            assert torch.equal(tight.compute(within), batch.compute(attend))
            assert torch.equal(tight.compute(within, [len(rows) - 1]), batch.compute(attend, [len(rows) - 1]))


def test_rows_that_do_not_attend_are_written_all_the_same(attend: Attention, dtype: torch.dtype, threads: int) -> None:
    """Those of a prompt's chunk, for whom another kernel attends afterwards."""
    rows = [Row(0, 20), *(Row(1, position) for position in range(7)), Row(2, 3)]
    batch, whole, none = (Batch.of(rows, (2, 2, 64, 80), dtype) for _ in range(3))
    found, expected = batch.compute(attend, spans=[(0, 1), (8, 9)]), whole.compute(attend)
    none.compute(attend, spans=[])
    assert torch.equal(found[[0, 8]], expected[[0, 8]])
    for other in (batch, none):
        for ours, theirs in ((other.keys, whole.keys), (other.values, whole.values)):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))
    for number, row in enumerate(rows):
        assert torch.equal(batch.keys[row.slot, :, row.position], batch.k[0, :, number].to(dtype))
        assert torch.equal(batch.values[row.slot, :, row.position], batch.v[0, :, number].to(dtype))


def test_keys_and_values_are_rounded_as_torch_does(attend: Attention, dtype: torch.dtype, threads: int) -> None:
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
    batch.compute(attend)
    for given, kept in ((batch.k, batch.keys), (batch.v, batch.values)):
        ours = kept[: len(rows), :, 3].transpose(0, 1).contiguous()
        torchs = given[0].to(dtype).contiguous()
        words = torch.int16 if dtype == torch.bfloat16 else torch.int32
        assert torch.equal(ours.isnan(), torchs.isnan()) and bool(ours.isnan().any())
        at = ~torchs.isnan()
        assert torch.equal(ours.view(words)[at], torchs.view(words)[at])
        assert bool((torchs[at].abs() < 2.0**-126).any()) and bool(torchs[at].isinf().any())


def test_a_row_of_nan_or_infinity_keeps_to_itself(attend: Attention, dtype: torch.dtype, threads: int) -> None:
    rows = [Row(number, 17) for number in range(5)]
    shape = (2, 2, 64, 64)
    clean = Batch.of(rows, shape, dtype).compute(attend)
    for name in ("q", "k", "v"):
        for number in (torch.nan, torch.inf):
            batch = Batch.of(rows, shape, dtype)
            getattr(batch, name)[0, :, 2] = number
            found = batch.compute(attend)
            assert not found[2].isfinite().any(), (name, number)
            assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_within_a_prompt_it_spoils_no_row_before_it(attend: Attention, name: str, dtype: torch.dtype) -> None:
    rows = [Row(0, position) for position in range(70)]
    clean = Batch.of(rows, (2, 2, 64, 64), dtype).compute(attend)
    for number in (torch.nan, torch.inf):
        batch = Batch.of(rows, (2, 2, 64, 64), dtype)
        getattr(batch, name)[0, :, 33] = number
        found = batch.compute(attend)
        assert not found[33].isfinite().any()
        assert torch.equal(found[:33], clean[:33]) and (name != "q" or torch.equal(found[34:], clean[34:]))


def test_scores_far_apart_leave_one_key_and_equal_ones_the_mean(attend: Attention, dtype: torch.dtype) -> None:
    batch = Batch.of([Row(0, 19), Row(1, 19)], (1, 1, 16, 16), dtype)
    batch.q[0, :, 0], batch.q[0, :, 1] = 1e4, 0.0
    batch.keys[0, :, :19], batch.k[0, :, 0] = -1e4, -1e4
    batch.keys[0, :, 7] = 1e4
    found = batch.compute(attend)
    assert torch.equal(found[0, 0], batch.values[0, 0, 7].float())
    torch.testing.assert_close(found[1, 0], batch.values[1, 0, :20].float().mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("growth", [-300.0, -1.0, 1.0, 300.0])
def test_scores_that_grow_or_fall_from_block_to_block_keep_their_weights(attend: Attention, growth: float) -> None:
    """By much more than float32's exponents reach, and slowly, so that every key counts."""
    batch = Batch.of([Row(0, position) for position in range(1100)], (1, 2, 32, 32), torch.float32, max_len=1100)
    batch.q.fill_(1.0)
    batch.k.copy_((growth / 32 * torch.arange(1100) / 96)[None, None, :, None].expand(batch.k.shape))
    found = batch.compute(attend)
    expected = batch.exact()
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_queries_keys_and_values_may_lie_anyhow_and_have_any_format(attend: Attention) -> None:
    batch = Batch.of([Row(0, position) for position in range(20)], (2, 3, 32, 32), torch.bfloat16)
    batch = replace(batch, q=batch.q.bfloat16(), k=batch.k.bfloat16(), v=batch.v.bfloat16())
    found = batch.compute(attend)
    assert_close(found, batch.exact())
    turned = replace(batch, **{name: getattr(batch, name).mT.contiguous().mT for name in ("q", "k", "v")})
    assert torch.equal(turned.compute(attend), found)
