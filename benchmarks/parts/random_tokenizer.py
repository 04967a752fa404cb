"""A byte-level BPE tokenizer of any vocabulary size, trained on the standard library's own source."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
SPECIAL = (END, PAD, START)
MOST_LEARNT = 24_000
"""Entries that are learnt; the standard library's text has no more that are worth their time."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of exactly ``vocab_size`` entries, as transformers loads it, with a chat template.

    Entries beyond the learnt ones are plain words that no text becomes, so that a random model's tokens all have text.
    """
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size - len(SPECIAL), MOST_LEARNT),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    learnt.train_from_iterator(_texts(), trainer)
    content = json.loads(learnt.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"Ġspare{number}": number for number in range(len(vocabulary), vocab_size - len(SPECIAL))}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))


def _texts() -> Iterator[str]:
    """The modules at the top of the standard library, in the order of their names."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")
