"""What single tokens are in a text: pieces of it, or bytes of a character that several tokens make together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from functools import lru_cache
from typing import NamedTuple

MAX_TOKEN_TEXTS = 32_768
"""Texts of tokens that are kept, the last used ones; about 300 bytes each."""

_BROKEN = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte among SentencePiece's pieces (``byte_fallback``)."""


class TokenText(NamedTuple):
    """A token as clients see it. ``data`` are its bytes in a text; None where it has no part in one: special tokens.

    ``text`` is None where the bytes are not whole characters.
    """

    text: str | None
    data: bytes | None


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens, found when they are first asked for.

    The bytes of a text's tokens end to end are the bytes of the text. They are what ``decode``, which leaves out
    special tokens, adds for a token behind ``context_ids``, which may be any text. Where that is no whole character,
    the token's name in the vocabulary tells its bytes: byte-level tokenizers (GPT-2's) write a character for each, and
    those with ``byte_fallback`` (SentencePiece's) have tokens such as ``<0xE6>``.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        name_of: Callable[[int], str],
        special_ids: Set[int],
        context_ids: Sequence[int],
    ) -> None:
        self._decode, self._name_of, self._special_ids = decode, name_of, special_ids
        self._context_ids, self._context_text = context_ids, decode(context_ids)
        self._find = lru_cache(MAX_TOKEN_TEXTS)(self._find_anew)

    def get(self, token_id: int, *, first: bool) -> TokenText:
        """A token's text; ``first`` where no token but special ones is before it: some lose a leading space there."""
        return self._find(token_id, first)

    def is_special(self, token_id: int) -> bool:
        """Whether a token has no text in an answer."""
        return token_id in self._special_ids

    def _find_anew(self, token_id: int, first: bool) -> TokenText:
        if self.is_special(token_id):
            return TokenText(self._name_of(token_id), None)
        text = self._decode([token_id])
        if not first:
            whole = self._decode([*self._context_ids, token_id])
            text = whole[len(self._context_text) :] if whole.startswith(self._context_text) else text
        if _BROKEN not in text:
            return TokenText(text, text.encode())
        data = self._bytes_by_name(self._name_of(token_id), text)
        try:
            return TokenText(data.decode(), data)
        except UnicodeDecodeError:
            return TokenText(None, data)

    @staticmethod
    def _bytes_by_name(name: str, text: str) -> bytes:
        if (byte := _BYTE_TOKEN.fullmatch(name)) is not None:
            return bytes([int(byte[1], 16)])
        if all(character in _BYTES_BY_CHARACTER for character in name):
            return bytes(_BYTES_BY_CHARACTER[character] for character in name)
        return text.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token's name stands for (Radford et al. 2019).

    Printable bytes of Latin-1 stand for themselves, the others are numbered from character 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


_BYTES_BY_CHARACTER = _byte_level_alphabet()
