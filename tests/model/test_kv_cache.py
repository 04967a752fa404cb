"""The memory of keys and values: taken by the page where it is written, and given back."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from server.errors import SettingsError
from server.model.kv_cache import KVCache, KVLayout, LayerShape, longest_within, num_slots_within
from server.model.loader import load_base
from server.sequence import CopyPrefix, ReleaseTail
from tests.tiny_models import build_tiny_base

SHAPES = (LayerShape(2, 64, 64), LayerShape(1, 64, 32), LayerShape(4, 24, 40))
CPU = torch.device("cpu")
MEGABYTE = 2**20


def resident() -> int:
    """Memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def make(
    *, num_slots: int, max_len: int, dtype: torch.dtype = torch.float32, shapes: Sequence[LayerShape] = SHAPES
) -> KVCache:
    return KVCache(shapes, num_slots=num_slots, max_len=max_len, dtype=dtype, device=CPU)


def fill(cache: KVCache, slot: int, length: int, value: float) -> None:
    """Write every position of a slot."""
    for kept in (*cache.keys, *cache.values):
        kept[slot, :, :length] = value


def holds(cache: KVCache, slot: int, begin: int, end: int, value: float) -> bool:
    """Whether positions of a slot have this value in every layer."""
    return all(bool((kept[slot, :, begin:end] == value).all()) for kept in (*cache.keys, *cache.values))


def test_a_slot_takes_the_memory_that_it_is_said_to_take_and_gives_it_back() -> None:
    cache = make(num_slots=64, max_len=32_768)
    assert cache.layout.slot_size * 4 * 64 > 4 * 2**30, "far more addresses than memory"
    fill(make(num_slots=1, max_len=16), 0, 16, 1.0)  # torch's own pages are in memory then
    before = resident()
    for slot in (3, 4):
        fill(cache, slot, 20_000, 1.0)
    taken = resident() - before
    assert abs(taken - 2 * cache.layout.bytes_of(20_000)) < 4 * MEGABYTE
    cache.apply(ReleaseTail(3, 0))
    assert abs(resident() - before - cache.layout.bytes_of(20_000)) < 4 * MEGABYTE
    cache.apply(ReleaseTail(4, 1000))
    assert abs(resident() - before - cache.layout.bytes_of(1000)) < 4 * MEGABYTE
    assert holds(cache, 4, 0, 1000, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 500, 999, 1000])
def test_what_is_before_a_released_tail_and_in_other_slots_stays(length: int, dtype: torch.dtype) -> None:
    cache = make(num_slots=3, max_len=1000, dtype=dtype)
    for slot in range(3):
        fill(cache, slot, 1000, slot + 1)
    cache.apply(ReleaseTail(1, length))
    assert holds(cache, 0, 0, 1000, 1) and holds(cache, 2, 0, 1000, 3)
    assert holds(cache, 1, 0, length, 2)


def test_a_prefix_is_copied_and_nothing_else() -> None:
    cache = make(num_slots=3, max_len=100)
    for slot in range(3):
        fill(cache, slot, 100, slot)
    cache.apply(CopyPrefix(2, 0, 37))
    assert holds(cache, 0, 0, 37, 2) and holds(cache, 0, 37, 100, 0)
    assert holds(cache, 1, 0, 100, 1) and holds(cache, 2, 0, 100, 2)


def test_a_cache_that_is_dropped_takes_nothing() -> None:
    before = resident()
    for _ in range(5):
        cache = make(num_slots=4, max_len=10_000)
        fill(cache, 2, 10_000, 1.0)
        del cache
    assert resident() - before < 8 * MEGABYTE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_longest_sequence_within_so_much_memory(dtype: torch.dtype) -> None:
    layout = KVLayout(SHAPES, 5000, dtype)
    for num_bytes in (0, layout.bytes_of(1) - 1, layout.bytes_of(1), 10**6, 3 * 10**6, 10**9):
        length = longest_within(num_bytes, layout)
        assert length == 0 or layout.bytes_of(length) <= num_bytes
        assert length == 5000 or layout.bytes_of(length + 1) > num_bytes


def test_where_memory_does_not_come_by_the_page_there_are_as_many_slots_as_fit() -> None:
    layout = KVLayout(SHAPES, 1000, torch.bfloat16)
    whole = layout.slot_size * 2
    assert layout.bytes_of(1000) == whole
    assert num_slots_within(3 * whole, layout, torch.device("cuda"), wanted=8) == 3
    assert num_slots_within(30 * whole, layout, torch.device("mps"), wanted=8) == 8
    assert num_slots_within(3 * whole, layout, CPU, wanted=8) == 8


def test_a_bases_context_is_cut_to_what_memory_holds_unless_it_was_asked_for(tmp_path: Path) -> None:
    folder = str(build_tiny_base(tmp_path))

    def load(max_model_len: int | None, kv_memory: int) -> int:
        base = load_base(
            folder, name="tiny", device="cpu", dtype="float32", max_model_len=max_model_len, kv_memory=kv_memory
        )
        return base.max_model_len

    shapes = (LayerShape(2, 8, 8), LayerShape(2, 8, 8))
    one_page = KVLayout(shapes, 256, torch.float32).bytes_of(1)  # of each head: 128 positions
    assert load(None, 2 * one_page) == 256
    assert load(None, 2 * one_page - 1) == 128
    assert load(100, one_page) == 100
    with pytest.raises(SettingsError, match=r"kv_memory is .* one sequence of 200 tokens"):
        load(200, one_page)
    with pytest.raises(SettingsError, match="kv_memory"):
        load(None, one_page - 1)
