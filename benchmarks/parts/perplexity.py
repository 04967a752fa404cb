"""How surprised a base is by texts, alone or with an adapter, and how it answers, as the engine computes it."""

from __future__ import annotations

import math
import random
from collections import abc
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.slots import SlotTable
from server.metrics import Metrics
from server.model.kv_cache import AttentionMetadata, AttentionSegment, KVLayout
from server.model.loader import Base
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.sequence import Batch, LoRARequest, SamplingParams, Segment, Sequence
from trainer.books import clean
from trainer.micro.conversation import Conversation
from trainer.micro.corpus import conversation
from trainer.recipes import demos

LENGTH = 256
"""Tokens of a window; each begins as a text of its own."""
ROOT = Path(__file__).parents[2]
_NUM_CONVERSATIONS = 400
_NEW = "text that no training drew"
"""Seed of the conversations: those of the base's training began from numbers."""

Windows = abc.Sequence[abc.Sequence[int]]


@dataclass(frozen=True)
class Comparison:
    """Of a base with another on the same text, over ``num_tokens`` places.

    The mean losses are in nats; ``divergence`` is the mean Kullback-Leibler divergence of this one's probabilities from
    the other's, in nats, far less a matter of luck than the losses; ``agreement`` is the share of places with the same
    likeliest token.
    """

    loss: float
    other_loss: float
    divergence: float
    agreement: float
    num_tokens: int

    @property
    def excess(self) -> float:
        """By what share this perplexity is above the other's; below it is negative."""
        return math.expm1(self.loss - self.other_loss)


class Reader:
    """A base that reads texts; keys and values are kept as ``kv_dtype``, by default as the server would.

    It answers ``num_slots`` prompts at a time.
    """

    def __init__(self, base: Base, *, kv_dtype: torch.dtype | None = None, num_slots: int = 1) -> None:
        self.base, self._num_slots = base, num_slots
        self._runner = ModelRunner(
            base.model,
            base.attention,
            base.shapes,
            base.attention_backend,
            num_slots=num_slots,
            max_len=LENGTH,
            kv_dtype=kv_dtype or base.kv_dtype,
            kernels=base.kernels,
        )

    def add(self, folder: Path) -> str:
        """Put an adapter in; what to call it here. Raises ``AdapterRejected``."""
        manifest = read_manifest(folder, self.base.signature, AdapterPolicy(256, 1 << 30))
        self._runner.add_adapter(manifest.weights_digest, self._runner.prepare(manifest))
        return manifest.weights_digest

    @torch.inference_mode()
    def logits(self, window: abc.Sequence[int], adapter: str | None = None) -> torch.Tensor:
        """Of every row, float32 [rows, vocabulary]."""
        runner, uses = self._runner, () if adapter is None else (LoRARequest(adapter),)
        metadata = AttentionMetadata.of((AttentionSegment(0, 0, len(window), 0),), self.base.model.device)
        sequence = Sequence(0, tuple(window), 1, SamplingParams(), uses)
        runner.attention_backend.begin(metadata)
        runner.bank.begin_sorted(Batch((Segment(sequence, 0, 0, len(window)),)))
        ids = torch.tensor([list(window)], device=self.base.model.device)
        output = runner.model(input_ids=ids, position_ids=metadata.positions[None], use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    def answers(self, prompts: Windows, *, max_tokens: int) -> list[list[int]]:
        """The greedy answer to each prompt, at most ``max_tokens`` and the end token; they are decoded together."""
        base = self.base
        layout = KVLayout(tuple(base.shapes), LENGTH, base.kv_dtype)
        scheduler = Scheduler(
            max_num_seqs=self._num_slots,
            max_num_batched_tokens=512,
            max_prefill_tokens=128,
            max_model_len=LENGTH,
            slots=SlotTable(self._num_slots, max_len=LENGTH, bytes_of=layout.bytes_of, reuses=False),
        )
        engine = Engine(scheduler, self._runner, Sampler(), Metrics())
        greedy = SamplingParams(temperature=0.0)
        sequences = [
            Sequence(number, tuple(prompt), min(max_tokens, LENGTH - len(prompt)), greedy, eos_ids=base.eos_ids)
            for number, prompt in enumerate(prompts)
        ]
        for sequence in sequences:
            engine.add(sequence)
        while not engine.idle:
            engine.record_step(engine.step(), 0.0)
        return [sequence.output_ids for sequence in sequences]


def compare(
    reader: Reader,
    other: Reader,
    windows: Windows,
    adapters: tuple[str | None, str | None] = (None, None),
    *,
    num_given: abc.Sequence[int] | None = None,
) -> Comparison:
    """Tokens of each window, by two readers, each with an adapter of its own or none.

    ``num_given`` tokens at the beginning of each window are read but not compared, by default the first.
    """
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for window, given in zip(windows, num_given or [1] * len(windows), strict=True):
        logits = reader.logits(window, adapters[0])[given - 1 : -1]
        other_logits = other.logits(window, adapters[1])[given - 1 : -1]
        p, q = other_logits.log_softmax(-1), logits.log_softmax(-1)
        targets = torch.tensor(window[given:])[:, None]
        same = (logits.argmax(-1) == other_logits.argmax(-1)).sum()
        values = [-q.gather(1, targets).sum(), -p.gather(1, targets).sum(), (p.exp() * (p - q)).sum(), same]
        sums += torch.stack([value.double() for value in values])
        count += len(targets)
    loss, other_loss, divergence, agreement = (sums / count).tolist()
    return Comparison(loss, other_loss, divergence, agreement, count)


def own_texts(tokenizer: PreTrainedTokenizerBase, *, num_windows: int) -> Mapping[str, Windows]:
    """Texts that come with the repository: new conversations of the kinds micro knows, and a licence it never read.

    A base without a chat template has no conversations.
    """
    licence = _cut(tokenizer, (ROOT / "LICENSE").read_text(encoding="utf-8"), num_windows=num_windows)
    if not tokenizer.chat_template:
        return {"licence": licence}
    return {"conversations": _chats(tokenizer, _conversations(), num_windows=num_windows), "licence": licence}


def adapter_texts(
    tokenizer: PreTrainedTokenizerBase, data: Path | None, *, num_windows: int
) -> Mapping[str, tuple[str, Windows]]:
    """For each demo adapter what its text is, and the text; those of authors only where ``data`` has their books.

    ``data`` has ``english``, ``gutenberg`` and ``tinyshakespeare``. Of books no training saw these.
    """
    found = {
        "helpdesk": ("its conversations", _chats(tokenizer, demos.helpdesk(), num_windows=num_windows)),
        "json": ("its conversations", _chats(tokenizer, demos.classifier(), num_windows=num_windows)),
    }
    if data is None:
        return found
    books = {
        "tolstoy": "The-Kreutzer-Sonata-and-Other-Stories_689.txt",
        "dostoevsky": "Poor-Folk_2302.txt",
    }
    for adapter, book in books.items():
        text = clean((data / "gutenberg" / book).read_text(encoding="utf-8", errors="replace"))
        found[adapter] = (Path(book).stem, _cut(tokenizer, text, num_windows=num_windows))
    plays = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    end = _cut(tokenizer, plays[-int(len(plays) * 0.028) :], num_windows=num_windows)
    return {**found, "shakespeare": ("the end of the plays, which its recipe holds out", end)}


def book(tokenizer: PreTrainedTokenizerBase, path: Path, *, num_windows: int) -> Windows:
    """The last part of a book, which the base's training holds out where the book is one of its own."""
    text = clean(path.read_text(encoding="utf-8", errors="replace"))
    return _cut(tokenizer, text[-int(len(text) * 0.02) :], num_windows=num_windows)


def _conversations() -> Iterator[Conversation]:
    source = random.Random(_NEW)
    while True:
        yield conversation(source)


def _chats(tokenizer: PreTrainedTokenizerBase, chats: Iterator[Conversation], *, num_windows: int) -> Windows:
    """Conversations that the base's template accepts: many refuse a system turn, or a tool call without content."""
    ids: list[int] = []
    for chat in islice(chats, _NUM_CONVERSATIONS):
        messages: Any = chat["messages"]
        with suppress(TemplateError):
            ids += _ids(tokenizer, str(tokenizer.apply_chat_template(messages, tokenize=False)))
        if len(ids) >= num_windows * LENGTH:
            break
    return _windows(ids, num_windows)


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, *, num_windows: int) -> Windows:
    return _windows(_ids(tokenizer, text), num_windows)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [int(token) for token in ids]


def _windows(ids: abc.Sequence[int], num_windows: int) -> Windows:
    """Spread through the text, as many as there are without overlap."""
    count = max(1, min(num_windows, len(ids) // LENGTH))
    stride = max(1, (len(ids) - LENGTH) // max(1, count - 1)) if count > 1 else 1
    return [ids[number * stride : number * stride + LENGTH] for number in range(count)]
