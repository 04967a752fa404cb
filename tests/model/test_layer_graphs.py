"""Decoding steps replayed from layer graphs give the very bits that Python gives, or they are not replayed."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from cpu_kernels.kernels import choose_linear
from cpu_kernels.layer_graph import LayerGraph
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.lora.delta import LoRADelta
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model import layer_graphs
from server.model.attention.cpu import TorchAttention, cpu_attention
from server.model.layer_graphs import GraphRunner
from server.model.runner import ModelRunner
from server.module_proxy import with_parameters
from server.sequence import Batch, LoRARequest, SamplingParams, Segment, Sequence
from tests.instruction_sets import PRODUCTS, needs
from tests.model.families import _COMMON, FAMILIES, _config, build_from
from tests.model.harness import GREEDY, Hosted, RecordingSampler, host, prompts
from tests.model.peft_cases import CONFIGS
from tests.tables import one_of_each

pytestmark = needs(*PRODUCTS)  # without native linears there are no layer graphs
LENGTH = 288
"""Of the longest sequence."""

NOT_RECORDED = {
    "gpt_oss": "experts",
    "qwen3_moe": "experts",
    "gpt2": "LayerNorm and GELU are torch's",
    "gpt_neox": "as gpt2",
}
"""Families whose layers do what a layer graph does not hold, and what it is."""

CONFIG = {
    **FAMILIES,
    "qwen3_moe": CONFIGS["qwen3_moe"],
    "granite": _config("GraniteConfig", **_COMMON, residual_multiplier=0.22, attention_multiplier=0.3),
}


def hosted_as(name: str) -> Hosted:
    """A family in int8 with native kernels, whose sequences may be long."""
    config = copy.deepcopy(CONFIG[name])
    setattr(config, "n_positions" if name == "gpt2" else "max_position_embeddings", LENGTH)
    return host(build_from(config), linear=choose_linear(), native=True, max_model_len=LENGTH, budget=64)


@pytest.fixture
def llama() -> Hosted:
    return hosted_as("llama")


def graphs_of(hosted: Hosted) -> GraphRunner:
    assert hosted.runner.graphs is not None
    return hosted.runner.graphs


def adapter(hosted: Hosted, seed: int, rank: int, *, every: int = 1, dora: bool = False) -> LoRAWeights:
    """Random deltas on every so many-th linear, the head among them."""
    generator, deltas = torch.Generator().manual_seed(seed), {}
    linears = {name: shape.size for name, shape in hosted.trace.modules.items() if shape.kind == "linear"}
    for name, (inside, outside) in list(linears.items())[seed % every :: every]:
        a = torch.randn(rank, inside, generator=generator).t() * inside**-0.5
        scale = torch.rand(outside, generator=generator) + 0.5 if dora else None
        deltas[name] = LoRADelta("linear", a, torch.randn(rank, outside, generator=generator) * 0.2, scale)
    return LoRAWeights(deltas, 1.0)


def norms_of_its_own(hosted: Hosted) -> LoRAWeights:
    """An adapter that has its own norms, and plain deltas."""
    deltas = dict(adapter(hosted, 5, 3, every=2).deltas)
    for name, shape in hosted.trace.modules.items():
        if name.endswith("norm") and shape.kind == "rows":
            base = hosted.runner.bank.base_modules[name]
            own = {"weight": base.get_parameter("weight") * 0.8}
            deltas[name] = LoRADelta("rows", own=with_parameters(base, own), own_names=("weight",), axis=shape.axis)
    return LoRAWeights(deltas, 1.0)


class Play:
    """An engine on a hosted model, and what its sequences were given."""

    def __init__(self, hosted: Hosted) -> None:
        self.hosted, self.sampler, self.num_steps = hosted, RecordingSampler(), 0
        scheduler = Scheduler(
            max_num_seqs=hosted.max_num_seqs, max_num_batched_tokens=64, max_model_len=LENGTH, max_draft_tokens=4
        )
        self.engine = Engine(scheduler, hosted.runner, self.sampler, Metrics())
        self.num_sequences = 0

    def ask(self, length: int, num_tokens: int, *uses: tuple[str, float]) -> None:
        """A sequence more, half of whose prompt it has said before."""
        half = prompts(-(-length // 2), seed=self.num_sequences)[0]
        adapters = tuple(LoRARequest(*use) for use in uses)
        self.engine.add(Sequence(self.num_sequences, (*half, *half)[:length], num_tokens, GREEDY, adapters))
        self.num_sequences += 1

    def steps(self, number: int | None = None) -> None:
        """So many, or until all is said."""
        while not self.engine.idle and number != 0:
            assert not any(output.failed for output in self.engine.step())
            number = None if number is None else number - 1

    def through(self) -> dict[int, torch.Tensor]:
        """Adapters and sequences come and go; the logits of each sequence [tokens, vocab]."""
        runner, hosted = self.hosted.runner, self.hosted
        self.ask(250, 14)
        self.ask(3, 20)
        self.steps(12)  # base alone
        for digest, seed, rank, every in (("a", 1, 4, 1), ("b", 2, 7, 2)):
            hosted.add(digest, adapter(hosted, seed, rank, every=every))
        self.ask(1, 12, ("a", 1.0))
        self.steps(5)
        self.ask(30, 12, ("b", -0.5))
        self.steps()
        hosted.add("dora", adapter(hosted, 3, 4, dora=True))
        hosted.add("norms", norms_of_its_own(hosted))
        self.ask(9, 16, ("a", 0.5), ("b", 1.5))
        self.ask(1, 5, ("dora", 1.0))
        self.ask(2, 5, ("norms", 1.0))
        self.steps(12)
        runner.remove_adapter("dora")
        self.steps()
        runner.remove_adapter("a")
        hosted.add("c", adapter(hosted, 4, 16, every=3))  # in its place
        for length, digest in ((5, "b"), (17, "c"), (8, "c")):
            self.ask(length, 10, (digest, 1.0))
        self.steps()
        for digest in ("b", "c", "norms"):
            runner.remove_adapter(digest)
        self.ask(4, 8)
        self.ask(251, 12)
        self.steps()
        return {number: torch.stack(logits) for number, logits in self.sampler.logits.items()}


@pytest.mark.parametrize(("name", "threads"), one_of_each(itertools.product(CONFIG, (1, 2))))
def test_whatever_happens_logits_are_those_of_steps_in_python(name: str, threads: int, restore_threads: None) -> None:
    torch.set_num_threads(threads)
    played, stepped = hosted_as(name), hosted_as(name)
    kept = graphs_of(played)
    stepped.runner.graphs = None
    found, expected = Play(played).through(), Play(stepped).through()
    assert (kept.num_replayed == 0) == (name in NOT_RECORDED), kept.problem
    assert (kept.problem is not None) == (name in NOT_RECORDED)
    assert len(found) == len(expected) == 12
    for number, logits in found.items():
        assert torch.equal(logits, expected[number]), number


def test_there_are_no_layer_graphs_where_torch_attends() -> None:
    """There were, and their arena of 64 MiB with them, until the first step found that none could be recorded."""
    hosted = host(build_from(CONFIG["llama"]), linear=choose_linear(), native=True, backend=TorchAttention)
    assert hosted.kernels.records_layers and hosted.runner.graphs is None


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


Row = tuple[int, int, tuple[LoRARequest, ...]]
"""A slot, the position of its decoding row, and what it uses."""


def batch_of(*rows: Row, drafts: int = 0) -> Batch:
    """Decoding rows, each with so many drafts."""
    segments = []
    for number, (slot, position, uses) in enumerate(rows):
        one = Sequence(number, prompts(position + 1, seed=number)[0], 20, SamplingParams(), uses)
        segments.append(Segment(one, slot, position, 1 + drafts, tuple(range(5, 5 + drafts))))
    return Batch(tuple(segments))


def run(hosted: Hosted, batch: Batch, *, times: int = 1) -> torch.Tensor:
    """The logits, which are those of steps in Python every time."""
    runner, kept = hosted.runner, hosted.runner.graphs
    for _ in range(times):
        found, _ = runner.run(batch)
        runner.graphs = None
        expected, _ = runner.run(batch)
        runner.graphs = kept
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    return found


def replayed(hosted: Hosted, batch: Batch) -> int:
    """How many layers of one more step are replayed."""
    before = graphs_of(hosted).num_replayed
    run(hosted, batch)
    return graphs_of(hosted).num_replayed - before


PLAIN: tuple[Row, ...] = ((0, 5, ()), (2, 9, ()))


def test_a_kind_of_step_is_recorded_when_it_comes_again_and_then_replayed(llama: Hosted) -> None:
    assert [replayed(llama, batch_of(*PLAIN)) for _ in range(4)] == [0, 0, 3, 3]
    assert [replayed(llama, batch_of(*PLAIN, (1, 255, ()))) for _ in range(3)] == [0, 0, 3]
    assert replayed(llama, batch_of(*PLAIN, (1, 256, ()))) == 3, "a longer sequence"
    assert replayed(llama, batch_of((1, 0, ()), (0, 200, ()))) == 3, "other slots and positions, as many rows"


def test_drafts_are_rows_as_any_other(llama: Hosted) -> None:
    llama.add("a", adapter(llama, 1, 4))
    uses = (LoRARequest("a", 0.5),)
    run(llama, batch_of((0, 5, uses), (2, 9, ()), drafts=3), times=3)
    assert replayed(llama, batch_of((0, 25, uses), (2, 9, ()), drafts=3)) == 3
    assert replayed(llama, batch_of(*((slot, 6, uses) for slot in (0, 1)), drafts=3)) == 3


def test_adapters_that_were_not_there_when_it_was_recorded_and_ones_that_replace_others(llama: Hosted) -> None:
    llama.add("a", adapter(llama, 1, 4))
    run(llama, batch_of(*PLAIN), times=3)
    first = [run(llama, batch_of((0, 5, (LoRARequest(digest),)), (2, 9, ()))) for digest in "a"]
    for number in range(20):  # more than there was room for
        llama.add(str(number), adapter(llama, 10 + number, 1 + number))
    assert replayed(llama, batch_of(*((slot, 5, (LoRARequest(str(slot)),)) for slot in (0, 1)))) == 3
    llama.runner.remove_adapter("a")
    llama.add("other", adapter(llama, 99, 3))
    uses = (LoRARequest("other"),)
    assert replayed(llama, batch_of((0, 5, uses), (2, 9, ()))) == 3, "no module was wrapped or unwrapped"
    other = run(llama, batch_of((0, 5, uses), (2, 9, ())))
    assert not torch.equal(first[0][1], other[1]) and torch.equal(first[0][0], other[0]), "rows of the base are first"


def test_modules_that_are_wrapped_or_unwrapped_make_graphs_void(llama: Hosted) -> None:
    run(llama, batch_of(*PLAIN), times=3)
    llama.add("a", adapter(llama, 1, 4))
    assert [replayed(llama, batch_of(*PLAIN)) for _ in range(3)] == [0, 0, 3]
    llama.runner.remove_adapter("a")
    assert [replayed(llama, batch_of(*PLAIN)) for _ in range(3)] == [0, 0, 3]


def test_steps_with_other_than_plain_deltas_and_with_prompts_go_through_python(llama: Hosted) -> None:
    llama.add("dora", adapter(llama, 1, 4, dora=True))
    llama.add("norms", norms_of_its_own(llama))
    run(llama, batch_of(*PLAIN), times=3)
    for digest in ("dora", "norms"):
        assert replayed(llama, batch_of((0, 5, (LoRARequest(digest),)), (2, 9, ()))) == 0
    chunk = Sequence(7, prompts(40)[0], 20, SamplingParams())
    assert replayed(llama, Batch((Segment(chunk, 1, 0, 33),))) == 0
    assert replayed(llama, batch_of(*PLAIN)) == 3


def test_each_number_of_threads_has_graphs_of_its_own(llama: Hosted, restore_threads: None) -> None:
    """Scores of a second thread would lie behind what was reserved for one."""
    run(llama, batch_of(*PLAIN), times=3)
    torch.set_num_threads(2)
    assert [replayed(llama, batch_of(*PLAIN)) for _ in range(3)] == [0, 0, 3]
    torch.set_num_threads(1)
    assert replayed(llama, batch_of(*PLAIN)) == 3


def test_a_step_that_fails_while_it_is_recorded_leaves_nothing(llama: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    run(llama, batch_of(*PLAIN))
    attention = llama.model.get_submodule("model.layers.1.self_attn")
    with monkeypatch.context() as patch:
        patch.setattr(attention, "forward", lambda *given, **named: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                llama.runner.run(batch_of(*PLAIN))
            assert not llama.kernels.launch.is_recording
    chunk = Sequence(7, prompts(40)[0], 20, SamplingParams())
    run(llama, Batch((Segment(chunk, 1, 0, 33),)))
    assert replayed(llama, batch_of(*PLAIN)) in (0, 1, 3)
    assert replayed(llama, batch_of(*PLAIN)) == 3


def test_a_step_of_another_runner_on_the_same_base_is_not_replayed(llama: Hosted) -> None:
    """Its layers would be those of the runner that came last, whose step was another."""
    first, shapes = llama.runner, llama.runner.attention_backend.cache.layout.shapes
    backend = partial(cpu_attention, kernels=llama.kernels)
    run(llama, batch_of(*PLAIN), times=3)
    llama.runner = ModelRunner(
        llama.model,
        first.attention,
        shapes,
        backend,
        num_slots=3,
        max_len=LENGTH,
        kernels=llama.kernels,
        patches=llama.patches,
    )
    run(llama, batch_of(*PLAIN), times=3)
    assert graphs_of(llama).num_replayed > 0
    chunk = Sequence(7, prompts(40)[0], 20, SamplingParams())
    expected, _ = llama.runner.run(Batch((Segment(chunk, 1, 0, 3), *batch_of((0, 5, ())).segments)))
    llama.runner.run(batch_of(*PLAIN))
    before = graphs_of(llama).num_replayed
    found, _ = first.run(Batch((Segment(chunk, 1, 0, 3), *batch_of((0, 5, ())).segments)))
    assert torch.equal(found, expected)
    assert graphs_of(llama).num_replayed == before


def test_numbers_that_are_none_are_the_same_too(llama: Hosted) -> None:
    weights = adapter(llama, 1, 4)
    for delta in weights.deltas.values():
        assert delta.b is not None
        delta.b.fill_(torch.nan)
    llama.add("a", weights)
    batch = batch_of((0, 5, (LoRARequest("a"),)), (2, 9, ()))
    assert [replayed(llama, batch) for _ in range(3)] == [0, 0, 3]
    assert run(llama, batch)[1].isnan().any() and graphs_of(llama).problem is None


def test_a_step_too_large_for_the_arena_goes_through_python_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(layer_graphs, "_ARENA_BYTES", 32 << 10)
    caplog.set_level(logging.INFO, "quickchange.model")
    llama = hosted_as("llama")
    long = batch_of((0, 260, ()), (1, 5, ()), drafts=10)
    assert [replayed(llama, long) for _ in range(4)] == [0, 0, 0, 0]
    assert "layer graphs disabled for 22 rows: layer 0: it needs more than 32768 bytes" in caplog.text
    assert len(caplog.records) == 1
    assert [replayed(llama, batch_of((0, 5, ()))) for _ in range(3)] == [0, 0, 3]


def test_the_log_says_why_a_model_has_no_layer_graphs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quickchange.model")
    gpt2 = hosted_as("gpt2")
    assert [replayed(gpt2, batch_of(*PLAIN)) for _ in range(4)] == [0, 0, 0, 0]
    assert [record.message for record in caplog.records] == ["layer graphs disabled: layer 0: aten.layer_norm.default"]


def test_graphs_that_come_out_otherwise_are_not_replayed(llama: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerGraph, "replay", lambda self, inputs: torch.zeros_like(inputs[0]))
    assert [replayed(llama, batch_of(*PLAIN)) for _ in range(3)] == [0, 0, 0]
    assert graphs_of(llama).problem == "layer 0: replay gives another result"
