"""What the embedded base says on a device: cases that tests/gpu runs on a GPU, and tests/model on the CPU.

Each case gives the greedy tokens of its sequences; on any device in float32 they are those of the CPU.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.metrics import Metrics
from server.model import loader
from server.model.attention.batched import BatchedAttention
from server.model.kv_cache import KVLayout
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from server.sequence import LoRARequest, SamplingParams, Sequence
from server.text.prompt import PromptRenderer
from tests.model.harness import RecordingSampler, margin
from tests.serving import ROOT

CONTEXT = 384
NUM_SLOTS = 12
LEAST_MARGIN = 1e-4
"""By how much of the largest logit the likeliest token stands above the next; devices differ by about 1e-6."""
GREEDY = SamplingParams(temperature=0)
ADAPTERS = ("helpdesk", "json", "tolstoy", "shakespeare")
QUESTIONS = (
    "What is the capital of France?",
    "How do I reset my password?",
    "Write a short story about a cat.",
    "The order arrived late and the box was broken.",
    "Tell me about the sea.",
    "Hello!",
)


@dataclass
class Micro:
    """The embedded base on a device, with adapters."""

    base: Base
    runner: ModelRunner
    uses: dict[str, tuple[LoRARequest, ...]]

    @classmethod
    def load(cls, device: str, dtype: str = "float32") -> Micro:
        """Load base and adapters."""
        base = load_base("micro", name="micro", device=device, dtype=dtype, max_model_len=CONTEXT)
        runner = ModelRunner.of(base, num_slots=NUM_SLOTS)
        uses: dict[str, tuple[LoRARequest, ...]] = {"base": ()}
        for name in ADAPTERS:
            manifest = read_manifest(ROOT / "adapters" / name, base.signature, AdapterPolicy(256, 1 << 30))
            runner.add_adapter(manifest.weights_digest, runner.prepare(manifest))
            uses[name] = (LoRARequest(manifest.weights_digest),)
        return cls(base, runner, uses)

    def prompt(self, question: str) -> tuple[int, ...]:
        """A question as the base's template has it."""
        prompts = PromptRenderer(self.base.tokenizer, vocab_size=self.base.vocab_size)
        return tuple(prompts.chat([{"role": "user", "content": question}]))

    def ask(self, asked: abc.Sequence[tuple[str, tuple[LoRARequest, ...]]], *, num_tokens: int = 9) -> list[Sequence]:
        """A sequence for each question on adapters, of unequal lengths."""
        return [
            Sequence(number, self.prompt(question), num_tokens + number % 5, GREEDY, uses, self.base.eos_ids)
            for number, (question, uses) in enumerate(asked)
        ]

    def play(
        self, sequences: abc.Sequence[Sequence], *, drafts: int = 0, reuses: bool = False, at_once: int = 5
    ) -> Answers:
        """Run sequences to their ends."""
        layout = KVLayout(tuple(self.base.shapes), CONTEXT, self.base.kv_dtype)
        slots = SlotTable(NUM_SLOTS, max_len=CONTEXT, bytes_of=layout.bytes_of, reuses=reuses)
        scheduler = Scheduler(
            max_num_seqs=at_once,
            max_num_batched_tokens=64,
            max_model_len=CONTEXT,
            slots=slots,
            max_draft_tokens=drafts,
        )
        sampler = RecordingSampler()
        engine = Engine(scheduler, self.runner, sampler, Metrics())
        for sequence in sequences:
            engine.add(sequence)
        while not engine.idle:
            outputs = engine.step()
            assert not any(output.failed for output in outputs)
            engine.record_step(outputs, 0.001)
        accepted = engine.metrics.registry.get_sample_value("quickchange_accepted_draft_tokens_total")
        logits = [torch.stack(sampler.logits[sequence.id]) for sequence in sequences]
        cached = [sequence.num_cached for sequence in sequences]
        return Answers([sequence.output_ids for sequence in sequences], logits, cached, accepted or 0.0)


@dataclass(frozen=True)
class Answers:
    """Each sequence's tokens, their logits, and how much of its prompt was there; how many drafts were right."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    num_cached: list[int]
    num_accepted: float

    @property
    def decided(self) -> bool:
        """Whether no two tokens were so near that another device may choose the other."""
        return min(map(margin, self.logits)) > LEAST_MARGIN


def on_the_base(micro: Micro) -> Answers:
    """Prompts in chunks beside rows that decode, in more sequences than run at once."""
    return micro.play(micro.ask([(question, ()) for question in QUESTIONS]), at_once=4)


def on_mixed_adapters(micro: Micro) -> Answers:
    """Base and adapters side by side, one, two or three sequences of each."""
    names = ["base", *ADAPTERS, "json", "helpdesk", "json"]
    return micro.play(micro.ask([(QUESTIONS[n % 6], micro.uses[name]) for n, name in enumerate(names)]), at_once=8)


def on_compositions(micro: Micro) -> Answers:
    """Two adapters on one row, and one at a weight, beside the base."""
    (tolstoy,), (shakespeare,) = micro.uses["tolstoy"], micro.uses["shakespeare"]
    half = LoRARequest(tolstoy.digest, 0.5)
    uses = ((half, shakespeare), (half,), (), (tolstoy, LoRARequest(shakespeare.digest, -0.3)))
    return micro.play(micro.ask([(QUESTIONS[n], mix) for n, mix in enumerate(uses)]))


def after_prefixes(micro: Micro) -> Answers:
    """A conversation that goes on, which takes its slot over, and others with the same beginning, which get copies."""
    question, uses = " ".join(QUESTIONS), micro.uses["tolstoy"]
    start = micro.ask([(question, uses)])[0]
    follow = micro.prompt(QUESTIONS[4])
    later = [
        Sequence(number, (*start.prompt_ids, *follow[:length]), 9, GREEDY, uses, micro.base.eos_ids)
        for number, length in enumerate((6, 9, len(follow)), start=1)
    ]
    answers = micro.play([start, *later], reuses=True)
    assert all(cached >= len(start.prompt_ids) - 1 for cached in answers.num_cached[1:])
    return answers


def with_drafts(micro: Micro) -> Answers:
    """Drafts that are right and drafts that are wrong."""
    sequences = micro.ask([(question, micro.uses["json"]) for question in QUESTIONS[:4]], num_tokens=30)
    answers = micro.play(sequences, drafts=8, at_once=2)
    assert answers.num_accepted > 10
    return answers


@contextmanager
def loaded(device: str, dtype: str = "float32", *, batched: bool = False) -> Iterator[Micro]:
    """The base for a while; ``batched``, on the CPU, with the attention of an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        if batched:
            patch.setattr(loader, "_device_and_attention", lambda device: (torch.device(device), BatchedAttention))
        micro = Micro.load(device, dtype)
        try:
            yield micro
        finally:
            micro.base.close()


CASES: abc.Sequence[Callable[[Micro], Answers]] = (
    on_the_base,
    on_mixed_adapters,
    on_compositions,
    after_prefixes,
    with_drafts,
)


def check(case: Callable[[Micro], Answers], cpu: Micro, other: Micro) -> None:
    """The other says what the CPU says."""
    expected = case(cpu)
    assert expected.decided, f"{case.__name__}: two tokens are too near each other: choose other questions"
    assert case(other).tokens == expected.tokens, case.__name__


def check_in_bfloat16(exact: Micro, rounded: Micro) -> None:
    """In bfloat16 every sequence is answered, and its first token's logits are near those of float32."""
    for case in (on_mixed_adapters, after_prefixes):
        truth, found = case(exact), case(rounded)
        for true, near in zip(truth.logits, found.logits, strict=True):
            assert near.isfinite().all()
            assert float((near[0].cpu() - true[0].cpu()).abs().max() / true[0].abs().max()) < 0.1
