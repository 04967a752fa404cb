"""The base's tokenizer, for comparison with those of adapters."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerBase

from server.adapters.content.added_tokens import AddedToken, BaseTokenizer

_FILE = "tokenizer.json"


def tokenizer_signature(tokenizer: PreTrainedTokenizerBase, folder: Path | None = None) -> BaseTokenizer | None:
    """What an adapter's tokenizer must be; None where the base's is none of the library ``tokenizers``.

    Releases of transformers build some tokenizers in other ways than their file says: an adapter's may be as the one
    that is in memory or as the one in the base's ``folder``.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return None

    def read() -> list[str]:
        file = None if folder is None else folder / _FILE
        return [
            backend.to_str(pretty=True),
            *([file.read_text(encoding="utf-8")] if file is not None and file.is_file() else []),
        ]

    added = tuple(_added(number, token) for number, token in sorted(backend.get_added_tokens_decoder().items()))
    num_ids = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return BaseTokenizer(added, num_ids, read, normalizes=backend.normalizer is not None)


def _added(number: int, token: tokenizers.AddedToken) -> AddedToken:
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return AddedToken(number, token.content, **{name: getattr(token, name) for name in flags})
