"""The benchmark's everyday questions: what a loop is, whom they can be asked, and what is compared."""

from __future__ import annotations

import random

import pytest

from benchmarks.parts.everyday import MAX_TOKENS, QUESTIONS, ask, num_loops
from benchmarks.parts.perplexity import LENGTH, Reader, own_texts
from server.model.loader import load_base
from tests.tiny_models import build_tiny_base, tiny_tokenizer

CONTENT_ONLY = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
"""A template of the plainest kind: a message without content is an error."""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = build_tiny_base(tmp_path_factory.mktemp("tiny"))
    (folder / "chat_template.jinja").write_text(CONTENT_ONLY)
    base = load_base(str(folder), name="tiny", device="cpu", dtype="float32", max_model_len=LENGTH)
    return Reader(base, num_slots=len(QUESTIONS))


def test_loops_are_counted() -> None:
    random_ids = random.Random(0).choices(range(500), k=MAX_TOKENS)
    assert num_loops([[7] * MAX_TOKENS, random_ids, [1, 2] * MAX_TOKENS, []]) == 2


def test_conversations_that_a_template_refuses_are_left_out() -> None:
    """A tool call without content ended the benchmark on bases whose template wants content."""
    tokenizer = tiny_tokenizer()
    every = own_texts(tokenizer, num_windows=4)
    tokenizer.chat_template = CONTENT_ONLY
    some = own_texts(tokenizer, num_windows=4)
    assert list(some) == list(every) == ["conversations", "licence"]
    assert all(len(window) == LENGTH for window in some["conversations"]) and len(some["conversations"]) == 4


def test_a_base_without_a_template_has_plain_texts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert list(own_texts(tokenizer, num_windows=2)) == ["licence"]


def test_a_base_answers_as_itself(reader: Reader) -> None:
    found = ask(reader, reader)
    assert found.num_same == len(QUESTIONS) == 20
    assert all(0 < len(answer) <= MAX_TOKENS for answer in found.answers)
    assert found.comparison.num_tokens == sum(map(len, found.answers)), "only answers are compared"
    assert found.comparison.divergence == 0
    assert found.comparison.agreement > 0.99, "greedy answers are the likeliest tokens, but for ties"
