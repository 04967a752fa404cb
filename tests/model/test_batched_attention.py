"""Attention as it is on an accelerator, proved on the CPU: one call for all decoding rows, and nothing else changes."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpu_kernels.kernels import Kernels
from server.lora.delta import LoRADelta
from server.lora.weights import LoRAWeights
from server.model.admission import admit
from server.model.attention.batched import AttentionPlan, BatchedAttention, grouped, plan_step
from server.model.attention.interface import AttentionParams
from server.model.kv_cache import AttentionSegment
from server.model.runner import ModelRunner
from server.sequence import Batch, LoRARequest, SamplingParams, Segment, Sequence
from tests.model.architectures import SERVED
from tests.model.families import WINDOW, build
from tests.model.harness import Ask, Hosted, difference, generate, host, margin, prompts, stock_logits
from tests.model.test_prefix_logits import conversations

TOLERANCE = 1e-5
"""Largest difference of logits, as a share of the largest stock logit, in float32."""

PLENTY = 2**30
FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2")
"""Grouped heads, biases, a window in all layers and in some, soft caps, sinks, as many KV heads as query heads."""


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts calls of torch's attention, whose results lie in memory as CUDA's memory-efficient kernel leaves them."""
    calls: Counter[str] = Counter()
    stock = F.scaled_dot_product_attention

    def strided(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> torch.Tensor:
        calls["calls"] += 1
        mask = named.get("attn_mask")
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        assert mask is None or mask.dtype == query.dtype
        calls["copied masks"] += mask is not None and any(stride % 8 for stride in mask.stride()[:-1])
        computed = stock(query, key, value, **named)
        batch, heads, rows, dim = computed.shape
        return computed.new_empty(batch, rows, heads, dim).transpose(1, 2).copy_(computed)

    monkeypatch.setattr(F, "scaled_dot_product_attention", strided)
    yield calls
    assert calls


def check(hosted: Hosted, stock: Any, asks: list[Ask]) -> None:
    """Logits and tokens of every answer are the stock model's."""
    for answer in hosted.run(asks):
        expected = stock_logits(stock, answer)
        assert difference(answer.logits, expected) < TOLERANCE
        if margin(expected) > 10 * TOLERANCE:
            assert answer.tokens == generate(stock, answer.ask)


def segment_of(sequence: Sequence, drafts: tuple[int, ...] = ()) -> Segment:
    """All that is not computed of a sequence, and drafts behind it."""
    assert sequence.slot is not None
    length = sequence.num_uncomputed + len(drafts)
    return Segment(sequence, sequence.slot, sequence.num_computed, length, drafts)


def step(hosted: Hosted, sequences: list[Sequence]) -> torch.Tensor:
    """Logits of what each sequence's last token yields; it stays the last one, so that a step can be repeated."""
    return hosted.runner.run(Batch(tuple(map(segment_of, sequences))))[0]


def started(hosted: Hosted, *lengths: int, slots: tuple[int, ...] = ()) -> list[Sequence]:
    """Sequences whose prompts of these lengths are computed, each with one token of an answer."""
    sequences = [Sequence(n, prompt, 20, SamplingParams()) for n, prompt in enumerate(prompts(*lengths))]
    for sequence, slot in zip(sequences, slots or range(len(lengths)), strict=True):
        sequence.slot = slot
    step(hosted, sequences)
    for sequence in sequences:
        sequence.num_computed = sequence.num_tokens
        sequence.output_ids.append(11 + sequence.id)
    return sequences


def staggered(*lengths: int) -> list[Ask]:
    """Prompts of these lengths that join one after another."""
    return [Ask(prompt, 8 + n % 3, step=2 * n) for n, prompt in enumerate(prompts(*lengths))]


def test_results_that_lie_in_memory_as_on_cuda_are_read_right(attention: Counter[str]) -> None:
    """Once every request on CUDA in float32 failed: a single row's result was taken for one run of numbers."""
    check(host(build("llama")), build("llama"), staggered(3, 40, 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_rows_come_out_as_the_stock_model_generates_them(family: str) -> None:
    model = build(family, seed=5 if family == "gpt2" else 0)
    stock = copy.deepcopy(model)
    check(host(model, backend=BatchedAttention, max_num_seqs=4), stock, staggered(3, 40, 5, 61, 17, 9, 1))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_so_do_rows_after_prefixes_in_place_and_copied(family: str) -> None:
    model = build(family)
    stock = copy.deepcopy(model)
    check(host(model, backend=BatchedAttention, kv_memory=PLENTY), stock, conversations(60))


def test_strided_results_are_right_in_the_batch_too(attention: Counter[str]) -> None:
    hosted = host(build("mistral"), backend=BatchedAttention)
    attention.clear()
    check(hosted, build("mistral"), staggered(3, 40, 5, 17))
    assert attention["copied masks"] == 0


def test_a_decoding_step_makes_one_call_a_layer(attention: Counter[str]) -> None:
    hosted = host(build("llama"), backend=BatchedAttention, max_num_seqs=6, budget=200)
    sequences = started(hosted, 5, 40, 9, 23, 17, 1)
    attention.clear()
    step(hosted, sequences)
    assert attention["calls"] == 3


def test_rows_are_the_same_alone_and_beside_longer_ones_of_any_slot() -> None:
    """In slots that follow one another keys are not copied, in others they are."""
    for slots in ((0, 1, 2), (2, 1, 0), (3, 0, 2)):
        hosted = host(build("llama"), backend=BatchedAttention, max_num_seqs=4, budget=200)
        sequences = started(hosted, 5, 40, 9, slots=slots)
        together = step(hosted, sequences)
        alone = torch.cat([step(hosted, [one]) for one in sequences])
        assert difference(together, alone) < TOLERANCE


def test_drafts_are_rows_of_their_own_in_one_slot() -> None:
    hosted = host(build("mistral"), backend=BatchedAttention, max_num_seqs=4, budget=200)
    one, two = started(hosted, 21, 6)
    logits, _ = hosted.runner.run(Batch((segment_of(one, drafts=(8, 9)), segment_of(two))))
    expected = []
    for token in (8, 9, 10):
        expected.append(step(hosted, [one]))
        one.num_computed += 1
        one.output_ids.append(token)
    assert difference(logits[:3], torch.cat(expected)) < TOLERANCE
    assert difference(logits[3:], step(hosted, [two])) < TOLERANCE


def test_what_another_sequence_left_in_a_slot_is_not_read() -> None:
    """A row is given keys beyond its end, hidden by a mask; 0 times NaN would still be NaN."""
    hosted = host(build("llama"), backend=BatchedAttention, max_num_seqs=4)
    for kept in (*hosted._cache.keys, *hosted._cache.values):
        kept.fill_(float("nan"))
    check(hosted, build("llama"), staggered(3, 40, 5, 17))


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-OSS", "DeepSeek V3"])
def test_architectures_are_judged_by_the_attention_that_will_run(name: str) -> None:
    admit(SERVED[name](), name=name, backend=BatchedAttention)


def test_groups_hold_every_row_once_and_read_few_keys_for_nothing() -> None:
    source = random.Random(0)
    for window in (None, 8, 700):
        for _ in range(30):
            starts = [source.choice((3, 60, 500, 513, 4000, source.randrange(9000))) for _ in range(40)]
            rows = [AttentionSegment(row, start, 1, row % 7) for row, start in enumerate(starts)]
            groups = grouped(rows, window)
            assert sorted((segment for group in groups for segment in group), key=lambda segment: segment.row) == rows
            for group in groups:
                seen = [min(segment.start + 1, window or segment.start + 1) for segment in group]
                first = min(segment.start + 1 - keys for segment, keys in zip(group, seen, strict=True))
                assert max(segment.start for segment in group) + 1 - first <= max(512, 2 * max(seen))


def test_slots_side_by_side_are_a_range_and_rows_in_order_are_whole() -> None:
    def planned(*rows: tuple[int, int, int], window: int | None = None) -> AttentionPlan:
        """Of rows, by number, position and slot."""
        segments = [AttentionSegment(row, start, 1, slot) for row, start, slot in rows]
        return plan_step(segments, AttentionParams(1.0, window), max_len=100, like=torch.empty(0))

    in_order = planned((0, 9, 4), (1, 7, 5))
    assert in_order.whole is not None and in_order.whole.slots == range(4, 6)
    turned = planned((0, 9, 5), (1, 7, 4))
    assert turned.whole is None and turned.groups[0].slots == range(4, 6)
    assert turned.groups[0].rows.tolist() == [1, 0]
    apart = planned((0, 9, 8), (1, 7, 4))
    assert apart.whole is not None and isinstance(apart.whole.slots, torch.Tensor)
    equal = planned((0, 9, 8), (1, 9, 4), window=WINDOW)
    assert equal.groups[0].mask is None and (equal.groups[0].first, equal.groups[0].end) == (2, 10)


def adapter_of(model: torch.nn.Module) -> LoRAWeights:
    """A delta of rank 4 for two linears of each layer, without numbers."""
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    sizes = {name: model.get_parameter(f"{name}.weight").shape for name in names}
    like = torch.empty(0, device="meta")
    return LoRAWeights(
        {name: LoRADelta("linear", like.new_empty(i, 4), like.new_empty(4, o)) for name, (o, i) in sizes.items()}
    )


class HostToDevice(TorchDispatchMode):
    """Counts copies from the host onto the device, and refuses operations on both."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor) and one.ndim]
        kinds = {tensor.device.type for tensor in tensors}
        assert len(kinds) <= 1, f"{func} mixes devices"
        self.num_copies += kinds == {"cpu"} and isinstance(result, torch.Tensor) and result.device.type == "meta"
        return result


@pytest.mark.parametrize(("family", "num_windows"), [("llama", 1), ("gemma2", 2)])
def test_a_step_on_a_device_reads_nothing_back_and_copies_a_list_or_two_onto_it(family: str, num_windows: int) -> None:
    """torch's ``meta`` device has no numbers, so that an operation that needs one on the host fails."""
    hosted = host(build(family), max_num_seqs=5, backend=BatchedAttention, budget=200)
    shapes = hosted._cache.layout.shapes
    model = hosted.model
    torch.nn.Module.to(model, device="meta")
    hosted.runner = ModelRunner(
        model,
        hosted.runner.attention,
        shapes,
        BatchedAttention,
        num_slots=5,
        max_len=100,
        groups=hosted.trace.groups,
        kernels=Kernels(),
    )
    for digest in ("one", "two", "three"):
        hosted.runner.add_adapter(digest, adapter_of(model))
    sequences = started(hosted, 5, 30, 9, 12, 40)
    uses = [(), (LoRARequest("one"),), (LoRARequest("two", 0.5),), (LoRARequest("one"), LoRARequest("three")), ()]
    for sequence, adapters in zip(sequences, uses, strict=True):
        sequence.adapters = adapters
    step(hosted, sequences)
    with HostToDevice() as seen:
        step(hosted, sequences)
    assert seen.num_copies == 1 + num_windows + 1, "rows, a plan for each window, factors of adapters"
