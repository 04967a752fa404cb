"""The model card of ``micro``: what it was trained on, its loss curve, what it can and cannot do, conversations.

python -m trainer.micro.card --run runs/micro --base micro_base --books FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer import books
from trainer.micro.corpus import TOPICS
from trainer.micro.pretrain import PretrainConfig
from trainer.micro.topics.python_facts import facts

SAMPLES = (
    (None, "Hello! Who are you?"),
    (None, "How do I lower-case a string?"),
    (None, "What library is used to connect to an IMAP server?"),
    (None, "What is the capital of France?"),
    (None, "Tell me a short story about a fox and a lamp."),
    (None, "List three fruits, numbered."),
    (None, "What is 7 + 8?"),
    (None, "What is 487 + 396?"),
    (None, "Give me a JSON object with the name Anna and the age 31."),
    ("Answer in capital letters.", "What colour is the sky?"),
    (None, "Who won the football world cup in 2014?"),
)  # fmt: skip

CARD = """\
# micro

A chat model of {parameters:.1f} million parameters, trained from scratch by this project so that server, trainer and tests have
a base that comes with them. It speaks simple English, ends its turns, follows a few instructions, and knows {facts} facts of
Python. Beyond what it was shown it guesses, fluently and wrongly.

| | |
|---|---|
| architecture | Llama's: {layers} layers, hidden size {hidden}, {heads} query heads on {kv_heads} key-value heads, embeddings tied |
| tokenizer | byte-level BPE of {vocab} tokens, digits one by one; tokens for turns, tool calls, thinking, and {spare} spare ones |
| context | 2,048 tokens (rows of 256 mostly, every tenth step of 1,024 or 2,048) |
| training | {steps} steps of {tokens_per_step} tokens, {tokens:.1f}M tokens in all, bf16 autocast on two CPU cores, {hours:.1f} hours |
| prose | {books} public-domain books, {book_chars:.1f}M characters, about a quarter of the tokens |
| conversations | written by `trainer/micro/topics`: {topics} |
| held-out prose | loss {held_out:.2f} nats a token |

{note}

No Russian literature and no Shakespeare is in it: those are for adapters. Nobody's data is in it: every conversation was written by
this repository's generators. Licence: Apache-2.0.

![Loss over the steps of training](loss.png)

## What it can and cannot do

Asked facts of Python, greedy, {asked} questions each; an answer is right when it holds the fact's key:

| wording | right |
|---|---|
| as in training | {seen:.0%} |
| in a frame of words never trained | {new_frame:.0%} |
| in a frame and a phrase never trained | {new_phrase:.0%} |

Asked to repeat such a question word for word, it does so in {copied:.0%} of {asked} cases.

Arithmetic even of small numbers, lists that do not repeat themselves, a system prompt that changes its manner, knowledge beyond
its facts, reasoning in steps, other languages: no, or not to be relied on. It may be used to learn, to test, and to carry
adapters; not for advice.

## Conversations

Greedy, as they came.

{samples}
"""


@dataclass(frozen=True)
class Micro:
    """The finished base."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @torch.inference_mode()
    def answers(self, conversations: list[list[dict[str, str]]], max_tokens: int) -> list[str]:
        """Greedy answers, a batch at a time, padded on the left."""
        self.tokenizer.padding_side = "left"
        answers: list[str] = []
        for start in range(0, len(conversations), 50):
            texts = self.tokenizer.apply_chat_template(
                conversations[start : start + 50], add_generation_prompt=True, tokenize=False
            )
            batch = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            output = cast(Any, self.model).generate(**batch, max_new_tokens=max_tokens, do_sample=False)
            answers += self.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    def share_right(self, wording: str, num_questions: int) -> float:
        """How many of so many questions, of one wording, are answered with their fact's key."""
        rng = random.Random(f"card:{wording}")
        asked = rng.sample(facts(), num_questions)
        if wording == "seen":
            questions = [fact.question(rng) for fact in asked]
        else:
            questions = [fact.held_out_question(rng, new_phrase=wording == "new_phrase") for fact in asked]
        answers = self.answers([[{"role": "user", "content": question}] for question in questions], 48)
        return sum(fact.key in answer for fact, answer in zip(asked, answers, strict=True)) / num_questions

    def share_copied(self, num_questions: int) -> float:
        """How many of so many questions are repeated word for word when asked to."""
        rng = random.Random("card:copied")
        questions = [fact.held_out_question(rng, new_phrase=False) for fact in rng.sample(facts(), num_questions)]
        asked = [[{"role": "user", "content": f"Repeat after me: {question}"}] for question in questions]
        answers = self.answers(asked, 60)
        return sum(answer == question for answer, question in zip(answers, questions, strict=True)) / num_questions


def write_card(run: Path, base: Path, books_folder: Path, note: str) -> None:
    """Measure, and write ``README.md`` and ``loss.png`` into the base's folder."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    log = list({line["step"]: line for line in lines}.values())
    plot(log, base / "loss.png")
    micro = Micro(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(base)
    )
    prose = [text for _, text in books.read_folder(books_folder)]
    asked = 300
    steps = torch.load(run / "checkpoint.pt", weights_only=True, mmap=True)["step"]
    tokens_per_step = PretrainConfig.tokens_per_step
    config = micro.model.config
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in micro.model.parameters()) / 1e6,
        facts=len(facts()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        spare=64,
        steps=steps,
        tokens_per_step=tokens_per_step,
        tokens=steps * tokens_per_step / 1e6,
        hours=sum(20 * tokens_per_step / line["tokens_per_s"] for line in log) / 3600,
        books=len(prose),
        book_chars=sum(map(len, prose)) / 1e6,
        topics=", ".join(module.__name__.rpartition(".")[2].replace("_", " ") for module in TOPICS),
        held_out=next(line["held_out_loss"] for line in reversed(log) if "held_out_loss" in line),
        asked=asked,
        seen=micro.share_right("seen", asked),
        new_frame=micro.share_right("new_frame", asked),
        new_phrase=micro.share_right("new_phrase", asked),
        copied=micro.share_copied(asked),
        note=note,
        samples=_conversations(micro),
    )
    (base / "README.md").write_text(card, encoding="utf-8")


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss over steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot([line["step"] for line in log], [line["loss"] for line in log], linewidth=1, label="training mixture")
    held = [line for line in log if "held_out_loss" in line]
    axes.plot([line["step"] for line in held], [line["held_out_loss"] for line in held], "o-", label="held-out prose")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _conversations(micro: Micro) -> str:
    asked = [
        [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]
        for system, question in SAMPLES
    ]
    shown = []
    for conversation, answer in zip(asked, micro.answers(asked, 160), strict=True):
        said = [f"> **{turn['role']}**: {turn['content']}" for turn in conversation]
        shown.append("\n>\n".join([*said, "> **micro**: " + answer.strip().replace("\n", "\n> ")]))
    return "\n\n".join(shown)


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, for its log")
    parser.add_argument("--base", type=Path, required=True, help="the exported base")
    parser.add_argument("--books", type=Path, required=True, help="the books it was trained on")
    parser.add_argument("--note", default="", help="a sentence about the run, for the card")
    options = parser.parse_args()
    write_card(options.run, options.base, options.books, options.note)


if __name__ == "__main__":
    main()
