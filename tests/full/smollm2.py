"""SmolLM2 in our engine, with every logit that a token was chosen from, and what it is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.metrics import Metrics
from server.model.kv_cache import KVLayout
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from server.sequence import LoRARequest, SamplingParams, Sequence
from server.text.prompt import PromptRenderer
from tests.model.harness import RecordingSampler
from tests.serving import ROOT

MAX_LEN, NUM_SLOTS = 3072, 16
GREEDY = SamplingParams(temperature=0.0)
GREEDY_TOKENS = 24
Messages = list[dict[str, Any]]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


LICENCE = re.sub(r"\s+(?=\d)", " ", (ROOT / "LICENSE").read_text(encoding="utf-8"))
"""With one space before a digit: of several, transformers' tokenizer of a GGUF makes other tokens."""
CHATS: dict[str, Messages] = {
    "fruits": [user("List three fruits.")],
    "system prompt": [{"role": "system", "content": "You answer in one word."}, user("What is the capital of France?")],
    "turns": [
        user("My name is Ada, and I have two cats."),
        assistant("Nice to meet you, Ada! What are your cats called?"),
        user("Tom and Kitty. How many cats do I have?"),
    ],
    "Python": [user("Write a Python function that adds two numbers.")],
    "Russian": [user("Привет! Как тебя зовут?")],
    "Chinese": [user("你好，请介绍一下北京。")],
    "French": [user("Écris une phrase sur l'été à la mer.")],
    "emoji": [user("What do 🍎, 👩‍👩‍👧 and 🇮🇹 mean?")],
    "long": [user(f"{LICENCE}\n\nWhat is this text about?")],
}


@dataclass(frozen=True)
class Answer:
    """Token ids, and the logits each was chosen from, float32 [num_tokens, vocab]."""

    ids: list[int]
    logits: torch.Tensor
    num_cached: int


class SmolLM2:
    """The base as the server loads it, with adapters by name."""

    def __init__(self, path: Path, *, quantization: str = "none") -> None:
        self.base: Base = load_base(
            str(path), name="smollm2", device="cpu", dtype="float32", max_model_len=MAX_LEN, quantization=quantization
        )
        self.prompts = PromptRenderer(self.base.tokenizer, vocab_size=self.base.vocab_size)
        self._runner = ModelRunner.of(self.base, num_slots=NUM_SLOTS)
        self._layout = KVLayout(tuple(self.base.shapes), MAX_LEN, self.base.kv_dtype)
        self._digests: dict[str, str] = {}

    def add(self, folder: Path) -> None:
        """Put an adapter in, by its folder's name."""
        manifest = read_manifest(folder, self.base.signature, AdapterPolicy(256, 1 << 30))
        self._runner.add_adapter(manifest.weights_digest, self._runner.prepare(manifest))
        self._digests[folder.name] = manifest.weights_digest

    def engine(self, *, prefix_caching: bool = False, max_draft_tokens: int = 0) -> RecordingEngine:
        slots = SlotTable(NUM_SLOTS, max_len=MAX_LEN, bytes_of=self._layout.bytes_of, reuses=prefix_caching)
        scheduler = Scheduler(
            max_num_seqs=NUM_SLOTS,
            max_num_batched_tokens=512,
            max_model_len=MAX_LEN,
            max_draft_tokens=max_draft_tokens,
            slots=slots,
        )
        sampler = RecordingSampler()
        return RecordingEngine(Engine(scheduler, self._runner, sampler, Metrics()), sampler, self._digests)


@dataclass
class RecordingEngine:
    """Answers prompts greedily, all at once."""

    engine: Engine
    sampler: RecordingSampler
    digests: dict[str, str]
    num_asked: int = 0

    def answer(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        *,
        max_tokens: int,
        adapters: SequenceOf[str | None] | None = None,
        eos_ids: frozenset[int] = frozenset(),
    ) -> list[Answer]:
        sequences = []
        for prompt, adapter in zip(prompts, adapters or [None] * len(prompts), strict=True):
            uses = () if adapter is None else (LoRARequest(self.digests[adapter]),)
            sequence = Sequence(self.num_asked, tuple(prompt), max_tokens, GREEDY, uses, eos_ids)
            self.num_asked += 1
            self.engine.add(sequence)
            sequences.append(sequence)
        while not self.engine.idle:
            outputs = self.engine.step()
            assert not any(output.failed for output in outputs)
            self.engine.record_step(outputs, 0.001)
        self.engine.scheduler.check_integrity()
        return [
            Answer(sequence.output_ids, torch.stack(self.sampler.logits[sequence.id]), sequence.num_cached)
            for sequence in sequences
        ]

    @property
    def num_accepted(self) -> float:
        """Drafts that were right."""
        found = self.engine.metrics.registry.get_sample_value("quickchange_accepted_draft_tokens_total")
        return found or 0.0


def difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference as a share of the largest of ``others``."""
    return float((logits - others).abs().max() / others.abs().max())


def stock_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """The prompt as transformers makes it."""
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def generate(model: Any, prompt: SequenceOf[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy answer, and its logits [num_tokens, vocab]."""
    ids = torch.tensor([list(prompt)])
    done = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return done.sequences[0, len(prompt) :].tolist(), torch.cat(done.logits)
