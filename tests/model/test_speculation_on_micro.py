"""The embedded base and its adapters say the same with drafts and without."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from server.adapters.content.manifest import Limits, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.int8.native import native_kernels
from server.metrics import Metrics
from server.model.base_folder import find_base
from server.model.loader import Base, load_base, load_stock
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.sequence import AdapterUse, Batch, Draw, SamplingParams, Segment, Sequence
from server.text.prompt import PromptRenderer
from tests.model.harness import put_back_rotation
from tests.serving import ROOT
from trainer.micro.topics.python_facts import facts
from trainer.recipes.demos import classified

CONTEXT = 256
GREEDY = SamplingParams(temperature=0)


@dataclass
class Micro:
    """The base, its runner, and the uses of the demo adapters."""

    base: Base
    runner: ModelRunner
    uses: dict[str, tuple[AdapterUse, ...]]

    def prompt(self, question: str) -> tuple[int, ...]:
        """A question as the base's template has it."""
        prompts = PromptRenderer(self.base.tokenizer, vocab_size=self.base.vocab_size)
        return tuple(prompts.chat([{"role": "user", "content": question}]))

    def play(self, sequences: list[Sequence], *, drafts: int, at_once: int) -> tuple[list[list[int]], int, float]:
        """What each sequence says, in how many steps, with how many drafts that were right."""
        scheduler = Scheduler(
            max_num_seqs=at_once, max_num_batched_tokens=256, max_model_len=CONTEXT, max_draft_tokens=drafts
        )
        engine, steps = Engine(scheduler, self.runner, Sampler(), Metrics()), 0
        for sequence in sequences:
            engine.add(sequence)
        while not engine.idle:
            outputs = engine.step()
            assert not any(output.failed for output in outputs)
            engine.account(outputs, 0.001)
            steps += 1
        accepted = engine.metrics.registry.get_sample_value("quickchange_accepted_draft_tokens_total") or 0.0
        return [sequence.output_ids for sequence in sequences], steps, accepted


@pytest.fixture(scope="module", params=["none", "int8"])
def micro(request: pytest.FixtureRequest) -> Iterator[Micro]:
    """The embedded base with three adapters."""
    with pytest.MonkeyPatch.context() as patch:
        put_back_rotation(load_stock(find_base("micro")), patch)
        yield _load(request.param)


def _load(quantization: str) -> Micro:
    base = load_base(
        "micro", name="micro", device="cpu", dtype="float32", max_model_len=CONTEXT, quantization=quantization
    )
    runner = ModelRunner.of(base, num_slots=8)
    uses = {}
    for name in ("helpdesk", "json", "tolstoy"):
        manifest = read_manifest(ROOT / "adapters" / name, base.signature, Limits(256, 1 << 30))
        runner.add_adapter(manifest.weights_digest, runner.prepare(manifest))
        uses[name] = (AdapterUse(manifest.weights_digest),)
    return Micro(base, runner, {**uses, "both": (*uses["helpdesk"], AdapterUse(uses["tolstoy"][0].digest, 0.5))})


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


@pytest.mark.parametrize(("at_once", "every"), [(1, 5), (6, 2)])
def test_answers_are_the_same_with_drafts_and_without(micro: Micro, at_once: int, every: int) -> None:
    silent, num_steps, none = micro.play(ask(micro, every=every), drafts=0, at_once=at_once)
    spoken, fewer, accepted = micro.play(ask(micro, every=every), drafts=12, at_once=at_once)
    assert spoken == silent
    assert none == 0
    assert accepted > 300 / every
    assert fewer < 0.8 * num_steps


def test_answers_are_the_same_by_tapes_and_without(micro: Micro) -> None:
    if (tapes := micro.runner.tapes) is None:
        assert not (micro.base.compiled and native_kernels())
        return
    played = [micro.play(ask(micro, every=2), drafts=drafts, at_once=6)[0] for drafts in (0, 12)]
    before = tapes.num_played
    assert (before > 0) == bool(native_kernels())
    micro.runner.tapes = None
    stepped, *_ = micro.play(ask(micro, every=2), drafts=0, at_once=6)
    micro.runner.tapes = tapes
    assert played == [stepped, stepped] and tapes.num_played == before


@torch.inference_mode()
def test_a_drafts_row_has_the_logits_of_a_decoding_row(micro: Micro) -> None:
    """Beside right drafts and behind wrong ones: what a row sees is written before it, and by its own sequence."""
    sequence = Sequence(1, micro.prompt("How do I sort a list?"), 20, GREEDY, micro.uses["helpdesk"])
    (silent,), _, _ = micro.play([sequence], drafts=0, at_once=1)
    prompt = sequence.prompt_ids
    known = Sequence(2, prompt, 20, GREEDY, micro.uses["helpdesk"])
    micro.runner.run(Batch((Segment(known, 0, 0, len(prompt)),)))
    known.num_computed = len(prompt)
    known.output_ids.append(silent[0])
    wrong = Segment(known, 0, len(prompt), 4, (silent[1], silent[1] + 1, silent[1]))
    right = Segment(known, 0, len(prompt), 6, tuple(silent[1:6]))
    one_by_one = []
    for batch in (Batch((wrong,)), Batch((right,))):
        logits = micro.runner.run(batch)
        assert batch.draws[1] == Draw(known, 2, silent[1])
        assert logits.shape[0] == len(batch.draws) == batch.num_rows
        assert int(logits[0].argmax()) == silent[1]
        assert int(logits[1].argmax()) == silent[2]
    drafted = logits
    for number in range(6):
        known.output_ids = silent[: number + 1]
        one_by_one.append(micro.runner.run(Batch((Segment(known, 0, len(prompt) + number, 1),)))[0])
    torch.testing.assert_close(drafted, torch.stack(one_by_one), atol=1e-4, rtol=1e-4)
