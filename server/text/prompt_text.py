"""The text of a prompt's tokens, for completions that repeat their prompt (``echo``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from server.sequence import SampledToken
from server.text.detokenizer import Detokenizer, TextPiece


class PromptText(NamedTuple):
    """The text of a prompt, and the index of each token's first character."""

    text: str
    starts: tuple[int, ...]


def prompt_text(ids: Sequence[int], decode: Callable[[Sequence[int]], str], *, num_hidden: int = 0) -> PromptText:
    """The text of token ids by ``decode``; the first ``num_hidden`` have none."""
    detokenizer = Detokenizer(decode, ())
    pieces: list[TextPiece] = [detokenizer.push(SampledToken(token_id)) for token_id in ids[num_hidden:]]
    pieces.append(detokenizer.finish())
    starts = [0] * num_hidden + [start for piece in pieces for _, start in piece.tokens]
    return PromptText("".join(piece.text for piece in pieces), tuple(starts))
