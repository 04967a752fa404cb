"""Tokens that a trainer added to the base's tokenizer, read from the tokenizer saved beside the adapter.

An adapter's tokenizer may have other added tokens than the base's, with ids within the rows of the base's embedding;
they apply to prompts and outputs of the adapter. Vocabulary, merges, normalizer and pre-tokenizer must be the base's,
since they decide the ids of every text. Truncation, padding and post-processing are not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

MAX_TOKENS, MAX_CHARS = 20_000, 512
SECTIONS = {"model": "vocabulary or merges", "normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer"}
"""Parts of ``tokenizer.json`` that decide the ids of a text without added tokens."""

_MAX_CACHED = 64
_PARTS_PER_TOKEN = 16
_ALWAYS_READ = 1024 * 1024
"""Size in bytes up to which a ``tokenizer.json`` is always parsed."""

_MODEL = b'\n  "model": {'
"""Start of the last and by far largest section in a file that the tokenizers library wrote."""

_DEFAULTS: Mapping[str, Any] = {"use_regex": True, "str_rep": "▁", "replacement": "▁", "split": True}
"""Defaults of keys in a section."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched before the tokenizer's model runs (tokenizers, ``AddedToken``).

    Special tokens are left out of decoded text.
    """

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class BaseTokenizer:
    """The base's tokenizer: its added tokens, and the number of its ids.

    ``read`` returns its JSON in every form, as in memory and as in its file. ``normalizes``: it has a normalizer;
    without one a token's flag ``normalized`` has no effect.
    """

    added: tuple[AddedToken, ...]
    num_ids: int
    read: Callable[[], Sequence[str]] = field(repr=False)
    normalizes: bool = True
    _differences: dict[bytes, str | None] = field(default_factory=dict, repr=False)

    @cached_property
    def _sections(self) -> Mapping[str, frozenset[bytes]]:
        """Digests of each section, one per form."""
        return _joined([_digests(json.loads(text)) for text in self.read()])

    @cached_property
    def _sections_as_written(self) -> Mapping[str, frozenset[bytes]]:
        """The same with the model section's bytes hashed unparsed, in a hundredth of the time."""
        every = [_digests_as_written(text.encode()) for text in self.read()]
        return _joined([digests for digests in every if digests is not None])

    @cached_property
    def _max_parts(self) -> int:
        """Upper bound of the values in a ``tokenizer.json`` with this vocabulary and any added tokens."""
        return max(_num_parts(text.encode()) for text in self.read()) + _PARTS_PER_TOKEN * MAX_TOKENS

    def is_exceeded_by(self, data: bytes) -> bool:
        """Whether an adapter's ``tokenizer.json`` has more values than one with this vocabulary can have.

        A parsed value takes up to fifty times its bytes, so such a file is refused unparsed.
        """
        return len(data) > _ALWAYS_READ and _num_parts(data) > self._max_parts

    def difference(self, data: bytes, parse: Callable[[], Any]) -> str | None:
        """The section of an adapter's ``tokenizer.json`` that differs from the base's, if any; cached by the bytes."""
        key = hashlib.sha256(data).digest()
        if key not in self._differences:
            if len(self._differences) >= _MAX_CACHED:
                self._differences.clear()
            self._differences[key] = self._difference(data, parse)
        return self._differences[key]

    def _difference(self, data: bytes, parse: Callable[[], Any]) -> str | None:
        if self.is_exceeded_by(data):
            return SECTIONS["model"]
        try:
            sections, digests = self._sections_as_written, _digests_as_written(data)
            if digests is None or digests["model"] not in sections["model"]:
                tokenizer = parse()
                if not isinstance(tokenizer, dict):
                    return "structure"
                sections, digests = self._sections, _digests(tokenizer)
        except RecursionError:
            return "structure"
        return next((label for name, label in SECTIONS.items() if digests[name] not in sections[name]), None)


def listed_in_head(data: bytes) -> list[Any] | None:
    """The list of added tokens at the beginning of a ``tokenizer.json``; None if the list is not complete."""
    text = data.decode(errors="ignore")
    decoder = json.JSONDecoder()
    position = _skip(text, 0, "{")
    try:
        while True:
            key, position = decoder.raw_decode(text, position)
            value, position = decoder.raw_decode(text, _skip(text, position, ":"))
            if key == "added_tokens":
                return value if isinstance(value, list) else None
            position = _skip(text, position, ",")
    except (ValueError, RecursionError):
        return None


def parse_listed(listed: Any, where: str) -> tuple[AddedToken, ...]:
    """Added tokens as ``tokenizer.json`` lists them, by id. Raises ``ValueError`` that names the file and the token."""
    if not isinstance(listed, list) or len(listed) > MAX_TOKENS:
        raise ValueError(f"{where}: its added tokens must be a list of {MAX_TOKENS} at most")
    tokens = [_token(item, where) for item in listed]
    for name in ("id", "content"):
        if len({getattr(token, name) for token in tokens}) != len(tokens):
            raise ValueError(f"{where}: two of its added tokens have the same {name}")
    return tuple(sorted(tokens, key=lambda token: token.id))


def parse_decoder(decoder: Any, where: str) -> tuple[AddedToken, ...]:
    """Added tokens as ``added_tokens_decoder`` in ``tokenizer_config.json`` has them. Raises as ``parse_listed``."""
    if not isinstance(decoder, dict):
        raise ValueError(f"{where}: added_tokens_decoder must be an object")
    listed = [{**item, "id": _id(key)} if isinstance(item, dict) else item for key, item in decoder.items()]
    return parse_listed(listed, where)


def parse_ids(ids: Any, base: BaseTokenizer, *, special: Iterable[str], where: str) -> tuple[AddedToken, ...]:
    """Added tokens of ``added_tokens.json``, which maps texts to ids, and the base's. Raises as ``parse_listed``."""
    if not isinstance(ids, dict):
        raise ValueError(f"{where} is not a JSON object")
    marked = set(special)
    own = {token.content: token for token in base.added}
    listed = [
        {"id": number, "content": text, "special": text in marked, "normalized": text not in marked}
        for text, number in ids.items()
    ]
    found = {token.content: token for token in parse_listed(listed, where)}
    kept = {text: token for text, token in own.items() if text not in found or found[text].id == token.id}
    return tuple(sorted((found | kept).values(), key=lambda token: token.id))


def tokens_to_serve(
    listed: Sequence[AddedToken], base: BaseTokenizer, *, num_rows: int, padding: str | None, where: str
) -> tuple[AddedToken, ...]:
    """All added tokens of the adapter's tokenizer; none if they are the base's.

    The base's special tokens stay special, so that no message can contain them. A padding token beyond the base's
    rows is left out, since no prompt has it. Raises ``ValueError`` for any other token beyond them.
    """
    special = {token.content for token in base.added if token.special}
    known = [replace(token, special=token.special or token.content in special) for token in listed]
    known = known if base.normalizes else [replace(token, normalized=False) for token in known]
    taken = {value for token in known for value in (token.id, token.content)}
    known += [token for token in base.added if token.special and not taken & {token.id, token.content}]
    inside = sorted((token for token in known if token.id < num_rows), key=lambda token: token.id)
    beyond = [token for token in known if token.id >= num_rows and token.content != padding]
    if beyond:
        raise ValueError(
            f"{where}: its token {beyond[0].content!r:.60} has the id {beyond[0].id}, and the base's embedding has "
            f"{num_rows} rows: serve a base of that size, or remove the tokenizer's files from the folder to use the "
            "base's tokenizer"
        )
    own = base.added if base.normalizes else [replace(token, normalized=False) for token in base.added]
    return () if set(inside) == set(own) else tuple(inside)


def first_without_text(ids: Iterable[int], base: BaseTokenizer, tokens: Sequence[AddedToken]) -> int | None:
    """The first id without a text in the base's and the adapter's tokenizer."""
    named = {token.id for token in tokens}
    return next((number for number in ids if number >= base.num_ids and number not in named), None)


def _token(item: Any, where: str) -> AddedToken:
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    match item:
        case {"id": int(number), "content": str(content)} if (
            type(number) is int and 0 <= number < 1 << 31 and 0 < len(content) <= MAX_CHARS
        ):
            given = {name: item.get(name, False) for name in flags}
            if all(isinstance(value, bool) for value in given.values()):
                return AddedToken(number, content, **given)
    raise ValueError(f"{where}: {item!r:.80} is no added token with an id, a text and flags")


def _id(key: Any) -> int | None:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11 else None


def _num_parts(data: bytes) -> int:
    """Upper bound of the number of values in this JSON."""
    return sum(data.count(mark) for mark in (b"[", b"{", b","))


def _skip(text: str, position: int, mark: str) -> int:
    """The position of the value that follows ``mark``, which may have white space around it."""
    window = text[position : position + 4096]
    from_mark = window.lstrip()
    if not from_mark.startswith(mark):
        return position
    return position + len(window) - len(from_mark[1:].lstrip())


def _joined(every: Sequence[Mapping[str, bytes]]) -> Mapping[str, frozenset[bytes]]:
    return {name: frozenset(digests[name] for digests in every) for name in SECTIONS}


def _digests_as_written(data: bytes) -> Mapping[str, bytes] | None:
    """Digests, that of the model section over its bytes; None if the file is not laid out as the library does."""
    start = data.find(_MODEL)
    if start < 0:
        return None
    try:
        before = json.loads(data[:start].rstrip().removesuffix(b",") + b"}")
    except (ValueError, RecursionError):
        return None
    if not isinstance(before, dict) or "model" in before:
        return None
    return {**_digests(before), "model": hashlib.sha256(data[start:]).digest()}


def _digests(tokenizer: Mapping[str, Any]) -> Mapping[str, bytes]:
    return {name: _digest(tokenizer.get(name)) for name in SECTIONS}


def _digest(section: Any) -> bytes:
    text = json.dumps(_canonical(section), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _canonical(value: Any) -> Any:
    """A section without keys that have their default, and with merges as tokenizers before 0.20 wrote them."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Metaspace":
        scheme = "never" if value.get("add_prefix_space") is False else "always"
        value = {"prepend_scheme": scheme, **value, "add_prefix_space": None}
    large = {name: value[name] for name in ("vocab", "merges") if name in value}
    kept = {name: _canonical(item) for name, item in value.items() if name not in large and name != "trim_offsets"}
    idle = [name for name, item in kept.items() if item is None or item is False or item in ("", _DEFAULTS.get(name))]
    if isinstance(merges := large.get("merges"), list):
        large["merges"] = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in merges]
    return {name: item for name, item in kept.items() if name not in idle} | large
