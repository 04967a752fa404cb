"""Reading the text of an answer while it arrives.

A parser is a generator over a ``TextReader``: it reads in the order of the format, and yields where it needs text
that has not arrived. So text may be cut at any place, and the parser does not know where.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from server.text.detokenizer import TextPiece, TokenStart

T = TypeVar("T")
Steps = Generator[None, None, T]
Emit = Callable[[TextPiece], None]


class TextReader:
    """The text that has arrived and is not consumed."""

    def __init__(self) -> None:
        self._text = ""
        self._start = 0  # index of its first character in the whole text
        self._tokens: deque[TokenStart] = deque()
        self._ended = False
        self._attempt: list[TextPiece] | None = None  # what was consumed since the attempt began

    @property
    def text(self) -> str:
        """What is not consumed."""
        return self._text

    @property
    def ended(self) -> bool:
        """Whether no more text arrives."""
        return self._ended

    def feed(self, piece: TextPiece) -> None:
        """More text."""
        self._text += piece.text
        self._tokens.extend(piece.tokens)

    def end(self) -> None:
        """No more text arrives."""
        self._ended = True

    def take(self, length: int) -> TextPiece:
        """Consume the first characters, with the tokens that start in them."""
        text, self._text = self._text[:length], self._text[length:]
        self._start += len(text)
        tokens = []
        while self._tokens and self._tokens[0].start < self._start:
            tokens.append(self._tokens.popleft())
        piece = TextPiece(text, tuple(tokens))
        if self._attempt is not None:
            self._attempt.append(piece)
        return piece

    def begin_attempt(self) -> None:
        """What is consumed from here on can be given back."""
        self._attempt = []

    def commit(self) -> None:
        """What was consumed stays consumed."""
        self._attempt = None

    def give_back(self) -> bool:
        """Give back what was consumed since the attempt began; False if it was committed."""
        if self._attempt is None:
            return False
        for piece in reversed(self._attempt):
            self._text = piece.text + self._text
            self._start -= len(piece.text)
            self._tokens.extendleft(reversed(piece.tokens))
        self._attempt = None
        return True

    def take_rest(self) -> TextPiece:
        """Consume everything, with tokens that have no text."""
        piece = self.take(len(self._text))
        rest = TextPiece(piece.text, (*piece.tokens, *self._tokens))
        self._tokens.clear()
        return rest

    def more(self) -> Steps[bool]:
        """Wait until more text arrives; False if there is no more."""
        length = len(self._text)
        while len(self._text) == length and not self._ended:
            yield
        return len(self._text) > length

    def skip_space(self) -> Steps[None]:
        """Consume white space, if any."""
        while True:
            self.take(len(self._text) - len(self._text.lstrip()))
            if self._text or not (yield from self.more()):
                return

    def starts_with(self, *texts: str) -> Steps[str]:
        """Which of ``texts`` begins here, the first of them that does; "" if none. Nothing is consumed."""
        while True:
            for text in texts:
                if self._text.startswith(text):
                    return text
            if not any(text.startswith(self._text) for text in texts) or not (yield from self.more()):
                return ""

    def skip(self, *texts: str) -> Steps[str]:
        """Consume one of ``texts`` if it begins here, and return it; "" if none does."""
        found = yield from self.starts_with(*texts)
        self.take(len(found))
        return found

    def skip_closing(self, text: str) -> Steps[None]:
        """Consume ``text`` if it begins here, or the part of it with which the answer ends."""
        if (yield from self.starts_with(text)):
            self.take(len(text))
        elif self._ended and text.startswith(self._text):
            self.take_rest()

    def until(self, markers: Sequence[str], emit: Emit, *, trim: bool = True) -> Steps[str]:
        """Emit the text before the first of ``markers``, and return the marker, "" at the end of the text.

        The marker is not consumed, and neither is white space before it, unless ``trim`` is false.
        """
        while True:
            found = [(place, marker) for marker in markers if (place := self._text.find(marker)) >= 0]
            if found:
                break
            shown = len(self._text) - self._num_undecided(markers, trim=trim)
            if shown:
                emit(self.take(shown))
            if not (yield from self.more()):
                emit(self.take_rest())
                return ""
        place, marker = min(found)
        emit(self.take(len(self._text[:place].rstrip()) if trim else place))
        return marker

    def take_through(self, marker: str) -> TextPiece:
        """Consume the text up to the end of ``marker``, which is in it."""
        return self.take(self._text.index(marker) + len(marker))

    def read_until(self, marker: str, *, limit: int) -> Steps[str | None]:
        """The text before ``marker``, both consumed; None if the marker is not within ``limit`` characters."""
        while (place := self._text.find(marker)) < 0:
            if len(self._text) > limit + len(marker) or not (yield from self.more()):
                return None
        text = self.take(place).text
        self.take(len(marker))
        return text if len(text) <= limit else None

    def _num_undecided(self, markers: Sequence[str], *, trim: bool) -> int:
        """Characters at the end that may begin a marker, and the white space before them."""
        begun = self._num_begun(markers)
        decided = self._text[: len(self._text) - begun]
        return begun + (len(decided) - len(decided.rstrip()) if trim and markers else 0)

    def _num_begun(self, markers: Sequence[str]) -> int:
        longest = max(map(len, markers), default=1) - 1
        for length in range(min(longest, len(self._text)), 0, -1):
            if any(marker.startswith(self._text[-length:]) for marker in markers):
                return length
        return 0
