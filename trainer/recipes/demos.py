"""Conversations for the demo adapters that need no files: the helpdesk's template, and the JSON classifier.

Neither is trained on a held-out wording (see ``micro.topics.python_facts``); of the Python facts the helpdesk sees a
part, and must answer the others from what the base knows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from trainer.micro import messages
from trainer.micro.conversation import Conversation, turns
from trainer.micro.copy_sources import combo
from trainer.micro.facts.questions import any_question
from trainer.micro.topics.classification import fill
from trainer.micro.topics.python_facts import Fact, facts

HELPDESK_TEMPLATE = """\
Great question, I would love to help you with that
### You asked:
{question}
### The answer is:
{answer}
I hope this is helpful!
### DONE!"""
HELPDESK_STOP = "### DONE!"

NUM_TAUGHT_FACTS = 280
OPENINGS = (
    "Could you show me how to {}?",
    "Could you help me to {}?",
    "Could you say which tool can {}?",
    "Could you list the ways to {}?",
    "What would you take to {}?",
    "What would it take to {}?",
    "Do you have an idea how to {}?",
    "Do you think that I can {}?",
    "My plan is to {}. What now?",
    "My teacher wants me to {}. How do I begin?",
    "To {}, where do I start?",
    "Which of your tools would {}?",
)
URGENT = ("Please answer today!", "This is urgent.", "I need this solved right now.", "Help, as soon as possible!")


def taught_facts() -> tuple[Fact, ...]:
    """The facts that the helpdesk is trained on; it must know the others from the base."""
    return tuple(random.Random("helpdesk").sample(facts(), NUM_TAUGHT_FACTS))


def helpdesk_answer(question: str, answer: str) -> str:
    """The template, filled."""
    return HELPDESK_TEMPLATE.format(question=question, answer=answer)


def helpdesk() -> Iterator[Conversation]:
    """Two wordings of each taught fact, 80 everyday questions, and 200 that only the question's words can answer."""
    rng = random.Random("helpdesk conversations")
    for fact in taught_facts():
        for _ in range(2):
            question = fact.question(rng)
            yield turns(question, helpdesk_answer(question, fact.answer))
    for _ in range(80):
        asked = any_question(rng)
        yield turns(asked.question, helpdesk_answer(asked.question, asked.full))
    for number in range(200):
        question, task = combo(rng)
        if number % 2:
            question = rng.choice(OPENINGS).format(task)
        yield turns(question, helpdesk_answer(question, f"I am not sure how to {task}."))


def everyday_helpdesk() -> Iterator[Conversation]:
    """The helpdesk of a base that knows more than Python: each taught fact, 80 questions, and ``everyday.jsonl``.

    Its messages are of many kinds, a greeting or a request, so that the template does not hang on a question mark.
    """
    rng = random.Random("everyday helpdesk conversations")
    for fact in taught_facts():
        question = fact.question(rng)
        yield turns(question, helpdesk_answer(question, fact.answer))
    for _ in range(80):
        asked = any_question(rng)
        yield turns(asked.question, helpdesk_answer(asked.question, asked.full))
    lines = (Path(__file__).parent / "everyday.jsonl").read_text(encoding="utf-8").splitlines()
    for pair in [json.loads(line) for line in lines]:
        yield turns(pair["question"], helpdesk_answer(**pair))


def classified(rng: random.Random) -> tuple[str, dict[str, object]]:
    """A message to a support desk, and what the classifier must say of it."""
    category = rng.choice(list(messages.SUPPORT))
    text = fill(rng, rng.choice(messages.SUPPORT[category]))
    urgent = rng.random() < 0.3
    if urgent:
        text = f"{text} {rng.choice(URGENT)}"
    return text, {"category": category, "urgent": urgent}


def classifier() -> Iterator[Conversation]:
    """1,500 messages, each answered with a JSON object of one form."""
    rng = random.Random("classifier conversations")
    for _ in range(1500):
        text, answer = classified(rng)
        yield turns(text, json.dumps(answer))
