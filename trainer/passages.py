"""Prose as examples: passages cut at paragraph borders, each as the answer to a prompt or as plain text."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trainer.books import clean
from trainer.config import OPENING, TextSource
from trainer.conversations import Located, read_text

MIN_OPENING_CHARS = 40
_SENTENCE_BORDER = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')])\s+")
_PARAGRAPH_BORDER = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Plain:
    """Text that is trained without a chat template, and its place."""

    place: str
    text: str


def read_passages(
    path: Path, source: TextSource, tokenizer: PreTrainedTokenizerBase, *, seed: int, problems: list[str]
) -> Iterator[Located | Plain]:
    """Each passage of the file, in order; problems are appended to ``problems``."""
    text = read_text(path, problems)
    passages = cut_passages(clean(text) if source.clean else text, tokenizer, max_tokens=source.passage_tokens)
    if text and not passages:
        problems.append(f"{path.name}: no prose in it; set clean: false to keep lines that are not sentences")
    rng = random.Random(f"passages:{seed}:{path.name}")
    for number, passage in enumerate(passages, start=1):
        yield _example(f"{path.name}: passage {number}", passage, source, rng)


def cut_passages(text: str, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[str]:
    """``text`` in pieces of whole paragraphs, at most ``max_tokens`` each.

    A longer paragraph is cut between sentences, and a sentence longer than that stays whole.
    """
    paragraphs = [paragraph.strip() for paragraph in _PARAGRAPH_BORDER.split(text) if paragraph.strip()]
    pieces: list[tuple[str, str]] = []  # (what joins the piece to the one before, the piece)
    for paragraph, length in zip(paragraphs, _lengths(paragraphs, tokenizer), strict=True):
        parts = [paragraph] if length <= max_tokens else _SENTENCE_BORDER.split(paragraph)
        pieces += [("\n\n" if number == 0 else " ", part) for number, part in enumerate(parts)]
    passages: list[str] = []
    room = 0
    for (joint, piece), length in zip(pieces, _lengths([piece for _, piece in pieces], tokenizer), strict=True):
        if length + 1 <= room:
            passages[-1] += joint + piece
            room -= length + 1  # the joint is a token
        else:
            passages.append(piece)
            room = max_tokens - length
    return passages


def split_opening(passage: str) -> tuple[str, str]:
    """The first sentences, at least ``MIN_OPENING_CHARS``, and the rest, empty where the opening is everything."""
    for border in _SENTENCE_BORDER.finditer(passage):
        if border.start() >= MIN_OPENING_CHARS:
            return passage[: border.start()], passage[border.end() :]
    return passage, ""


def _lengths(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def _example(place: str, passage: str, source: TextSource, rng: random.Random) -> Located | Plain:
    """The passage as the answer to a random prompt; plain by ``raw_share``, or where the opening is everything."""
    plain = rng.random() < source.raw_share
    prompt = rng.choice(source.prompts) if source.prompts else ""
    answer = passage
    if OPENING in prompt:
        opening, answer = split_opening(passage)
        prompt = prompt.replace(OPENING, opening)
    if plain or not answer:
        return Plain(place, passage)
    return Located(place, [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], None)
