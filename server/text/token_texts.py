"""Text and bytes of single tokens, which may be part of a character only."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence, Set
from functools import lru_cache
from typing import NamedTuple

MAX_TOKEN_TEXTS = 32_768
"""Token texts kept in the cache, the most recently used ones; about 300 bytes each."""

_BROKEN = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte token of SentencePiece (``byte_fallback``)."""


class TokenText(NamedTuple):
    """A token as clients see it. ``data`` are its bytes, None for a special token, which has none in a text.

    ``text`` is None if the bytes are not whole characters.
    """

    text: str | None
    data: bytes | None


class TokenTexts:
    """Text and bytes of a tokenizer's tokens, computed at the first use of a token.

    The bytes of all tokens of a text together are the bytes of the text. The text of a token is what ``decode``, which
    skips special tokens, adds behind ``context_ids``, the ids of any text. If that is not whole characters, the bytes
    are read from the token's name in the vocabulary: byte-level tokenizers (GPT-2) write one character per byte, and
    those with ``byte_fallback`` (SentencePiece) have tokens such as ``<0xE6>``.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        name_of: Callable[[int], str],
        special_ids: Set[int],
        context_ids: Sequence[int],
    ) -> None:
        self._decode = decode
        self._name_of = name_of
        self._special_ids = special_ids
        self._context_ids = context_ids
        self._context_text = decode(context_ids)
        self._cached = lru_cache(MAX_TOKEN_TEXTS)(self._compute)
        self._is_continued = False

    def continued(self) -> TokenTexts:
        """The same for answers that continue a text, whose first token loses no leading space."""
        continued = copy.copy(self)
        continued._is_continued = True
        return continued

    def get(self, token_id: int, *, first: bool) -> TokenText:
        """The text of a token; ``first`` if only special tokens are before it, where some lose a leading space."""
        return self._cached(token_id, first and not self._is_continued)

    def is_special(self, token_id: int) -> bool:
        """Whether a token has no text in an answer."""
        return token_id in self._special_ids

    def _compute(self, token_id: int, first: bool) -> TokenText:
        if self.is_special(token_id):
            return TokenText(self._name_of(token_id), None)
        text = self._decode([token_id])
        if not first:
            with_context = self._decode([*self._context_ids, token_id])
            if with_context.startswith(self._context_text):
                text = with_context[len(self._context_text) :]
        if _BROKEN not in text:
            return TokenText(text, text.encode())
        data = self._bytes_by_name(self._name_of(token_id), text)
        try:
            return TokenText(data.decode(), data)
        except UnicodeDecodeError:
            return TokenText(None, data)

    @staticmethod
    def _bytes_by_name(name: str, text: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(name)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if all(character in _BYTES_BY_CHARACTER for character in name):
            return bytes(_BYTES_BY_CHARACTER[character] for character in name)
        return text.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """The byte of each character in a byte-level token's name (Radford et al. 2019).

    Printable bytes of Latin-1 are their own character; the other bytes have the characters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return alphabet


_BYTES_BY_CHARACTER = _byte_level_alphabet()
