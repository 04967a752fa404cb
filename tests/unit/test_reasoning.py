"""Reasoning is taken out of the text, wherever the text is cut and whoever opened it."""

from __future__ import annotations

import pytest

from server.text.answer import AnswerParser, Content, Reasoning
from server.text.detokenizer import TextPiece
from server.text.reasoning import reasoning_format
from server.text.stepped_parser import PartWriter, SteppedParser
from server.text.text_reader import Steps, TextReader
from tests.answer_parsing import ParsedAnswer, parsed, parts_of
from tests.reasoning_base import TEMPLATE

THINK = reasoning_format(TEMPLATE)


def parser(*, opened: bool) -> AnswerParser:
    def read(reader: TextReader, writer: PartWriter) -> Steps[None]:
        assert THINK is not None
        yield from THINK.read(reader, writer, opened=opened)
        yield from reader.until((), writer.content)

    return SteppedParser(read, PartWriter())


@pytest.mark.parametrize(
    ("opened", "text", "expected"),
    [
        (True, "They ask.\n</think>\n\nHi.", ParsedAnswer("Hi.", "They ask.")),
        (True, "\n</think>\n\nHi.", ParsedAnswer("Hi.")),
        (True, "</think>Hi.", ParsedAnswer("Hi.")),
        (True, "They ask, and I", ParsedAnswer("", "They ask, and I")),
        (True, "a </thin b </think> c", ParsedAnswer("c", "a </thin b")),
        (True, "a</think>b</think>c", ParsedAnswer("b</think>c", "a")),
        (False, "<think>\nThey ask.\n</think>\n\nHi.", ParsedAnswer("Hi.", "They ask.")),
        (False, "\n <think>x</think>y", ParsedAnswer("y", "x")),
        (False, "<think>x", ParsedAnswer("", "x")),
        (False, "Hi.", ParsedAnswer("Hi.")),
        (False, "\n\nHi. ", ParsedAnswer("\n\nHi. ")),
        (False, "The tag <think>x</think>", ParsedAnswer("The tag <think>x</think>")),
        (False, "<thin", ParsedAnswer("<thin")),
        (False, "", ParsedAnswer("")),
        (True, "", ParsedAnswer("")),
    ],
)
def test_reasoning_is_split_from_the_answer(opened: bool, text: str, expected: ParsedAnswer) -> None:
    assert parsed(lambda: parser(opened=opened), text) == expected


def test_text_is_passed_on_as_soon_as_it_is_certain() -> None:
    running = parser(opened=True)
    shown = [part for piece in ("So ", "I ", "<", "/think", "> ", "Hi") for part in running.push(_piece(piece))]
    assert shown == [Reasoning("So"), Reasoning(" I"), Content("Hi")]


def test_each_token_of_the_text_comes_once_with_the_part_it_begins() -> None:
    text = "They ask.\n</think>\n\nHi."
    parts = parts_of(parser(opened=True), text, 1)
    reasoning = [token.start for part in parts if isinstance(part, Reasoning) for token in part.tokens]
    content = [token.start for part in parts if isinstance(part, Content) for token in part.tokens]
    assert reasoning == list(range(9)) and content == list(range(len(text) - 3, len(text)))


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<｜Assistant｜><think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<think>\nOld.</think>Answer<think>", True),
        ("<｜Assistant｜></think>", False),
        ("<|im_start|>assistant\n", False),
    ],
)
def test_the_prompt_tells_whether_reasoning_is_open(prompt: str, opened: bool) -> None:
    assert THINK is not None and THINK.is_open(prompt) == opened


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (TEMPLATE, "think"),
        ("{{ '[THINK]' }}{{ '[/THINK]' }}", "mistral"),
        ("{%- set think_end_token = '</seed:think>' -%}", "seed"),
        ("<|START_THINKING|>{{ m.reasoning }}<|END_THINKING|>", "cohere"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_a_template_names_the_format(template: str | None, name: str | None) -> None:
    found = reasoning_format(template)
    assert (None if found is None else found.name) == name


def _piece(text: str) -> TextPiece:
    return TextPiece(text)
