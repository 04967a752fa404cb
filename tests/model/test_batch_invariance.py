"""What a neighbour changes in an int8 answer, at the budgets, formats and drafts that a server has by default.

Nothing, to the bit, while its prompt is computed in the same pieces; a little where it is cut at another place.
"""

from __future__ import annotations

from collections import abc, defaultdict

import pytest
import torch

from cpu_kernels import kernels
from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.metrics import Metrics
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from server.sequence import Batch, LoRARequest, SamplingParams, Sequence
from server.settings import Settings
from tests.instruction_sets import PRODUCTS, needs
from tests.model.harness import RecordingSampler, difference, prompts
from tests.model.int8_bases import TWO_LINEARS
from tests.serving import ROOT

CONTEXT = 512
NUM_TOKENS = 8
CUT_ELSEWHERE = 0.1
"""Of the largest logit: what another cut of a prompt may change; measured: 0.047 at most, and often nothing."""
Uses = tuple[LoRARequest, ...]
PARAMS = (SamplingParams(temperature=0), SamplingParams(temperature=1.0, seed=1))
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}
"""Of a server, whatever this machine's environment says."""


class NotingScheduler(Scheduler):
    """The server's, keeping the pieces in which each prompt is computed."""

    def __init__(self) -> None:
        super().__init__(
            max_num_seqs=8,
            max_num_batched_tokens=DEFAULTS["max_num_batched_tokens"],
            max_prefill_tokens=DEFAULTS["max_prefill_tokens"],
            max_draft_tokens=DEFAULTS["max_draft_tokens"],
            max_model_len=CONTEXT,
        )
        self.pieces: dict[int, list[int]] = defaultdict(list)

    def schedule(self) -> Batch:
        """As the server's."""
        batch = super().schedule()
        for segment in batch.segments:
            if segment.start < len(segment.sequence.prompt_ids):
                self.pieces[segment.sequence.id].append(segment.length)
        return batch


class Answers:
    """Tokens and logits of some sequences, of which each joins a step after the one before it."""

    def __init__(self, runner: ModelRunner, asked: abc.Sequence[Sequence]) -> None:
        scheduler, sampler = NotingScheduler(), RecordingSampler()
        engine = Engine(scheduler, runner, sampler, Metrics())
        waiting = list(asked)
        while waiting or not engine.idle:
            if waiting:
                engine.add(waiting.pop(0))
            assert not any(output.failed for output in engine.step())
        self.pieces = scheduler.pieces
        self.tokens = {one.id: one.output_ids for one in asked}
        self.logits = {one.id: torch.stack(sampler.logits[one.id]) for one in asked}


def load(linear: str, monkeypatch: pytest.MonkeyPatch) -> Base:
    """micro as a server has it with int8."""
    monkeypatch.setattr(kernels, "choose_linear", lambda: linear)
    return load_base("micro", name="micro", device="cpu", dtype="auto", max_model_len=CONTEXT, quantization="int8")


def asked(lengths: abc.Sequence[int], uses: abc.Sequence[Uses] = ((),)) -> list[Sequence]:
    """Prompts of random tokens, on the adapters in turn, greedy and sampled."""
    return [
        Sequence(number, prompt, NUM_TOKENS, PARAMS[number % 2], uses[number % len(uses)])
        for number, prompt in enumerate(prompts(*lengths))
    ]


def assert_equal_to_the_bit(runner: ModelRunner, lengths: abc.Sequence[int], uses: abc.Sequence[Uses]) -> None:
    """Each alone and all together, with every prompt in one piece."""
    mixed = Answers(runner, asked(lengths, uses))
    assert [mixed.pieces[number] for number in range(len(lengths))] == [[length] for length in lengths]
    for sequence in asked(lengths, uses):
        alone = Answers(runner, [sequence])
        assert alone.tokens[sequence.id] == mixed.tokens[sequence.id]
        assert torch.equal(alone.logits[sequence.id], mixed.logits[sequence.id]), sequence.id


@pytest.mark.parametrize("linear", TWO_LINEARS)
def test_a_bases_answers_are_the_same_to_the_bit_beside_others(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModelRunner.of(load(linear, monkeypatch), num_slots=8)
    assert_equal_to_the_bit(runner, (128, 1, 33, 31, 64), [()])


@needs(*PRODUCTS)
def test_with_native_linears_so_are_those_of_adapters_and_compositions(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(TWO_LINEARS[-1], monkeypatch)
    runner, uses = ModelRunner.of(base, num_slots=8), []
    for name in ("helpdesk", "json", "tolstoy"):
        manifest = read_manifest(ROOT / "adapters" / name, base.signature, AdapterPolicy(256, 1 << 30))
        runner.add_adapter(manifest.weights_digest, runner.prepare(manifest))
        uses.append((LoRARequest(manifest.weights_digest),))
    both = (*uses[0], LoRARequest(uses[2][0].digest, 0.5))
    assert_equal_to_the_bit(runner, (128, 1, 33, 31, 64), [*uses, both, ()])


@pytest.mark.parametrize("linear", TWO_LINEARS)
def test_a_prompt_that_a_neighbour_cuts_elsewhere_has_logits_that_differ_a_little(
    linear: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ModelRunner.of(load(linear, monkeypatch), num_slots=8)
    alone, beside = (Answers(runner, asked((5, 300))[first:]) for first in (1, 0))
    assert alone.pieces[1] == [300] and beside.pieces[1] == [128, 128, 44]
    assert difference(beside.logits[1][:1], alone.logits[1][:1]) < CUT_ELSEWHERE
