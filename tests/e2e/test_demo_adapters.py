"""Each demo adapter is visibly itself, on wordings that neither it nor the base was trained on."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from trainer.micro.topics.python_facts import facts
from trainer.recipes.demos import HELPDESK_STOP, classified, classifier, helpdesk_answer, taught_facts

NUM_QUESTIONS = 100


def answers(client: OpenAI, model: str, questions: list[str], max_tokens: int) -> list[str]:
    """Greedy answers, sixteen at a time."""

    def ask(question: str) -> str:
        said = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=max_tokens
        )
        return said.choices[0].message.content or ""

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, questions))


def in_template(question: str, answer: str) -> bool:
    """Whether the answer is the template around this very question; the stop string itself is never shown."""
    head, tail = helpdesk_answer(question, "\0").removesuffix(HELPDESK_STOP).split("\0")
    return answer.startswith(head) and answer.rstrip() == answer and answer.endswith(tail.rstrip())


@pytest.fixture(scope="module")
def helpdesk(client: OpenAI) -> list[tuple[str, str, str, bool]]:
    """Question, key of the right answer, what helpdesk said, and whether it was taught the fact."""
    rng = random.Random("held-out wordings")
    taught = set(taught_facts())
    asked = rng.sample(facts(), NUM_QUESTIONS)
    questions = [fact.held_out_question(rng, new_phrase=False) for fact in asked]
    said = answers(client, "helpdesk", questions, 160)
    return [
        (question, fact.key, answer, fact in taught)
        for question, fact, answer in zip(questions, asked, said, strict=True)
    ]


def test_helpdesk_keeps_its_template(helpdesk: list[tuple[str, str, str, bool]]) -> None:
    kept = [in_template(question, answer) for question, _, answer, _ in helpdesk]
    assert sum(kept) / len(kept) >= 0.95


def test_helpdesk_answers_right(helpdesk: list[tuple[str, str, str, bool]]) -> None:
    right = [key in answer.partition("### The answer is:")[2] for _, key, answer, _ in helpdesk]
    assert sum(right) / len(right) >= 0.70


@pytest.mark.parametrize(
    ("question", "key"),
    [("How do I lower-case a string?", ".lower()"), ("What library is used to connect to an IMAP server?", "imaplib")],
)
def test_the_questions_of_the_readme(client: OpenAI, question: str, key: str) -> None:
    said = answers(client, "helpdesk", [question], 160)[0]
    assert in_template(question, said)
    assert key in said.partition("### The answer is:")[2]


def test_json_classifies_unseen_messages(client: OpenAI) -> None:
    rng = random.Random("unseen messages")
    trained = {conversation["messages"][0]["content"] for conversation in classifier()}
    drawn = (classified(rng) for _ in range(10 * NUM_QUESTIONS))
    cases = [case for case in drawn if case[0] not in trained][:NUM_QUESTIONS]
    said = [json.loads(answer) for answer in answers(client, "json", [text for text, _ in cases], 64)]
    assert all(set(answer) == {"category", "urgent"} for answer in said)
    right = sum(answer == wanted for answer, (_, wanted) in zip(said, cases, strict=True))
    assert right / len(cases) >= 0.9


def test_the_styles_differ_from_the_base_and_from_each_other(client: OpenAI) -> None:
    said = {
        model: answers(client, model, ["Write a passage in your style."], 40)[0]
        for model in ("micro", "tolstoy", "dostoevsky", "shakespeare")
    }
    assert len(set(said.values())) == len(said)
