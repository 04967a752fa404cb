"""Every attention backend computes what the formula says, from the same steps, and keeps the same keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from cpu_kernels.kernels import Kernels
from server.model.attention.batched import BatchedAttention
from server.model.attention.cpu import NativeAttention, TorchAttention, cpu_attention
from server.model.attention.interface import AttentionBackend, AttentionParams, attention_segments
from server.model.kv_cache import AttentionMetadata, AttentionSegment, KVCache, LayerShape
from server.sequence import Batch, SamplingParams, Segment, Sequence

CPU = torch.device("cpu")
SHAPE = LayerShape(num_kv_heads=2, key_dim=32, value_dim=16)
NUM_HEADS, MAX_LEN = 6, 64
STEPS = [
    [(0, 0, 40)],
    [(0, 40, 1), (1, 0, 7), (2, 0, 1)],
    [(2, 1, 35), (0, 41, 1), (1, 7, 1), (1, 8, 1), (1, 9, 1)],
    [(0, 42, 1), (1, 10, 1), (2, 36, 1)],
]
"""Slot, first position and length of each segment: chunks of prompts, at the start and behind it, tokens, drafts."""
PARAMS = {
    "plain": AttentionParams(0.2),
    "window": AttentionParams(0.2, window=8),
    "soft cap": AttentionParams(0.2, softcap=2.0),
    "sinks and window": AttentionParams(0.2, window=8, sinks=torch.linspace(-1, 1, NUM_HEADS)),
}
Backend = Callable[[KVCache], AttentionBackend]


def native(cache: KVCache) -> AttentionBackend:
    return cpu_attention(cache, kernels=Kernels(native=True, kv_dtype=cache.layout.dtype).ready())


BACKENDS = [
    pytest.param(TorchAttention, id="torch"),
    pytest.param(BatchedAttention, id="batched"),
    pytest.param(native, id="native"),
]


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of all positions of each slot, [slots, heads, MAX_LEN, dim]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def random(cls) -> Tokens:
        generator = torch.Generator().manual_seed(0)
        sizes = ((NUM_HEADS, 32), (2, 32), (2, 16))
        q, k, v = (torch.randn(3, heads, MAX_LEN, dim, generator=generator) for heads, dim in sizes)
        return cls(2 * q, k, v)

    def rows(self, tensor: torch.Tensor, segments: tuple[AttentionSegment, ...]) -> torch.Tensor:
        """Those of a step [1, heads, rows, dim], which lie in memory as modelling code leaves them."""
        parts = [tensor[segment.slot, :, segment.start : segment.end] for segment in segments]
        return torch.cat(parts, dim=1).transpose(0, 1).contiguous().transpose(0, 1)[None]

    def exact(self, slot: int, position: int, params: AttentionParams) -> torch.Tensor:
        """The result for one row, float64 [heads, value_dim]."""
        first = 0 if params.window is None else max(0, position + 1 - params.window)
        k, v = (kept[slot, :, first : position + 1].double().repeat_interleave(3, 0) for kept in (self.k, self.v))
        scores = torch.einsum("hd,hkd->hk", self.q[slot, :, position].double(), k) * params.scale
        if params.softcap is not None:
            scores = torch.tanh(scores / params.softcap) * params.softcap
        if params.sinks is not None:
            scores = torch.cat([scores, params.sinks.double()[:, None]], dim=1)
        weights = scores.softmax(-1)[:, : k.shape[1]]
        return torch.einsum("hk,hkd->hd", weights, v)


def cache_of(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache([SHAPE, SHAPE], num_slots=3, max_len=MAX_LEN, dtype=dtype, device=CPU)


def metadata_of(step: list[tuple[int, int, int]]) -> AttentionMetadata:
    segments, row = [], 0
    for slot, start, length in step:
        segments.append(AttentionSegment(row, start, length, slot))
        row += length
    return AttentionMetadata.of(tuple(segments), CPU)


def attend(backend: AttentionBackend, tokens: Tokens, metadata: AttentionMetadata, name: str) -> torch.Tensor:
    """A step of one layer, [rows, heads, value_dim]."""
    backend.begin(metadata)
    q, k, v = (tokens.rows(tensor, metadata.segments) for tensor in (tokens.q, tokens.k, tokens.v))
    found = backend.attend(1, q, k, v, PARAMS[name])
    assert found.shape == (1, q.shape[2], NUM_HEADS, SHAPE.value_dim) and found.dtype == torch.float32
    return found[0]


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("make", BACKENDS)
def test_steps_of_chunks_and_single_rows_come_out_as_the_formula_says(make: Backend, name: str) -> None:
    backend, tokens = make(cache_of()), Tokens.random()
    for step in STEPS:
        metadata = metadata_of(step)
        found = attend(backend, tokens, metadata, name)
        places = zip(metadata.slots.tolist(), metadata.positions.tolist(), strict=True)
        expected = torch.stack([tokens.exact(slot, position, PARAMS[name]) for slot, position in places])
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    keys, values = backend.cache.keys[1], backend.cache.values[1]
    for slot, length in enumerate((43, 11, 37)):
        assert torch.equal(keys[slot, :, :length], tokens.k[slot, :, :length])
        assert torch.equal(values[slot, :, :length], tokens.v[slot, :, :length])
    assert not backend.cache.keys[0].any(), "another layer's are untouched"


@pytest.mark.parametrize("make", BACKENDS)
def test_keys_and_values_are_kept_in_the_caches_format_and_results_are_in_that_of_the_queries(make: Backend) -> None:
    exact, rounded, tokens = make(cache_of()), make(cache_of(torch.bfloat16)), Tokens.random()
    for step in STEPS:
        expected, found = (attend(backend, tokens, metadata_of(step), "plain") for backend in (exact, rounded))
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.02


def test_a_number_format_without_a_kernel_is_torchs() -> None:
    assert isinstance(native(cache_of(torch.bfloat16)), NativeAttention)
    assert isinstance(native(cache_of(torch.float16)), TorchAttention)


def test_recorded_layers_are_told_every_tensor_that_a_step_has_anew() -> None:
    backend = native(cache_of())
    backend.begin(metadata_of(STEPS[3]))
    slots, positions, spans = backend.step_tensors()
    assert slots.tolist() == [0, 1, 2] and positions.tolist() == [42, 10, 36] and spans.tolist() == [[0, 3]]


def segment(length: int, drafts: tuple[int, ...] = ()) -> Segment:
    sequence = Sequence(0, tuple(range(10, 10 + length)), 20, SamplingParams())
    return Segment(sequence, 2, 5, length + len(drafts), drafts)


@pytest.mark.parametrize(
    ("max_single_rows", "lengths"), [(1, [3, 1, 1, 1, 5]), (3, [1, 1, 1, 1, 1, 1, 5]), (5, [1] * 11)]
)
def test_drafts_are_segments_of_their_own_and_so_are_rows_of_short_chunks(
    max_single_rows: int, lengths: list[int]
) -> None:
    batch = Batch((segment(3, drafts=(7, 8)), segment(1), segment(5)))
    found = attention_segments(batch.segments, max_single_rows)
    assert [each.length for each in found] == lengths
    assert [each.row for each in found] == [sum(lengths[:number]) for number in range(len(lengths))]
    positions = [position for each in found for position in range(each.start, each.end)]
    assert positions == [*range(5, 10), 5, *range(5, 10)] and {each.slot for each in found} == {2}


def test_a_backend_that_reads_behind_a_sequences_end_clears_it_for_a_new_one() -> None:
    for make, value in ((TorchAttention, 9.0), (BatchedAttention, 0.0)):
        backend = make(cache_of())
        backend.cache.keys[0].fill_(9.0)
        new = segment(4)
        new.sequence.num_cached = new.start
        backend.prepare_slots(Batch((new,)))
        assert backend.cache.keys[0][2, :, :5].eq(9.0).all() and backend.cache.keys[0][:2].eq(9.0).all()
        assert backend.cache.keys[0][2, :, 5:].eq(value).all()
