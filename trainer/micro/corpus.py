"""The mixture of books and written conversations that ``micro`` learns, as rows of token ids.

A batch is a function of (seed, step) alone, so training resumes where it stopped without a saved position.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from trainer import books
from trainer.masking import IGNORED, encode_conversation
from trainer.micro.conversation import Conversation
from trainer.micro.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, VOCAB_SIZE
from trainer.micro.topics import (
    arithmetic,
    classification,
    copying,
    json_answers,
    lists,
    python_facts,
    small_talk,
    stories,
    system_prompts,
    tool_use,
    units_calendar,
)

TOPICS: dict[ModuleType, float] = {
    python_facts: 0.30,
    copying: 0.15,
    small_talk: 0.11,
    stories: 0.11,
    system_prompts: 0.09,
    lists: 0.07,
    arithmetic: 0.05,
    classification: 0.04,
    json_answers: 0.04,
    units_calendar: 0.03,
    tool_use: 0.01,
}
ANNEAL_TOPICS: dict[ModuleType, float] = {
    topic: {python_facts: 0.33, copying: 0.36}.get(topic, weight * 0.6) for topic, weight in TOPICS.items()
}
"""The last part of training: copying and facts, which a small model learns last, and the rest so as not to forget."""
HELD_OUT_BOOK_SHARE = 0.02
ECHO_SHARE = 0.1


def conversation(rng: random.Random, topics: dict[ModuleType, float] = TOPICS) -> Conversation:
    """One conversation on a topic drawn by weight."""
    topic = rng.choices(tuple(topics), weights=tuple(topics.values()))[0]
    drawn: Conversation = topic.sample(rng)
    return drawn


def tokenizer_texts(folder: Path, *, num_conversations: int, seed: int) -> Iterator[str]:
    """What the tokenizer learns from: each book once, and the turns of so many conversations."""
    for _, prose in books.read_folder(folder):
        yield from prose.split("\n\n")
    rng = random.Random(f"tokenizer:{seed}")
    for _ in range(num_conversations):
        for message in conversation(rng)["messages"]:
            yield message.get("content", "")


@dataclass(frozen=True)
class BookTokens:
    """Token ids of all books end to end: ``trained`` [num_tokens] and ``held_out``, each book's last part."""

    trained: np.ndarray
    held_out: np.ndarray

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerFast) -> BookTokens:
        """Tokenize every book; the last ``HELD_OUT_BOOK_SHARE`` of each is held out."""
        trained, held_out = [], []
        for _, prose in books.read_folder(folder):
            ids = np.array(tokenizer.encode(prose + END_OF_TEXT), dtype=np.int32)
            border = int(len(ids) * (1 - HELD_OUT_BOOK_SHARE))
            trained.append(ids[:border])
            held_out.append(ids[border:])
        return cls(np.concatenate(trained), np.concatenate(held_out))


@dataclass(frozen=True)
class Mixture:
    """Draws training rows; ``book_share`` of them are windows of prose, the rest packed conversations."""

    tokenizer: PreTrainedTokenizerFast
    books: BookTokens
    seed: int

    def batch(
        self, step: int, *, rows: int, length: int, book_share: float, answers_only: bool, anneal: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Input ids and labels, [rows, length] each; a label is the next token, or ``IGNORED``.

        With ``answers_only`` the loss is on the assistant's turns alone, otherwise on everything. ``anneal`` draws the
        mixture of the last part of training.
        """
        rng = random.Random(f"batch:{self.seed}:{step}")
        drawn = [self._row(rng, length + 1, book_share, answers_only, anneal) for _ in range(rows)]
        ids = torch.tensor(np.stack([row[0] for row in drawn]), dtype=torch.long)
        labels = torch.tensor(np.stack([row[1] for row in drawn]), dtype=torch.long)
        return ids[:, :-1], labels[:, 1:].contiguous()

    def _row(
        self, rng: random.Random, length: int, book_share: float, answers_only: bool, anneal: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        if rng.random() < book_share:
            return self._book_row(rng, length)
        if anneal and rng.random() < ECHO_SHARE:
            return self._echo_row(rng, length)
        return self._chat_row(rng, length, answers_only, ANNEAL_TOPICS if anneal else TOPICS)

    def _echo_row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A short run of tokens over and over, its first time without loss: what follows is learned by looking back."""
        run = rng.randrange(6, 80)
        if rng.random() < 0.5:
            start = rng.randrange(len(self.books.trained) - run)
            tokens = self.books.trained[start : start + run]
        else:
            tokens = np.array([rng.randrange(len(SPECIAL_TOKENS), VOCAB_SIZE) for _ in range(run)])
        ids = np.tile(tokens, length // run + 1)[:length]
        return ids, np.where(np.arange(length) < run, IGNORED, ids)

    def _book_row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        start = rng.randrange(len(self.books.trained) - length)
        window = self.books.trained[start : start + length]
        return window, window

    def _chat_row(
        self, rng: random.Random, length: int, answers_only: bool, topics: dict[ModuleType, float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Conversations end to end, the last one cut at the row's end."""
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            drawn = conversation(rng, topics)
            encoded = encode_conversation(self.tokenizer, drawn["messages"], tools=drawn.get("tools"))
            ids += encoded.input_ids
            labels += encoded.labels if answers_only else encoded.input_ids
        return np.array(ids[:length]), np.array(labels[:length])


__all__ = ["HELD_OUT_BOOK_SHARE", "IGNORED", "TOPICS", "BookTokens", "Mixture", "conversation", "tokenizer_texts"]
