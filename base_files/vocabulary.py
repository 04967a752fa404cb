"""The tokens of a base by id, for comparing the tokenizers of a folder and of a GGUF."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from base_files.fingerprint import canonical_json

SPACE = "\u2581"
"""SentencePiece's mark for a space, which converters turn into one in some tokens."""
_TAB, _TAB_BYTE = "\t", "<0x09>"
"""transformers' converter of Gemma 1 and 2 turns the token of this byte into the character."""


def vocabulary_digest(texts: Mapping[int, str] | None) -> str | None:
    """SHA-256 over the canonical JSON of ``[[id, text], ...]``, sorted by id; None where the tokens are not known.

    Spaces replace their mark, ``<0x09>`` replaces a tab, and ``[PAD7]`` of the id 7, with which converters fill gaps,
    counts as a gap.
    """
    if texts is None:
        return None
    pairs = [
        [number, _TAB_BYTE if text == _TAB else text.replace(SPACE, " ")]
        for number, text in texts.items()
        if text != f"[PAD{number}]"
    ]
    return f"sha256:{hashlib.sha256(canonical_json(sorted(pairs))).hexdigest()}"


def folder_token_texts(folder: Path) -> Mapping[int, str] | None:
    """The tokens in ``tokenizer.json``; None if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_bytes())
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # a Unigram model: pairs of text and score, in the order of ids
        texts = {number: str(pair[0]) for number, pair in enumerate(vocabulary)}
    else:
        texts = {int(number): text for text, number in vocabulary.items()}
    return texts | {int(token["id"]): str(token["content"]) for token in content.get("added_tokens") or ()}
