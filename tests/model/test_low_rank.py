"""Deltas by a native kernel: each adapter's by itself in whatever mixture, each row the same to the bit as alone."""

from __future__ import annotations

import random
from collections import abc
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import nn

from server.integrity import IntegrityError
from server.lora.bank import LoRABank
from server.lora.delta import LoRADelta
from server.lora.native import NativeLoRA
from server.lora.weights import LoRAWeights
from server.sequence import Batch, LoRARequest, SamplingParams, Segment, Sequence
from tests.instruction_sets import NUMBA, needs
from tests.model.test_lora_bank import HIDDEN, SEEDS, Stage, adapter, native_lora, ones, sequence, storm

pytestmark = needs(NUMBA)
LENGTHS = (1, 1, 2, 15, 16, 17, 33, 1)
RANKS = (1, 3, 4, 7, 8, 9, 16, 33)


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def stage(threads: int) -> Stage:
    return Stage(native=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_mixtures_are_what_each_adapter_gives_by_itself(seed: int, stage: Stage) -> None:
    storm(stage, seed)
    assert stage.batched is None


def test_a_module_that_no_adapter_has_a_plain_delta_for(stage: Stage) -> None:
    """It had no table, and the kernel read the address 0."""
    stage.add("dora", adapter(1, ("down",), 4, scale=torch.rand(HIDDEN) + 0.5))
    stage.step(ones("dora", "dora"))
    stage.add("plain", adapter(2, ("q", "v"), 4))
    stage.step([*ones("dora", "plain"), sequence(8, [], 3)])


def test_more_adapters_than_there_was_room_for_while_some_run(stage: Stage) -> None:
    """Tables move when they grow; an adapter's place is free for the next one when it goes."""
    for number in range(40):
        stage.add(str(number), adapter(number, ("q", "k", "down", "head"), 1 + number % 5))
        stage.step(ones(*stage.adapters))
        if number % 3 == 2:
            stage.remove(str(number - 1))
            stage.step(ones(*stage.adapters))


def test_steps_with_more_runs_than_were_thought_of(stage: Stage) -> None:
    """Sixteen sequences have room for 64 uses; here are 200, and the head's are as many."""
    for digest in "abcde":
        stage.add(digest, adapter(ord(digest), ("q", "down", "head"), 3))
    before = stage.bank.generation
    mixtures = [[(digest, 0.5 + number / 64) for digest in "abcde"] for number in range(40)]
    stage.step([sequence(2 * number, uses, 1) for number, uses in enumerate(mixtures)])
    assert stage.bank.generation > before
    stage.step(ones(*"abc"))


def test_steps_that_sample_no_row(stage: Stage) -> None:
    stage.add("a", adapter(1, ("q", "head"), 4))
    stage.step([sequence(1, [("a", 1.0)], 3), sequence(3, [], 2)])


@torch.inference_mode()
def test_a_module_that_gets_other_rows_than_the_batchs_is_not_computed(stage: Stage) -> None:
    """The kernel would write behind its result."""
    stage.add("a", adapter(1, ("q",), 4))
    stage.step([sequence(0, [("a", 1.0)], 5), sequence(2, [], 1)])
    with pytest.raises(IntegrityError, match="got 4 of 6 rows"):
        stage.model.get_submodule("q")(torch.randn(1, 4, HIDDEN))


def test_an_adapter_that_is_removed_leaves_nothing(stage: Stage) -> None:
    for digest in "ab":
        stage.add(digest, adapter(ord(digest), ("q",), 4))
    stage.remove("a")
    stage.add("c", adapter(7, ("v",), 4))  # in its place, on another module
    stage.step(ones("b", "c", "b"))
    for digest in "bc":
        stage.remove(digest)
    assert isinstance(stage.bank.backend, NativeLoRA)
    assert not stage.bank.backend._kept and not stage.bank.backend._indices
    stage.step([sequence(0, [], 2)])


def random_deltas(source: torch.Generator, num_inputs: int, num_outputs: int) -> Mapping[str, LoRADelta]:
    """One of each rank, and of one whose A lies in a wider tensor."""
    deltas = {
        str(rank): LoRADelta(
            "linear",
            torch.randn(rank, num_inputs, generator=source).t(),
            torch.randn(rank, num_outputs, generator=source),
        )
        for rank in RANKS
    }
    wide = torch.randn(6, num_inputs + 5, generator=source)[:, 5:]
    return {**deltas, "wide": LoRADelta("linear", wide.t(), torch.randn(num_outputs, 6, generator=source).t())}


def segments(uses: abc.Sequence[tuple[LoRARequest, ...]], lengths: abc.Sequence[int]) -> tuple[Segment, ...]:
    made = []
    for number, (mine, length) in enumerate(zip(uses, lengths, strict=True)):
        one = Sequence(number, tuple(range(length)), 9, SamplingParams(), mine)
        made.append(Segment(one, number, 0, length))
    return tuple(made)


@torch.inference_mode()
@pytest.mark.parametrize("num_inputs", [1, 15, 16, 100, 128, 896])
@pytest.mark.parametrize("num_outputs", [1, 63, 64, 200, 1100])
def test_every_size_is_torchs_and_a_row_is_the_same_alone(threads: int, num_inputs: int, num_outputs: int) -> None:
    generator, source = torch.Generator().manual_seed(num_inputs), random.Random(num_outputs)
    base = nn.Linear(num_inputs, num_outputs, bias=False)
    model = nn.Module()
    model.add_module("it", base)
    bank = LoRABank(model, native_lora(model, max_seqs=4))
    deltas = random_deltas(generator, num_inputs, num_outputs)
    for digest, delta in deltas.items():
        bank.add(digest, LoRAWeights({"it": delta}))
    mixtures: list[tuple[LoRARequest, ...]] = [
        (),
        (LoRARequest("33"), LoRARequest("3", 2.0), LoRARequest("wide", -1.0)),
    ]
    mixtures += [(LoRARequest(digest, source.choice((1.0, -0.5, 3.0))),) for digest in deltas]
    lengths = [source.choice(LENGTHS) for _ in mixtures]
    linear, batch = model.get_submodule("it"), bank.begin_sorted(Batch(segments(mixtures, lengths)))
    linear._compute = lambda x: torch.zeros(*x.shape[:-1], num_outputs)  # type: ignore[assignment]
    x = torch.randn(1, sum(lengths), num_inputs, generator=generator)
    found, row = linear(x)[0], 0
    for segment in batch.segments:
        mine = x[0, row : row + segment.length]
        expected = torch.zeros(segment.length, num_outputs, dtype=torch.float64)
        size = torch.full_like(expected, 1e-9)
        for use in segment.sequence.adapters:
            a, b = deltas[use.digest].a, deltas[use.digest].b
            assert a is not None and b is not None
            expected += use.scale * (mine.double() @ a.double()) @ b.double()
            size += abs(use.scale) * (mine.double().abs() @ a.double().abs()) @ b.double().abs()
        together = found[row : row + segment.length]
        assert float(((together - expected).abs() / size).max()) < 1e-5
        for place in {0, segment.length // 2, segment.length - 1}:
            bank.begin_sorted(Batch(segments([segment.sequence.adapters], [1])))
            assert torch.equal(linear(mine[None, place : place + 1])[0, 0], together[place])
        row += segment.length
