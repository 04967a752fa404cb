"""Attention of chunks of prompts: near to exact; and by tiles the same however a prompt is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

from cpu_kernels.kernels import Kernels
from server.model.attention.interface import AttentionParams
from server.model.attention.sdpa import attend_chunk, chunk_mask
from server.model.kv_cache import AttentionSegment
from tests.instruction_sets import needs

SIZES = [(14, 2, 64), (4, 4, 32), (4, 1, 128), (2, 2, 96)]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int | None, float], torch.Tensor]
"""Of q float32 [heads, rows, dim], keys and values bfloat16 [kv_heads, keys, dim], a window and a scale."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float) -> torch.Tensor:
    """In float64 -> [rows, heads, dim]."""
    rows, keys, group = q.shape[1], k.shape[1], len(q) // len(k)
    scores = q.bfloat16().double() @ k.double().repeat_interleave(group, 0).transpose(1, 2) * scale
    distance = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)
    seen = (distance >= 0) & (distance < (window or keys))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v.double().repeat_interleave(group, 0)).transpose(0, 1)


def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float) -> torch.Tensor:
    segment = AttentionSegment(slot=0, row=0, start=k.shape[1] - q.shape[1], length=q.shape[1])
    params, first = AttentionParams(scale, window), segment.first_key(window)
    mask = chunk_mask(segment, params, torch.bfloat16, torch.device("cpu"))
    return attend_chunk(q[None].bfloat16(), k[None, :, first:], v[None, :, first:], mask, params).float()


def by_tiles() -> Attend:
    chunks = Kernels(native=True).ready().prompt_attention(torch.bfloat16)
    assert chunks is not None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float) -> torch.Tensor:
        assert chunks.can_attend(q, k, v)
        first = 0 if window is None else max(0, k.shape[1] - q.shape[1] - window + 1)
        out = torch.full((q.shape[1], len(q), v.shape[-1]), torch.nan)
        chunks(q, k[:, first:], v[:, first:], out, window, scale)
        return out

    return attend


@pytest.fixture(params=["torch", pytest.param("tiles", marks=needs("AMX"))])
def attend(request: pytest.FixtureRequest) -> Iterator[Attend]:
    """Each way that this CPU has, on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield by_torch if request.param == "torch" else by_tiles()
    torch.set_num_threads(before)


@pytest.mark.parametrize("window", [None, 1, 7, 32, 50, 1000])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chunks_get_what_is_exact_but_for_rounding(
    attend: Attend, size: tuple[int, int, int], window: int | None
) -> None:
    heads, kv_heads, dim = size
    for rows, keys in ((2, 2), (40, 40), (33, 300), (65, 100), (300, 300)):
        q = 3.0 * random(rows, heads, dim).transpose(0, 1)
        whole = [random(kv_heads, keys + 5, dim, seed=seed).bfloat16() for seed in (1, 2)]
        k, v = (one[:, :keys] for one in whole)  # in a cache that has room for more
        expected = exact(q, k, v, window, dim**-0.5)
        error = (attend(q, k, v, window, dim**-0.5) - expected).norm() / expected.norm()
        assert float(error) < 0.01, (rows, keys)


@pytest.mark.parametrize("keys", [31, 32, 33, 95, 96, 97, 128, 191, 192, 193])
def test_chunks_end_on_either_side_of_blocks_of_keys(attend: Attend, keys: int) -> None:
    for rows, window in ((keys, None), (7, None), (7, 40), (keys, 96)):
        q, k, v = random(4, rows, 64), random(2, keys, 64, seed=1).bfloat16(), random(2, keys, 64, seed=2).bfloat16()
        expected = exact(q, k, v, window, 0.125)
        error = (attend(q, k, v, window, 0.125) - expected).norm() / expected.norm()
        assert float(error) < 0.01, (rows, window)


@pytest.mark.parametrize("growth", [-300.0, -1.0, 1.0, 300.0])
def test_scores_that_grow_or_fall_from_block_to_block_keep_their_weights(attend: Attend, growth: float) -> None:
    """By much more than float32's exponents reach, and slowly, so that every key counts."""
    q, v = torch.ones(2, 300, 32), random(2, 300, 32).bfloat16()
    k = (growth / 32 * torch.arange(300) / 96)[None, :, None].expand(2, 300, 32).bfloat16()
    expected = exact(q, k, v, None, 1.0)
    error = (attend(q, k, v, None, 1.0) - expected).norm() / expected.norm()
    assert float(error) < 0.01


def test_rows_that_are_nan_or_huge_keep_to_themselves(attend: Attend) -> None:
    q, k, v = random(4, 70, 64), random(2, 70, 64, seed=1).bfloat16(), random(2, 70, 64, seed=2).bfloat16()
    clean = attend(q, k, v, None, 0.125)
    spoiled = q.clone()
    spoiled[:, 33] = torch.nan
    spoiled[:, 40] *= 1e4
    found = attend(spoiled, k, v, None, 0.125)
    assert bool(found[33].isnan().all()) and bool(found[40].isfinite().all())
    others = [row for row in range(70) if row not in (33, 40)]
    assert torch.equal(found[others], clean[others])


@needs("AMX")
@pytest.mark.parametrize("scale", [1.0, 50.0])  # the largest score grows often, and by more than powers may
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_by_tiles_a_row_is_the_same_to_the_bit_however_its_prompt_is_cut(threads: int, scale: float) -> None:
    attend, before = by_tiles(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, v = (random(n, 400, 64, seed=seed) for n, seed in ((6, 0), (2, 1), (2, 2)))
        q, k, v = scale * q, k.bfloat16(), v.bfloat16()
        whole = attend(q, k, v, None, 0.125)
        for cuts in ((0, 1, 400), (0, 33, 66, 400), (0, 100, 131, 399, 400), (0, 64, 128, 400), (0, 95, 192, 289, 400)):
            for begin, end in pairwise(cuts):
                part = attend(q[:, begin:end], k[:, :end], v[:, :end], None, 0.125)
                assert torch.equal(part, whole[begin:end]), (begin, end)
    finally:
        torch.set_num_threads(before)
