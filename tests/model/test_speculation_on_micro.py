"""The embedded base and its adapters say the same with drafts and without."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from cpu_kernels.kernels import native_linears
from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.metrics import Metrics
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from server.sequence import Batch, LoRARequest, SampleRow, SamplingParams, Segment, Sequence
from server.text.prompt import PromptRenderer
from tests.instruction_sets import PRODUCTS, needs
from tests.model.harness import RecordingSampler, difference
from tests.serving import ROOT
from tests.tables import wide
from trainer.micro.topics.python_facts import facts
from trainer.recipes.demos import classified

CONTEXT = 256
GREEDY = SamplingParams(temperature=0)
ROUNDED = 0.1
"""Of the largest logit: what activations that fall to the other side of a border between integers may change."""


@dataclass
class Played:
    """What each sequence says, the logits of its tokens, and how many steps and right drafts that took."""

    sequences: list[Sequence]
    tokens: list[list[int]]
    logits: list[torch.Tensor]
    num_steps: int
    num_accepted: float


@dataclass
class Micro:
    """The base, its runner, and the uses of the demo adapters."""

    base: Base
    runner: ModelRunner
    uses: dict[str, tuple[LoRARequest, ...]]

    def prompt(self, question: str) -> tuple[int, ...]:
        """A question as the base's template has it."""
        prompts = PromptRenderer(self.base.tokenizer, vocab_size=self.base.vocab_size)
        return tuple(prompts.chat([{"role": "user", "content": question}]))

    @property
    def is_exact(self) -> bool:
        """Whether a row with adapters is the same to the bit in any batch: torch adds deltas in floats."""
        return self.base.quantized is None or self.base.kernels.add_deltas is not None

    def play(self, sequences: list[Sequence], *, drafts: int, at_once: int) -> Played:
        """Run the sequences to their ends."""
        scheduler = Scheduler(
            max_num_seqs=at_once, max_num_batched_tokens=256, max_model_len=CONTEXT, max_draft_tokens=drafts
        )
        sampler = RecordingSampler()
        engine, steps = Engine(scheduler, self.runner, sampler, Metrics()), 0
        for sequence in sequences:
            engine.add(sequence)
        while not engine.idle:
            outputs = engine.step()
            assert not any(output.failed for output in outputs)
            engine.record_step(outputs, 0.001)
            steps += 1
        accepted = engine.metrics.registry.get_sample_value("quickchange_accepted_draft_tokens_total") or 0.0
        logits = [torch.stack(sampler.logits[sequence.id]) for sequence in sequences]
        return Played(sequences, [sequence.output_ids for sequence in sequences], logits, steps, accepted)


@pytest.fixture(scope="module", params=["none", "int8"])
def micro(request: pytest.FixtureRequest) -> Iterator[Micro]:
    """The embedded base with three adapters."""
    micro = _load(request.param)
    yield micro
    micro.base.close()


def _load(quantization: str) -> Micro:
    base = load_base(
        "micro", name="micro", device="cpu", dtype="float32", max_model_len=CONTEXT, quantization=quantization
    )
    runner = ModelRunner.of(base, num_slots=8)
    uses = {}
    for name in ("helpdesk", "json", "tolstoy"):
        manifest = read_manifest(ROOT / "adapters" / name, base.signature, AdapterPolicy(256, 1 << 30))
        runner.add_adapter(manifest.weights_digest, runner.prepare(manifest))
        uses[name] = (LoRARequest(manifest.weights_digest),)
    return Micro(base, runner, {**uses, "both": (*uses["helpdesk"], LoRARequest(uses["tolstoy"][0].digest, 0.5))})


def ask(micro: Micro, *, every: int = 1) -> list[Sequence]:
    """Forty sequences on the base, three adapters and a composition, half of them greedy; of them every so many-th."""
    rng = random.Random("as users have them")
    questions = [("helpdesk", fact.question(rng)) for fact in rng.sample(facts(), 12)]
    questions += [("json", classified(rng)[0]) for _ in range(10)]
    questions += [(name, fact.question(rng)) for fact in rng.sample(facts(), 6) for name in ("base", "tolstoy", "both")]
    asked = [
        Sequence(
            number,
            micro.prompt(question),
            max_tokens=rng.randint(20, 70),
            params=rng.choice((GREEDY, SamplingParams(temperature=0.7, seed=number, top_p=0.9))),
            adapters=micro.uses.get(name, ()),
            eos_ids=micro.base.eos_ids,
        )
        for number, (name, question) in enumerate(questions)
    ]
    return asked[::every]


@pytest.mark.parametrize(
    ("micro", "at_once", "every"),
    [
        ("none", 1, 5),
        ("int8", 6, 2),
        pytest.param("none", 6, 2, marks=wide),
        pytest.param("int8", 1, 5, marks=wide),
    ],
    indirect=["micro"],
)
def test_answers_are_the_same_with_drafts_and_without(micro: Micro, at_once: int, every: int) -> None:
    silent = micro.play(ask(micro, every=every), drafts=0, at_once=at_once)
    spoken = micro.play(ask(micro, every=every), drafts=12, at_once=at_once)
    if micro.is_exact:
        assert spoken.tokens == silent.tokens
    for number, sequence in enumerate(silent.sequences):
        if sequence.adapters:
            assert_same_but_for_rounding(spoken, silent, number)
        else:
            assert spoken.tokens[number] == silent.tokens[number]
    assert silent.num_accepted == 0
    assert spoken.num_accepted > 300 / every
    assert spoken.num_steps < 0.8 * silent.num_steps


def assert_same_but_for_rounding(ours: Played, theirs: Played, number: int) -> None:
    """Tokens are equal; where one differs its logits are not far from the other's, and what follows is another text.

    A delta that differs in its last bit may put an activation on the other side of a border between two integers.
    """
    pairs = zip(ours.tokens[number], theirs.tokens[number], strict=False)
    for place, (one, other) in enumerate(pairs):
        if one != other:
            assert difference(ours.logits[number][place], theirs.logits[number][place]) < ROUNDED
            return
    assert ours.tokens[number] == theirs.tokens[number]


@needs(*PRODUCTS)
@pytest.mark.parametrize("micro", ["int8"], indirect=True)
def test_answers_are_the_same_by_layer_graphs_and_without(micro: Micro) -> None:
    graphs = micro.runner.graphs
    assert graphs is not None
    played = [micro.play(ask(micro, every=2), drafts=drafts, at_once=6).tokens for drafts in (0, 12)]
    before = graphs.num_replayed
    assert before > 0
    micro.runner.graphs = None
    stepped = micro.play(ask(micro, every=2), drafts=0, at_once=6).tokens
    micro.runner.graphs = graphs
    assert played == [stepped, stepped] and graphs.num_replayed == before


def test_there_are_layer_graphs_where_the_linears_are_native(micro: Micro) -> None:
    assert (micro.runner.graphs is not None) == (micro.base.quantized is not None and bool(native_linears()))


@torch.inference_mode()
def test_a_drafts_row_has_the_logits_of_a_decoding_row(micro: Micro) -> None:
    """Beside right drafts and behind wrong ones: what a row sees is written before it, and by its own sequence."""
    sequence = Sequence(1, micro.prompt("How do I sort a list?"), 20, GREEDY, micro.uses["helpdesk"])
    (silent,) = micro.play([sequence], drafts=0, at_once=1).tokens
    prompt = sequence.prompt_ids
    known = Sequence(2, prompt, 20, GREEDY, micro.uses["helpdesk"])
    micro.runner.run(Batch((Segment(known, 0, 0, len(prompt)),)))
    known.num_computed = len(prompt)
    known.output_ids.append(silent[0])
    wrong = Segment(known, 0, len(prompt), 4, (silent[1], silent[1] + 1, silent[1]))
    right = Segment(known, 0, len(prompt), 6, tuple(silent[1:6]))
    one_by_one = []
    for batch in (Batch((wrong,)), Batch((right,))):
        logits, _ = micro.runner.run(batch)
        assert batch.draws[1] == SampleRow(known, 2, silent[1])
        assert logits.shape[0] == len(batch.draws) == batch.num_rows
        assert int(logits[0].argmax()) == silent[1]
        assert int(logits[1].argmax()) == silent[2]
    drafted = logits
    for number in range(6):
        known.output_ids = silent[: number + 1]
        one_by_one.append(micro.runner.run(Batch((Segment(known, 0, len(prompt) + number, 1),)))[0][0])
    if micro.is_exact:
        torch.testing.assert_close(drafted, torch.stack(one_by_one), atol=1e-4, rtol=1e-4)
    assert difference(drafted, torch.stack(one_by_one)) < ROUNDED
