"""A tokenizer as llguidance sees it: the bytes of each token, special tokens, and how forced text is tokenized."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set

from llguidance import LLTokenizer

_ADDED_TOKENS = '"added_tokens":'


class GrammarTokenizer:
    """Built once per tokenizer: from its ``tokenizer.json``, the width of the logits, and its special tokens.

    llguidance's own reading of the file takes special tokens for text: a string of a schema that looks like one would
    be forced as that token, which the grammar then refuses. Here a special token has no text: only a literal of a
    format stands for it. The bytes of all other tokens are llguidance's. ``special_tokens`` are names and ids.
    """

    def __init__(self, tokenizer_json: str, *, vocab_size: int, special_ids: Set[int], eos_id: int) -> None:
        self.vocab_size, self.eos_id = vocab_size, eos_id
        hidden = special_ids | {eos_id}
        text, added = _without_tokens(tokenizer_json, hidden)
        self.special_tokens = {
            name: number for number, name in added.items() if number in hidden and number < vocab_size
        }
        as_text = LLTokenizer(text, n_vocab=vocab_size, eos_token=[eos_id])
        vocabulary = _Vocabulary(as_text, added, hidden, vocab_size=vocab_size, eos_id=eos_id)
        self.library = LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=[eos_id])  # type: ignore[arg-type]
        vocabulary.tokens = []  # the library has copied them


class _Vocabulary:
    """What llguidance asks of a tokenizer written in Python."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, as_text: LLTokenizer, added: Mapping[int, str], hidden: Set[int], *, vocab_size: int, eos_id: int
    ) -> None:
        self._as_text = as_text
        self.eos_token_id = eos_id
        self.special_token_ids = sorted(number for number in hidden if number < vocab_size)
        self.tokens = [
            added[number].encode() if number in added else _bytes_of(as_text, number) for number in range(vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids of forced text, in which nothing is a special token."""
        return self._as_text.tokenize_str(text) if isinstance(text, str) else self._as_text.tokenize_bytes(text)


def _bytes_of(tokenizer: LLTokenizer, number: int) -> bytes:
    """The bytes of a token; none for a row of the logits without a token."""
    data = tokenizer.decode_bytes([number])
    return b"" if data == b"<[%d]>" % number else data


def _without_tokens(tokenizer_json: str, hidden: Set[int]) -> tuple[str, dict[int, str]]:
    """The file's text without the added tokens ``hidden``, and ids and names of all added tokens.

    Only the list of added tokens is parsed: the file of a large vocabulary has megabytes.
    """
    start = tokenizer_json.index(_ADDED_TOKENS) + len(_ADDED_TOKENS)
    while tokenizer_json[start].isspace():
        start += 1
    tokens, end = json.JSONDecoder().raw_decode(tokenizer_json, start)
    kept = json.dumps([token for token in tokens if token["id"] not in hidden])
    return tokenizer_json[:start] + kept + tokenizer_json[end:], {token["id"]: token["content"] for token in tokens}
