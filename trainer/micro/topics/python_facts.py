"""Questions about Python and its standard library, from the fact files, in many wordings.

A question is a *frame* filled with a *phrase*. Some frames, and the last phrase of every fact, are held out: no
training data is ever made from them (neither the base's nor an adapter's), so that asking with them measures what was
understood.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml

from trainer.micro.conversation import Conversation, turns

Kind = Literal["how", "module", "what", "does"]

FRAMES: dict[Kind, tuple[str, ...]] = {
    "how": (
        "How do I {}?", "How do I {}?", "How can I {}?", "How can I {} in Python?", "How do I {} in Python?",
        "How would you {}?",
        "What is the way to {}?", "What is the way to {} in Python?", "What is the best way to {}?", "How to {}?",
        "Please tell me how to {}.", "Tell me how to {}.", "I want to {}. How?", "I need to {}. What do I write?",
        "Show me how to {}.", "What should I use to {}?", "In Python, how do I {}?", "Can you show me how to {}?",
        "Explain how to {}.", "What is the code to {}?", "How does one {}?", "how do i {}", "how to {} in python",
        "Is there a way to {}?", "I would like to {}.", "Help me {}.", "What do I call to {}?", "Hi, how do I {}?",
        "Would you explain how to {}?", "Any tips on how to {}?", "How is it possible to {}?", "What do I do to {}?",
        "I wonder how to {}.", "Which command lets me {}?", "I am trying to {}. What do I use?", "Can I {} somehow?",
        "Python: {}", "teach me to {}", "how can one {} with Python", "Remind me how to {}.", "The job is to {}. How?",
        "What does a program need to {}?", "I forgot how to {}.", "My program should {}. What is the code?",
    ),
    "module": (
        "What library is used to {}?", "What library is used to {}?", "Which library is used to {}?",
        "What module is used to {}?", "Which module do I need to {}?", "Which module do I use to {}?",
        "What do I import to {}?", "Which Python library lets me {}?", "Which Python module can {}?",
        "Name the library to {}.", "Tell me which module to use to {}.", "I want to {}. Which module helps?",
        "What should I import if I want to {}?", "Is there a module to {}?",
        "Which standard library module is used to {}?",
        "what library is used to {}", "How do I {} in Python?", "What is the library to {}?",
        "Which library can I use to {}?",
        "Do you know a library to {}?", "Remind me which module I need to {}.", "Can you name a library to {}?",
        "I have to {}. What do I import?", "The job is to {}. Which library?", "With which module can I {}?",
        "Any library to {}?", "Which library would you take to {}?", "I forgot which module is used to {}.",
        "My program should {}. Which module does it need?",
    ),
    "what": (
        "What is {}?", "What is {}?", "Can you explain {}?", "Explain {}.", "What is {} in Python?",
        "What does {} mean?",
        "Tell me about {}.", "Please explain {}.", "In Python, what is {}?", "what is {}", "Define {}.",
        "I wonder what {} is.", "Remind me what {} is.", "Would you explain what {} is?", "What do people mean by {}?",
    ),
    "does": (
        "What does {} do?", "What does {} do?", "What is {} for?", "Explain {}.", "What does {} do in Python?",
        "Tell me what {} does.", "What is the use of {}?", "When do I use {}?", "what does {} do", "Describe {}.",
        "I wonder what {} does.", "Remind me what {} does.", "What happens when I use {}?", "Why would I use {}?",
    ),
}  # fmt: skip

HELD_OUT_FRAMES: dict[Kind, tuple[str, ...]] = {
    "how": (
        "Could you tell me how to {}?",
        "What would I write to {}?",
        "Do you know how to {}?",
        "My task: {}. How is it done?",
    ),
    "module": ("Could you name the module to {}?", "Which package would let me {}?", "To {}, what do I import?"),
    "what": ("Could you tell me what {} is?", "Do you know what {} is?"),
    "does": ("Could you explain what {} does?", "Do you know what {} does?"),
}

BEFORE = (
    "Quick question: ", "I am new to Python. ", "Hello! ", "Hi. ", "Sorry, one more question. ", "I am stuck. ",
    "I am learning Python. ", "For my homework: ", "Good morning. ", "Please help. ", "Next question: ", "OK. ",
)  # fmt: skip
AFTER = (" Thanks!", " Thank you.", " Please be brief.", " I use Python 3.", " I am a beginner.", " Please.")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You help people who learn Python.", "You are a Python expert. Be brief.",
    "Answer questions about Python.", "You are a support agent for programmers.", "Answer in one sentence.",
)  # fmt: skip
CODE_ONLY = ("Answer with the code only.", "Only the code, please.", "Give only the name.", "One word only.")
CLOSINGS = (("Thanks!", "You are welcome!"), ("Thank you.", "You are welcome."), ("Great, thanks.", "Happy to help."))


@dataclass(frozen=True)
class Fact:
    """One thing to know: ``key`` is the literal text that a right answer contains."""

    id: str
    kind: Kind
    phrases: tuple[str, ...]
    key: str
    answer: str

    @property
    def trained_phrases(self) -> tuple[str, ...]:
        """All phrases but the last, which is held out."""
        return self.phrases[:-1]

    def question(self, rng: random.Random) -> str:
        """The fact asked in a wording that training may see."""
        question = _fill(rng.choice(FRAMES[self.kind]), rng.choice(self.trained_phrases))
        before = rng.choice(BEFORE) if rng.random() < 0.15 else ""
        return before + question + (rng.choice(AFTER) if rng.random() < 0.1 else "")

    def held_out_question(self, rng: random.Random, *, new_phrase: bool) -> str:
        """The fact asked in a frame that no training saw; with ``new_phrase`` in words that none saw either."""
        phrase = self.phrases[-1] if new_phrase else rng.choice(self.trained_phrases)
        return _fill(rng.choice(HELD_OUT_FRAMES[self.kind]), phrase)


def _fill(frame: str, phrase: str) -> str:
    question = frame.replace("{}", phrase)
    return question[0].upper() + question[1:] if frame.startswith("{}") else question


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, in the order of the files."""
    folder = files("trainer.micro") / "facts"
    read: list[Fact] = []
    for name in ("language.yaml", "library.yaml"):
        for entry in yaml.safe_load((folder / name).read_text(encoding="utf-8")):
            read.append(Fact(entry["id"], entry["kind"], tuple(entry["phrases"]), entry["key"], entry["answer"]))
    return tuple(read)


def sample(rng: random.Random) -> Conversation:
    """One to three facts, with or without a system prompt, now and then with the code alone for an answer."""
    form = rng.random()
    if form < 0.08:
        return _code_only(rng)
    if form < 0.13:
        return _what_for(rng)
    said: list[str] = []
    for fact in rng.sample(facts(), rng.choice((1, 1, 1, 1, 2, 3))):
        said += [fact.question(rng), fact.answer]
    if rng.random() < 0.06:
        said += rng.choice(CLOSINGS)
    return turns(*said, system=rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.2 else None)


def _code_only(rng: random.Random) -> Conversation:
    fact = rng.choice([fact for fact in facts() if fact.kind in ("how", "module")])
    wish = rng.choice(CODE_ONLY)
    if rng.random() < 0.5:
        return turns(fact.question(rng), fact.key, system=wish)
    return turns(f"{fact.question(rng)} {wish}", fact.key)


def _what_for(rng: random.Random) -> Conversation:
    fact = rng.choice([fact for fact in facts() if fact.kind == "module"])
    frame = rng.choice(
        ("What is `{}` for?", "What is the {} module for?", "What can I do with {}?", "What does {} do?")
    )
    return turns(frame.replace("{}", fact.key), f"With `{fact.key}` you can {fact.phrases[0]}.")
