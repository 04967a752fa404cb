"""The parts of an answer: its content, the reasoning before it, and tool calls.

A parser turns the text of one choice, piece by piece, into parts. The plain one takes all of it as content.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from server.text.detokenizer import TextPiece, TokenStart


class Content(NamedTuple):
    """Text of the answer, and the tokens it is made of."""

    text: str
    tokens: tuple[TokenStart, ...] = ()


class Reasoning(NamedTuple):
    """Text that the model writes before its answer, such as that between ``<think>`` and ``</think>``."""

    text: str
    tokens: tuple[TokenStart, ...] = ()


class ToolCallPart(NamedTuple):
    """A part of tool call ``number``, counted from 0 in each choice.

    The first part of a call has its ``id`` and its whole ``name``; later parts only have more ``arguments``, which are
    JSON text.
    """

    number: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    tokens: tuple[TokenStart, ...] = ()


AnswerPart = Content | Reasoning | ToolCallPart


class AnswerParser(Protocol):
    """The parts in the text of one choice."""

    def push(self, piece: TextPiece) -> list[AnswerPart]:
        """The parts that are final after more text."""

    def finish(self) -> list[AnswerPart]:
        """The parts of the text that was held back, when no text follows."""


class PlainParser:
    """All text is content."""

    def push(self, piece: TextPiece) -> list[AnswerPart]:
        return [Content(piece.text, piece.tokens)] if piece.text or piece.tokens else []

    def finish(self) -> list[AnswerPart]:
        return []
