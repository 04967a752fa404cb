"""Tokens that a trainer added to the base's tokenizer, read from the tokenizer saved beside the adapter.

An adapter's tokenizer may have other added tokens than the base's, whose ids lie within the rows of the base's
embedding: prompts and answers of the adapter are then made with them. In all else it must be the base's: its
vocabulary, merges, normalizer and pre-tokenizer decide the ids of every text. What only a trainer needs (truncation,
padding, tokens put around a text) is not compared.
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

_MAX_JUDGED = 64
_PARTS_PER_TOKEN = 16
_ALWAYS_READ = 1024 * 1024
"""Bytes of a ``tokenizer.json`` that may be parsed whatever the base's is."""

_MODEL = b'\n  "model": {'
"""Where the last and by far the largest section begins in the file as the library writes it."""

_DEFAULTS: Mapping[str, Any] = {"use_regex": True, "str_rep": "▁", "replacement": "▁", "split": True}
"""What a key of a section means where it is missing."""


@dataclass(frozen=True)
class AddedToken:
    """A token found in a text before the tokenizer's model sees it (tokenizers, ``AddedToken``).

    A special one does not show in an answer.
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

    ``read`` gives its JSON in every form it has, as it is in memory and in its file; ``normalizes`` says whether it has
    a normalizer, without which a token's flag ``normalized`` means nothing.
    """

    added: tuple[AddedToken, ...]
    num_ids: int
    read: Callable[[], Sequence[str]] = field(repr=False)
    normalizes: bool = True
    _judged: dict[bytes, str | None] = field(default_factory=dict, repr=False)

    @cached_property
    def _sections(self) -> Mapping[str, frozenset[bytes]]:
        """The digests of each section, one for each form."""
        return _joined([_digests(json.loads(text)) for text in self.read()])

    @cached_property
    def _sections_as_written(self) -> Mapping[str, frozenset[bytes]]:
        """The same, with the model as it is written, which takes a hundredth of the time."""
        found = [_digests_as_written(text.encode()) for text in self.read()]
        return _joined([digests for digests in found if digests is not None])

    @cached_property
    def _max_parts(self) -> int:
        """The most parts of a ``tokenizer.json`` with this vocabulary, in any form, with any added tokens."""
        return max(_num_parts(text.encode()) for text in self.read()) + _PARTS_PER_TOKEN * MAX_TOKENS

    def is_exceeded_by(self, data: bytes) -> bool:
        """Whether an adapter's ``tokenizer.json`` has more parts than one with this vocabulary can have.

        Parsed, a part takes up to fifty times its bytes, so that such a file is refused unparsed.
        """
        return len(data) > _ALWAYS_READ and _num_parts(data) > self._max_parts

    def difference(self, data: bytes, parse: Callable[[], Any]) -> str | None:
        """What of an adapter's ``tokenizer.json`` is not as the base's; ``parse`` reads it, once for equal bytes."""
        key = hashlib.sha256(data).digest()
        if key not in self._judged:
            if len(self._judged) >= _MAX_JUDGED:
                self._judged.clear()
            self._judged[key] = self._difference(data, parse)
        return self._judged[key]

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
        return next((said for name, said in SECTIONS.items() if digests[name] not in sections[name]), None)


def listed_in_head(data: bytes) -> list[Any] | None:
    """The list of added tokens in the beginning of a ``tokenizer.json``; None where it does not end in there."""
    text, decoder = data.decode(errors="ignore"), json.JSONDecoder()
    at = _skip(text, 0, "{")
    try:
        while True:
            key, at = decoder.raw_decode(text, at)
            value, at = decoder.raw_decode(text, _skip(text, at, ":"))
            if key == "added_tokens":
                return value if isinstance(value, list) else None
            at = _skip(text, at, ",")
    except (ValueError, RecursionError):
        return None


def parse_listed(listed: Any, where: str) -> tuple[AddedToken, ...]:
    """Added tokens as ``tokenizer.json`` lists them, by id. Raises ``ValueError`` that names the file and the token."""
    if not isinstance(listed, list) or len(listed) > MAX_TOKENS:
        raise ValueError(f"{where}: its added tokens must be a list of {MAX_TOKENS} at most")
    found = [_token(item, where) for item in listed]
    for name in ("id", "content"):
        values = [getattr(token, name) for token in found]
        if len(set(values)) != len(values):
            raise ValueError(f"{where}: two of its added tokens have the same {name}")
    return tuple(sorted(found, key=lambda token: token.id))


def parse_decoder(decoder: Any, where: str) -> tuple[AddedToken, ...]:
    """Added tokens as ``added_tokens_decoder`` in ``tokenizer_config.json`` has them. Raises as ``parse_listed``."""
    if not isinstance(decoder, dict):
        raise ValueError(f"{where}: added_tokens_decoder must be an object")
    listed = [{**item, "id": _id(key)} if isinstance(item, dict) else item for key, item in decoder.items()]
    return parse_listed(listed, where)


def parse_ids(ids: Any, base: BaseTokenizer, *, special: Iterable[str], where: str) -> tuple[AddedToken, ...]:
    """Added tokens as ``added_tokens.json`` has them, text to id, beside the base's own. Raises as ``parse_listed``."""
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
    """All added tokens of the adapter's tokenizer, or none where they are the base's.

    What is special in the base stays so, so that no message can write it. A token for padding beyond the base's
    rows is left out: no prompt has it. Raises ``ValueError`` for any other token there.
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
            f"{where}: its token {_shown(beyond[0])} has the id {beyond[0].id}, and the base's embedding has "
            f"{num_rows} rows: serve a base of that size, or take the tokenizer's files out of the folder to use the "
            "base's tokenizer"
        )
    own = base.added if base.normalizes else [replace(token, normalized=False) for token in base.added]
    return () if set(inside) == set(own) else tuple(inside)


def nameless(ids: Iterable[int], base: BaseTokenizer, tokens: Sequence[AddedToken]) -> int | None:
    """The first of the ids that neither the base's tokenizer nor the adapter's gives a text to."""
    named = {token.id for token in tokens}
    return next((number for number in ids if number >= base.num_ids and number not in named), None)


def _token(item: Any, where: str) -> AddedToken:
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    match item:
        case {"id": int(number), "content": str(content)} if (
            type(number) is int and 0 <= number < 1 << 31 and 0 < len(content) <= MAX_CHARS
        ):
            said = {name: item.get(name, False) for name in flags}
            if all(isinstance(value, bool) for value in said.values()):
                return AddedToken(number, content, **said)
    raise ValueError(f"{where}: {item!r:.80} is no added token with an id, a text and flags")


def _id(key: Any) -> int | None:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11 else None


def _shown(token: AddedToken) -> str:
    return f"{token.content!r:.60}"


def _num_parts(data: bytes) -> int:
    """No fewer than there are values in this JSON, inside of one another."""
    return sum(data.count(mark) for mark in (b"[", b"{", b","))


def _skip(text: str, at: int, mark: str) -> int:
    """The place of the next value, behind a mark that may have white space around it."""
    rest = text[at : at + 4096]
    found = rest.lstrip()
    if not found.startswith(mark):
        return at
    inner = found[1:].lstrip()
    return at + len(rest) - len(inner)


def _joined(found: Sequence[Mapping[str, bytes]]) -> Mapping[str, frozenset[bytes]]:
    return {name: frozenset(digests[name] for digests in found) for name in SECTIONS}


def _digests_as_written(data: bytes) -> Mapping[str, bytes] | None:
    """Digests with the model's of its bytes; None where the file is not laid out as the library does it."""
    if (at := data.find(_MODEL)) < 0:
        return None
    try:
        before = json.loads(data[:at].rstrip().removesuffix(b",") + b"}")
    except (ValueError, RecursionError):
        return None
    if not isinstance(before, dict) or "model" in before:
        return None
    return {**_digests(before), "model": hashlib.sha256(data[at:]).digest()}


def _digests(tokenizer: Mapping[str, Any]) -> Mapping[str, bytes]:
    return {name: _digest(tokenizer.get(name)) for name in SECTIONS}


def _digest(section: Any) -> bytes:
    text = json.dumps(_canonical(section), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _canonical(value: Any) -> Any:
    """A section without keys that only say the default, and with merges as tokenizers before 0.20 wrote them."""
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
