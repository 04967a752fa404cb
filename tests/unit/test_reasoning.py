"""Reasoning is taken out of the text, wherever the text is cut and whoever opened it."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from server.text.answer import AnswerParser, Content, Reasoning
from server.text.detokenizer import TextPiece
from server.text.prompt import PromptRenderer
from server.text.reasoning import reasoning_format
from server.text.stepped_parser import PartWriter, SteppedParser
from server.text.text_reader import Steps, TextReader
from tests.answer_parsing import ParsedAnswer, parsed, parts_of
from tests.fakes import small_tokenizer
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


@pytest.mark.parametrize("marker", ["<think>", "<pad>"])
@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("hello<{}>\n", True),
        ("hello\n<{}>\n\n</{}>\n\n", False),
        ("<{}>old</{}>answer<{}>", True),
        ("hello</{}>", False),
        ("hello", False),
    ],
)
def test_the_prompt_tells_whether_reasoning_is_open(prompt: str, opened: bool, marker: str) -> None:
    """Where its markers are tokens, and where they are text."""
    name = marker.strip("<>")
    renderer = PromptRenderer(with_tokens("<think>", "</think>"))
    ids = renderer.completion(prompt.replace("{}", name))
    assert renderer.ends_inside(ids, f"<{name}>", f"</{name}>") == opened


def test_only_the_special_tokens_that_a_parser_needs_are_shown() -> None:
    renderer = PromptRenderer(with_tokens("<think>", "</think>", special=True))
    ids = renderer.completion("<think>hello</think><|user|> there")
    assert renderer.decode(ids) == "hello there"
    assert renderer.decoder(["<think>", "</think>", "nothing"])(ids) == "<think>hello</think> there"


def with_tokens(*texts: str, special: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(small_tokenizer().backend_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text in texts])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


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
