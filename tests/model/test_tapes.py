"""Decoding steps played from tapes give the very bits that Python gives, or they are not played."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.int8.kernels import choose_kernel
from server.int8.native import native_kernels
from server.lora.delta import Delta, with_parameters
from server.lora.weights import LoRAWeights
from server.metrics import Metrics
from server.model import tapes
from server.model.runner import ModelRunner
from server.model.tapes import Tapes
from server.native.passes import passes
from server.native.routine import Routine
from server.native.tape import Arena, NotTaped, Recorder, Tape, TooLarge, _Made
from server.sequence import AdapterUse, Batch, SamplingParams, Segment
from server.sequence import Sequence as Generation
from tests.model.families import FAMILIES, build_from
from tests.model.harness import GREEDY, Ask, Hosted, RecordingSampler, host, prompts
from tests.model.peft_cases import CONFIGS

pytestmark = pytest.mark.skipif(not native_kernels(), reason="without routines for products there are no tapes")
LENGTH = 288
"""Beyond 256 keys a head's scores take twice the room, and steps need other tapes."""

NOT_TAPED = {
    "gemma2": "soft-capped attention is torch's",
    "gemma3": "units are gated by GELU",
    "phi3": "gates and what they gate are one linear",
    "phi3_longrope": "as phi3",
    "gpt_oss": "experts, and attention with sinks",
    "qwen3_moe": "experts",
    "gpt2": "LayerNorm and GELU are torch's",
    "gpt_neox": "as gpt2",
}
"""Families whose layers do what a tape does not hold, and what it is."""

CONFIG = {**FAMILIES, "qwen3_moe": CONFIGS["qwen3_moe"]}


def hosted_as(name: str) -> Hosted:
    """A family in int8 with routines, whose sequences may be long."""
    config = copy.deepcopy(CONFIG[name])
    setattr(config, "n_positions" if name == "gpt2" else "max_position_embeddings", LENGTH)
    hosted = host(build_from(config), kernel=choose_kernel(), compiled=True, max_model_len=LENGTH, budget=64)
    hosted.max_num_seqs = hosted.runner.bank._max_seats
    return hosted


@pytest.fixture
def host_family(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Hosted]:
    """``hosted_as``; the rotation in the modelling code is put back afterwards."""

    def make(name: str) -> Hosted:
        code = sys.modules[type(build_from(CONFIG[name])).__module__]
        if hasattr(code, "apply_rotary_pos_emb"):
            monkeypatch.setattr(code, "apply_rotary_pos_emb", code.apply_rotary_pos_emb)
        return hosted_as(name)

    return make


@pytest.fixture
def llama(host_family: Callable[[str], Hosted]) -> Hosted:
    return host_family("llama")


def tapes_of(hosted: Hosted) -> Tapes:
    assert hosted.runner.tapes is not None
    return hosted.runner.tapes


def adapter(hosted: Hosted, seed: int, rank: int, *, every: int = 1, dora: bool = False) -> LoRAWeights:
    """Random deltas on every so many-th linear, the head among them."""
    generator, deltas = torch.Generator().manual_seed(seed), {}
    linears = {name: shape.size for name, shape in hosted.noted.modules.items() if shape.kind == "linear"}
    for name, (inside, outside) in list(linears.items())[seed % every :: every]:
        a = torch.randn(rank, inside, generator=generator).t() * inside**-0.5
        scale = torch.rand(outside, generator=generator) + 0.5 if dora else None
        deltas[name] = Delta("linear", a, torch.randn(rank, outside, generator=generator) * 0.2, scale)
    return LoRAWeights(deltas, 1.0)


def norms_of_its_own(hosted: Hosted) -> LoRAWeights:
    """An adapter that has its own norms, and plain deltas."""
    deltas = dict(adapter(hosted, 5, 3, every=2).deltas)
    for name, shape in hosted.noted.modules.items():
        if name.endswith("norm") and shape.kind == "rows":
            base = hosted.runner.bank.base_modules[name]
            own = {"weight": base.get_parameter("weight") * 0.8}
            deltas[name] = Delta("rows", own=with_parameters(base, own), own_names=("weight",), axis=shape.axis)
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
        adapters = tuple(AdapterUse(*use) for use in uses)
        self.engine.add(Generation(self.num_sequences, (*half, *half)[:length], num_tokens, GREEDY, adapters))
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


@pytest.mark.parametrize("threads", [1, 2], ids=["one_thread", "two_threads"])
@pytest.mark.parametrize("name", CONFIG)
def test_whatever_happens_logits_are_those_of_steps_in_python(
    name: str, threads: int, host_family: Callable[[str], Hosted], restore_threads: None
) -> None:
    torch.set_num_threads(threads)
    played, stepped = host_family(name), host_family(name)
    kept = tapes_of(played)
    stepped.runner.tapes = None
    found, expected = Play(played).through(), Play(stepped).through()
    assert (kept.num_played == 0) == (name in NOT_TAPED), kept.problem
    assert (kept.problem is not None) == (name in NOT_TAPED)
    assert len(found) == len(expected) == 12
    for number, logits in found.items():
        assert torch.equal(logits, expected[number]), number


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
