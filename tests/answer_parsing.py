"""Feeding an answer's text to a parser in pieces of different sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from server.sequence import SampledToken
from server.text.answer import AnswerParser, AnswerPart, Content, Reasoning, ToolCallPart
from server.text.detokenizer import TextPiece, TokenStart


class ParsedAnswer(NamedTuple):
    """A whole answer; calls are names and arguments as JSON values."""

    content: str
    reasoning: str = ""
    calls: tuple[tuple[str, Any], ...] = ()


def pieces_of(text: str, size: int) -> Iterable[TextPiece]:
    """Pieces of ``size`` characters, each with one token."""
    for start in range(0, len(text), size):
        yield TextPiece(text[start : start + size], (TokenStart(SampledToken(start), start),))


def parts_of(parser: AnswerParser, text: str, size: int) -> list[AnswerPart]:
    parts = [part for piece in pieces_of(text, size) for part in parser.push(piece)]
    return [*parts, *parser.finish()]


def joined(parts: Iterable[AnswerPart]) -> ParsedAnswer:
    """The answer that clients put together; the order of the parts of a call is checked."""
    content, reasoning = "", ""
    calls: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, Content):
            content += part.text
        elif isinstance(part, Reasoning):
            reasoning += part.text
        else:
            _add(part, calls)
    return ParsedAnswer(content, reasoning, tuple((name, json.loads(text)) for name, text in calls))


def _add(part: ToolCallPart, calls: list[tuple[str, str]]) -> None:
    if part.id is not None:
        assert part.name and part.number == len(calls) and part.arguments == ""
        calls.append((part.name, ""))
        return
    assert part.name is None and part.number == len(calls) - 1
    name, arguments = calls[-1]
    calls[-1] = (name, arguments + part.arguments)


def parsed(new_parser: Callable[[], AnswerParser], text: str) -> ParsedAnswer:
    """The answer, which is the same however its text is cut."""
    answers = [joined(parts_of(new_parser(), text, size)) for size in (1, 2, 3, 7, len(text) or 1)]
    assert all(answer == answers[-1] for answer in answers), answers
    return answers[-1]
