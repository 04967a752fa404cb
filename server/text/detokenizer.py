"""Streaming detokenization: whole characters only, and no text that may become a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from server.sequence import SampledToken

_BROKEN = "\ufffd"
_MAX_WINDOW, _KEPT_WINDOW = 16, 8


class TokenStart(NamedTuple):
    """A token, and the index of its first character in the sequence's text.

    Tokens that share a character start at its index; a token without text starts at the index of the text behind it.
    """

    token: SampledToken
    start: int


class TextPiece(NamedTuple):
    """Final text, and its tokens: those whose first character it contains.

    All pieces of a sequence together have each token of the text once, in order. The text of the last token may go on
    into a stop string.
    """

    text: str
    tokens: tuple[TokenStart, ...] = ()


class Detokenizer:
    """The text of one sequence, token by token.

    Each step decodes only a window of the last tokens. The window starts behind whole characters, with the previous
    piece as context, because the first token of a decoded list may lose its leading space (SentencePiece).
    The stop string that is complete first ends the text; of several that end together, the longest one.
    A stop string that is complete within the first ``min_tokens`` tokens does not end the text.
    The tokens may continue ``context_ids``, whose text ends at character ``start``.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str],
        *,
        min_tokens: int = 0,
        context_ids: Sequence[int] = (),
        start: int = 0,
    ) -> None:
        assert all(stop), "a stop string is empty"
        self._decode = decode
        self._stop = tuple(stop)
        self._min_tokens, self._num_tokens = min_tokens, 0
        self._window = list(context_ids[-_KEPT_WINDOW:])
        self._num_context = len(self._window)  # tokens at the start of the window that are context only
        self._num_shown = len(decode(self._window)) if self._window else 0  # characters of its text that were returned
        self._held = ""  # text held back, which may be the start of a stop string
        self._length = start  # characters of the whole text, with those held back
        self._tokens: deque[TokenStart] = deque()  # tokens that were not returned yet
        self._found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._found is not None

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the text."""
        return self._found

    def push(self, token: SampledToken) -> TextPiece:
        """The text that is final after this token."""
        if self._found is not None:
            return TextPiece("")
        self._num_tokens += 1
        self._tokens.append(TokenStart(token, self._length))
        self._window.append(token.id)
        text = self._decode(self._window)
        whole = text.rstrip(_BROKEN)
        delta = text[self._num_shown : len(whole)]
        self._num_shown = max(self._num_shown, len(whole))
        if delta and whole == text:
            self._advance()
        elif len(self._window) > _MAX_WINDOW:
            delta += self._cut(text)
        return self._show(delta)

    def finish(self) -> TextPiece:
        """The text held back (part of a character, or the start of a stop string), when no token follows.

        Tokens without text at the end come with it.
        """
        if self._found is not None:
            return TextPiece("")
        rest = self._decode(self._window)[self._num_shown :]
        self._num_shown += len(rest)
        piece = self._show(rest)
        whole = TextPiece(piece.text + self._held, (*piece.tokens, *self._tokens))
        self._held = ""
        self._tokens.clear()
        return whole

    def _advance(self) -> None:
        """Start the window at the piece just returned."""
        del self._window[: self._num_context]
        self._num_context = len(self._window)
        self._num_shown = len(self._decode(self._window))

    def _cut(self, text: str) -> str:
        """Shorten a window without whole characters at its end: no character is that long: return all but the last."""
        delta = text[self._num_shown : -1]
        num_hidden = min(1, len(text) - self._num_shown)
        del self._window[:-_KEPT_WINDOW]
        self._num_context = 0
        self._num_shown = max(0, len(self._decode(self._window)) - num_hidden)
        return delta

    def _show(self, delta: str) -> TextPiece:
        text = self._held + delta
        self._length += len(delta)
        ends = self._ends(text) if self._num_tokens > self._min_tokens else []
        num_shown = min(ends)[1] if ends else len(text) - self._num_held(text)
        tokens = self._take_tokens(self._length - len(text) + num_shown)
        self._held = text[num_shown:]
        if ends:
            self._found, self._held = min(ends)[2], ""
            self._tokens.clear()
        return TextPiece(text[:num_shown], tokens)

    def _take_tokens(self, end: int) -> tuple[TokenStart, ...]:
        """The tokens that start before character ``end`` and were not returned yet."""
        taken = []
        while self._tokens and self._tokens[0].start < end:
            taken.append(self._tokens.popleft())
        return tuple(taken)

    def _ends(self, text: str) -> list[tuple[int, int, str]]:
        """End, start and text of each stop string in ``text`` that was not complete in the text held back before."""
        ends = []
        for stop in self._stop:
            start = text.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        return ends

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that is the start of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
