"""Held-out text of its author is clearly less surprising to a style adapter than to the base."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.serving import ROOT
from trainer.books import clean

BASE = ROOT / "micro_base"
NUM_WINDOWS, LENGTH = 40, 256
CLEARLY = 0.9
"""The adapter's perplexity as a share of the base's, at most."""


def held_out(data: Path, author: str) -> str:
    """Text that no training saw: a whole other book, or the end of the only one, which the recipe holds out."""
    if author == "shakespeare":
        plays = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
        return plays[-int(len(plays) * 0.028) :]
    book = {"tolstoy": "The-Kreutzer-Sonata-and-Other-Stories_689", "dostoevsky": "Poor-Folk_2302"}[author]
    return clean((data / "gutenberg" / f"{book}.txt").read_text(encoding="utf-8", errors="replace"))


@torch.inference_mode()
def perplexity(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Over windows spread through the text, each begun as a text of its own."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stride = max(1, (len(ids) - LENGTH) // NUM_WINDOWS)
    windows = torch.tensor([ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH, stride)][:NUM_WINDOWS])
    logits = model(input_ids=windows, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())
    return math.exp(float(loss))


@pytest.mark.parametrize("author", ["tolstoy", "dostoevsky", "shakespeare"])
def test_held_out_text_is_less_surprising(data: Path, author: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = held_out(data, author)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), ROOT / "adapters" / author
    ).eval()
    with model.disable_adapter():
        base = perplexity(model, tokenizer, text)
    own = perplexity(model, tokenizer, text)
    print(f"\n{author}: base {base:.1f}, adapter {own:.1f}, {own / base:.2f} of it")
    assert own < CLEARLY * base
