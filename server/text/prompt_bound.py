"""How long a text can be that still fits into the context, known without tokenizing it."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

_MOST_SHORTENED = 4
"""Unicode normalization makes a text at most four times shorter."""
_UNBOUNDED_NORMALIZERS = ('"Strip"', '"Regex"', '"Precompiled"', '"Lowercase"', '"StripAccents"', '"BertNormalizer"')
"""Normalizers that may drop any amount of text."""


def max_prompt_bytes(tokenizer: Tokenizer, max_tokens: int) -> int | None:
    """Bytes of UTF-8 that no text of ``max_tokens`` tokens exceeds; None if the tokenizer sets no such bound.

    It sets none if it may drop text, or make one unknown token of a text of any length.
    """
    description = json.loads(tokenizer.to_str())
    model, normalizer = description["model"], json.dumps(description.get("normalizer"))
    bounded = model["type"] == "BPE" and (model.get("byte_fallback") or not model.get("fuse_unk"))
    if not bounded or any(name in normalizer for name in _UNBOUNDED_NORMALIZERS):
        return None
    longest = max(len(token.encode("utf-8", "replace")) for token in tokenizer.get_vocab())
    return max_tokens * longest * (1 if normalizer == "null" else _MOST_SHORTENED)
