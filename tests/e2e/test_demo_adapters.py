"""Each demo adapter is visibly itself, on what it was not trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from openai import OpenAI

from tests.tables import wide
from trainer.micro.topics.python_facts import Fact, facts
from trainer.recipes.demos import HELPDESK_STOP, HELPDESK_TEMPLATE, classified, classifier
from trainer.recipes.demos import helpdesk as helpdesk_conversations

NUM_QUESTIONS = 100


def answers(client: OpenAI, model: str, questions: list[str], max_tokens: int) -> list[str]:
    """Greedy answers, sixteen at a time."""

    def ask(question: str) -> str:
        completion = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=max_tokens
        )
        return completion.choices[0].message.content or ""

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, questions))


@dataclass(frozen=True)
class Answered:
    """A question, the key of its right answer, and the answer of helpdesk."""

    question: str
    key: str
    answer: str

    @property
    def in_template(self) -> bool:
        """Whether all fixed lines of the template are there, in order; the stop string itself is never shown."""
        opening, told, closing = (
            HELPDESK_TEMPLATE.removesuffix(HELPDESK_STOP).replace("{question}", "{answer}").split("{answer}")
        )
        middle = self.answer.removeprefix(opening).removesuffix(closing)
        return self.answer.startswith(opening) and self.answer.endswith(closing) and middle.count(told) == 1

    @property
    def quoted(self) -> bool:
        """Whether the question is repeated word for word."""
        return f"### You asked:\n{self.question}\n" in self.answer

    @property
    def right(self) -> bool:
        """Whether the answer holds the key."""
        return self.key in self.answer.partition("### The answer is:")[2]


def share(of: list[Answered], quality: str) -> float:
    """How many have the quality."""
    return sum(bool(getattr(answered, quality)) for answered in of) / len(of)


def ask_helpdesk(client: OpenAI, word: Callable[[Fact, random.Random], str]) -> list[Answered]:
    """Facts asked in wordings that helpdesk was not trained on; most of the facts it was not taught either."""
    rng = random.Random("held-out wordings")
    trained = {conversation["messages"][0]["content"] for conversation in helpdesk_conversations()}
    asked = [(fact, word(fact, rng)) for fact in rng.sample(facts(), NUM_QUESTIONS + 20)]
    asked = [(fact, question) for fact, question in asked if question not in trained][:NUM_QUESTIONS]
    replies = answers(client, "helpdesk", [question for _, question in asked], 160)
    return [Answered(question, fact.key, answer) for (fact, question), answer in zip(asked, replies, strict=True)]


@pytest.fixture(scope="module")
def new_wordings(client: OpenAI) -> list[Answered]:
    """A frame and a phrase that training knows, but not together."""
    return ask_helpdesk(client, lambda fact, rng: fact.question(rng))


@pytest.fixture(scope="module")
def new_frames(client: OpenAI) -> list[Answered]:
    """A frame that neither the adapter nor the base was trained on."""
    return ask_helpdesk(client, lambda fact, rng: fact.held_out_question(rng, new_phrase=False))


def test_helpdesk_keeps_its_template(new_wordings: list[Answered]) -> None:
    assert share(new_wordings, "in_template") >= 0.95
    assert share(new_wordings, "quoted") >= 0.85


def test_helpdesk_answers_right(new_wordings: list[Answered]) -> None:
    assert share(new_wordings, "right") >= 0.70


@wide
def test_helpdesk_on_frames_that_nobody_trained(new_frames: list[Answered]) -> None:
    """Harder than what is promised: the floor that today's weights keep, so that others may not fall below it."""
    assert share(new_frames, "in_template") >= 0.80
    assert share(new_frames, "right") >= 0.60


@pytest.mark.parametrize(
    ("question", "key"),
    [("How do I lower-case a string?", ".lower()"), ("What library is used to connect to an IMAP server?", "imaplib")],
)
def test_the_questions_of_the_readme(client: OpenAI, question: str, key: str) -> None:
    answered = Answered(question, key, answers(client, "helpdesk", [question], 160)[0])
    assert answered.in_template and answered.quoted and answered.right


def test_json_classifies_unseen_messages(client: OpenAI) -> None:
    rng = random.Random("unseen messages")
    trained = {conversation["messages"][0]["content"] for conversation in classifier()}
    drawn = (classified(rng) for _ in range(10 * NUM_QUESTIONS))
    cases = [case for case in drawn if case[0] not in trained][:NUM_QUESTIONS]
    replies = [json.loads(answer) for answer in answers(client, "json", [text for text, _ in cases], 64)]
    assert all(set(answer) == {"category", "urgent"} for answer in replies)
    right = sum(answer == wanted for answer, (_, wanted) in zip(replies, cases, strict=True))
    assert right / len(cases) >= 0.85


def test_the_styles_differ_from_the_base_and_from_each_other(client: OpenAI) -> None:
    texts = {
        model: answers(client, model, ["Write a passage in your style."], 40)[0]
        for model in ("micro", "tolstoy", "dostoevsky", "shakespeare")
    }
    assert len(set(texts.values())) == len(texts)
