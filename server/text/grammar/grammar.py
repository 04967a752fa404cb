"""Grammars as values, built by functions and composed: what the text of an answer may be.

Equal values are equal grammars, so a value is the key of its compiled form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.grammar.schema import MAX_SCHEMA_BYTES, Source, checked_schema, refusal

MAX_PATTERN_BYTES = 16 * 1024
MAX_RULES_BYTES = 64 * 1024
MAX_CHOICES = 1000
MAX_CHOICE_BYTES = 64 * 1024


@dataclass(frozen=True)
class LiteralText:
    """Exactly this text. In it, the text of a special token is that token."""

    text: str


@dataclass(frozen=True)
class PlainText:
    """Exactly this text, of a request: what looks like a special token is text."""

    text: str


@dataclass(frozen=True)
class RegexText:
    """Text that a regular expression (Rust's ``regex`` syntax, without lookaround) matches as a whole."""

    regex: str
    source: Source


@dataclass(frozen=True)
class Document:
    """A JSON document; ``schema`` is checked JSON text, or None for any object."""

    schema: str | None
    source: Source


@dataclass(frozen=True)
class Rules:
    """Text by the rules of a context-free grammar, in Lark's syntax; ``start`` is the first rule."""

    text: str
    source: Source


@dataclass(frozen=True)
class Concatenation:
    """Each part, one after another."""

    parts: tuple[Grammar, ...]


@dataclass(frozen=True)
class Alternatives:
    """One of the options."""

    options: tuple[Grammar, ...]


@dataclass(frozen=True)
class Repetition:
    """``item`` from ``least`` to ``most`` times (None: without end), with ``separator`` between them."""

    item: Grammar
    separator: Grammar
    least: int
    most: int | None


@dataclass(frozen=True)
class TriggeredText:
    """Free text in which the body of a trigger must follow its text, from ``least`` to ``most`` times.

    A trigger that is a special token is that token. With ``most``, the answer ends after that many bodies.
    The text does not begin with ``not_begin``, nor with white space and that.
    """

    triggers: tuple[tuple[str, Grammar], ...]
    most: int | None
    least: int = 0
    not_begin: str = ""


Grammar = (
    LiteralText | PlainText | RegexText | Document | Rules | Concatenation | Alternatives | Repetition | TriggeredText
)


def literal(text: str) -> Grammar:
    """Text of a format, such as that around a tool call; the text of a special token in it is that token."""
    return LiteralText(text)


def regex(pattern: str, source: Source) -> Grammar:
    """Text that a regular expression matches as a whole. Raises ``InvalidRequest`` if it is too long."""
    _limit_bytes(pattern, MAX_PATTERN_BYTES, "regular expression", source)
    return RegexText(pattern, source)


def json_schema(schema: Mapping[str, Any] | bool, source: Source, *, lenient: bool = False) -> Grammar:
    """A JSON document by a schema, on one line as Python's ``json.dumps`` writes it.

    Raises ``InvalidRequest`` if the schema is too large or holds what is not supported; with ``lenient`` such keywords
    are ignored.
    """
    checked = checked_schema(schema, source, lenient=lenient)
    text = json.dumps(checked, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    _limit_bytes(text, MAX_SCHEMA_BYTES, "schema", source)
    return Document(text, source)


def json_object(source: Source) -> Grammar:
    """Any JSON object, with a limit on the white space between its parts."""
    return Document(None, source)


def choice(texts: Sequence[str], source: Source) -> Grammar:
    """One of some texts."""
    if not texts:
        raise refusal(source, "choice", "it should have at least one item")
    if len(texts) > MAX_CHOICES or sum(len(text.encode()) for text in texts) > MAX_CHOICE_BYTES:
        raise refusal(source, "choice", f"it should have at most {MAX_CHOICES} items and {MAX_CHOICE_BYTES} bytes")
    return Alternatives(tuple(PlainText(text) for text in dict.fromkeys(texts)))


def rules(text: str, source: Source) -> Grammar:
    """A context-free grammar in Lark's syntax (``start: ...``), or in GBNF's, which is EBNF (``root ::= ...``)."""
    _limit_bytes(text, MAX_RULES_BYTES, "grammar", source)
    return Rules(text, source)


def concatenate(*parts: Grammar) -> Grammar:
    """Each part, one after another."""
    return Concatenation(parts)


def one_of(options: Iterable[Grammar]) -> Grammar:
    """One of the options."""
    return Alternatives(tuple(options))


def repeat(item: Grammar, *, separator: Grammar | None = None, least: int = 1, most: int | None = None) -> Grammar:
    """``item`` from ``least`` to ``most`` times, with ``separator`` between them."""
    assert least >= 0 and (most is None or most >= max(least, 1))
    return Repetition(item, literal("") if separator is None else separator, least, most)


def triggered(
    triggers: Iterable[tuple[str, Grammar]], *, most: int | None = None, least: int = 0, not_begin: str = ""
) -> Grammar:
    """Free text; wherever it has a trigger's text, the grammar beside it must follow.

    Several bodies of one trigger are ``one_of`` them. Special tokens may occur in free text, as without a grammar.
    The text does not begin with ``not_begin``; that takes ``most`` 1.
    """
    assert least == 0 or (most is not None and least <= most)
    assert not not_begin or (most, least) == (1, 0)
    return TriggeredText(tuple(triggers), most, least, not_begin)


def documents(grammar: Grammar) -> Iterable[RegexText | Document | Rules]:
    """The parts of a grammar that come from a request and may be refused."""
    pending = [grammar]
    while pending:
        part = pending.pop()
        if isinstance(part, RegexText | Document | Rules):
            yield part
        elif isinstance(part, Concatenation):
            pending += part.parts
        elif isinstance(part, Alternatives):
            pending += part.options
        elif isinstance(part, Repetition):
            pending += (part.item, part.separator)
        elif isinstance(part, TriggeredText):
            pending += (body for _, body in part.triggers)


def kind_of(part: RegexText | Document | Rules) -> str:
    """How messages name a part."""
    return {RegexText: "regular expression", Document: "schema", Rules: "grammar"}[type(part)]


def _limit_bytes(text: str, most: int, kind: str, source: Source) -> None:
    if len(text) > most or len(text.encode()) > most:
        raise refusal(source, kind, f"it has more than {most} bytes")
