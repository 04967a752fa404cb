"""An answer parser whose parts are written by a generator over a ``TextReader``."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable

from server.text.answer import AnswerPart, Content, Reasoning, ToolCallPart
from server.text.detokenizer import TextPiece
from server.text.text_reader import Steps, TextReader

_ID_ALPHABET = string.ascii_letters + string.digits
_DONE = object()


class PartWriter:
    """The parts of an answer, in order. ``new_id`` makes the ids of calls, ``max_calls`` is how many are written."""

    def __init__(self, new_id: Callable[[], str] | None = None, *, max_calls: int | None = None) -> None:
        self.parts: list[AnswerPart] = []
        self._new_id = new_id or new_call_id
        self._max_calls = max_calls
        self._num_calls = 0

    @property
    def num_calls(self) -> int:
        """Calls that were begun."""
        return self._num_calls

    def content(self, piece: TextPiece) -> None:
        """Text of the answer."""
        if piece.text or piece.tokens:
            self.parts.append(Content(piece.text, piece.tokens))

    def reasoning(self, piece: TextPiece) -> None:
        """Text before the answer."""
        if piece.text or piece.tokens:
            self.parts.append(Reasoning(piece.text, piece.tokens))

    def call(self, name: str) -> None:
        """The beginning of a call."""
        self._num_calls += 1
        if self._writes_calls:
            self.parts.append(ToolCallPart(self._num_calls - 1, self._new_id(), name))

    def arguments(self, piece: TextPiece) -> None:
        """More of the JSON text of the call's arguments."""
        if piece.text and self._writes_calls:
            self.parts.append(ToolCallPart(self._num_calls - 1, arguments=piece.text, tokens=piece.tokens))

    def whole_call(self, name: str, arguments: object) -> None:
        """A call whose arguments are known."""
        self.call(name)
        self.arguments(TextPiece(json.dumps(arguments, ensure_ascii=False)))

    @property
    def _writes_calls(self) -> bool:
        return self._max_calls is None or self._num_calls <= self._max_calls


def new_call_id() -> str:
    """An id as OpenAI's: ``call_`` and 24 characters."""
    return "call_" + _random(24)


def new_short_call_id() -> str:
    """Nine characters, as Mistral's templates ask for."""
    return _random(9)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(length))


class SteppedParser:
    """An ``AnswerParser``: ``read`` is its generator."""

    def __init__(self, read: Callable[[TextReader, PartWriter], Steps[None]], writer: PartWriter) -> None:
        self._reader = TextReader()
        self._writer = writer
        self._steps = read(self._reader, writer)
        self._running = True

    def push(self, piece: TextPiece) -> list[AnswerPart]:
        """The parts that are final after more text."""
        if not piece.text and not piece.tokens:
            return []
        self._reader.feed(piece)
        return self._run()

    def finish(self) -> list[AnswerPart]:
        """The parts of the text that was held back, when no text follows."""
        self._reader.end()
        return self._run()

    def _run(self) -> list[AnswerPart]:
        if self._running:
            self._running = next(self._steps, _DONE) is not _DONE
        parts = _joined(self._writer.parts)
        self._writer.parts.clear()
        return parts


def _joined(parts: list[AnswerPart]) -> list[AnswerPart]:
    """``parts``, with neighbours of one kind in one part."""
    joined: list[AnswerPart] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + part.text, last.tokens + part.tokens)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + part.text, last.tokens + part.tokens)
        elif isinstance(part, ToolCallPart) and isinstance(last, ToolCallPart) and part.id is None and last.id is None:
            joined[-1] = last._replace(arguments=last.arguments + part.arguments, tokens=last.tokens + part.tokens)
        else:
            joined.append(part)
    return joined
