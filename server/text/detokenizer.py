"""Token ids to text, one by one: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from server.sequence import SampledToken

_BROKEN = "\ufffd"
_MAX_WINDOW, _KEPT_WINDOW = 16, 8


class TokenStart(NamedTuple):
    """A token, and the character of the sequence's text with which its own begins, counted from 0.

    Tokens that share a character begin with it, and so does a token without text with what follows it.
    """

    token: SampledToken
    start: int


class TextPiece(NamedTuple):
    """Text that may be shown, and the tokens that it is made of: those of which it shows the first character.

    With the text of all pieces end to end come all tokens in their order, each once; the last one may go on beyond the
    beginning of a stop string.
    """

    text: str
    tokens: tuple[TokenStart, ...] = ()


class Detokenizer:
    """The text of one sequence, as it may be shown after each token.

    Only a window of the last tokens is decoded at each step. It begins at a token after which the text was whole, and
    keeps the piece before it, because the first token of a decoded run may lose its leading space (SentencePiece).
    Of several stop strings the one that is complete first ends the text; of those that end together, the longest.
    One that is complete within the first ``min_tokens`` tokens is text like any other.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], *, min_tokens: int = 0) -> None:
        assert all(stop), "an empty stop string stops everything"
        self._decode = decode
        self._stop = tuple(stop)
        self._min_tokens, self._num_tokens = min_tokens, 0
        self._window: list[int] = []
        self._num_context = 0  # tokens of the window that are there only for the sake of those behind them
        self._num_shown = 0  # characters of the window's text that were handed on
        self._held = ""  # text that may be the beginning of a stop string
        self._length = 0  # characters of all text so far, those held back included
        self._tokens: deque[TokenStart] = deque()  # of which nothing was shown
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string came; nothing is shown from there on."""
        return self._stopped

    def push(self, token: SampledToken) -> TextPiece:
        """What may be shown now that this token is known."""
        if self._stopped:
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
        """The text held back, now that no token follows: half a character, or the beginning of a stop string.

        With it come tokens that have no text at all.
        """
        if self._stopped:
            return TextPiece("")
        rest = self._decode(self._window)[self._num_shown :]
        self._num_shown += len(rest)
        piece = self._show(rest)
        whole = TextPiece(piece.text + self._held, (*piece.tokens, *self._tokens))
        self._held = ""
        self._tokens.clear()
        return whole

    def _advance(self) -> None:
        """Begin the window at the piece just shown."""
        del self._window[: self._num_context]
        self._num_context = len(self._window)
        self._num_shown = len(self._decode(self._window))

    def _cut(self, text: str) -> str:
        """Shorten a window that does not come to a whole end: no character is this long, so show all but the last."""
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
            self._stopped, self._held = True, ""
            self._tokens.clear()
        return TextPiece(text[:num_shown], tokens)

    def _take_tokens(self, end: int) -> tuple[TokenStart, ...]:
        """The tokens that begin before character ``end`` and were not handed on before."""
        taken = []
        while self._tokens and self._tokens[0].start < end:
            taken.append(self._tokens.popleft())
        return tuple(taken)

    def _ends(self, text: str) -> list[tuple[int, int]]:
        """End and begin of each stop string in ``text`` that was not complete in what is held already."""
        firsts = {stop: max(0, len(self._held) - len(stop) + 1) for stop in self._stop}
        return [(at + len(stop), at) for stop in self._stop if (at := text.find(stop, firsts[stop])) >= 0]

    def _num_held(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
