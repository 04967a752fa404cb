"""The base's tokenizer, for comparison with those of adapters."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerBase

from server.adapters.content.added_tokens import AddedToken, BaseTokenizer

_FILE = "tokenizer.json"


def tokenizer_signature(tokenizer: PreTrainedTokenizerBase, folder: Path | None = None) -> BaseTokenizer | None:
    """The base's tokenizer, for comparison with an adapter's; None if it is not one of the library ``tokenizers``.

    Some releases of transformers build a tokenizer that differs from its file. So an adapter's tokenizer may equal the
    one in memory or the file in the base's ``folder``.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return None

    def read() -> list[str]:
        texts = [backend.to_str(pretty=True)]
        if folder is not None and (folder / _FILE).is_file():
            texts.append((folder / _FILE).read_text(encoding="utf-8"))
        return texts

    added = tuple(_added(number, token) for number, token in sorted(backend.get_added_tokens_decoder().items()))
    num_ids = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return BaseTokenizer(added, num_ids, read, normalizes=backend.normalizer is not None)


def _added(number: int, token: tokenizers.AddedToken) -> AddedToken:
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return AddedToken(number, token.content, **{name: getattr(token, name) for name in flags})
