"""Grammars in llguidance's format: rules in its dialect of Lark, and the schemas that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from server.text.grammar.grammar import (
    Alternatives,
    Concatenation,
    Document,
    Grammar,
    LiteralText,
    PlainText,
    RegexText,
    Repetition,
    Rules,
    TriggeredText,
)

_ON_ONE_LINE: Mapping[str, Any] = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
_ANY_OBJECT: Mapping[str, Any] = {"type": "object", "x-guidance": {"whitespace_pattern": r"[ ]|\n[ ]{0,16}"}}
_FREE_TEXT = r"FREE_TEXT: /(.|\n)*/"


def library_grammar(grammar: Grammar, special_tokens: Mapping[str, int], eos_id: int) -> str:
    """The text from which llguidance builds a matcher. ``special_tokens`` are names and ids."""
    writer = _Writer(special_tokens, eos_id)
    start = writer.expression(grammar)
    lines = [f"start: {start}", *writer.lines]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}, *writer.grammars]}, ensure_ascii=False)


@dataclass
class _Writer:
    special_tokens: Mapping[str, int]
    eos_id: int
    lines: list[str] = field(default_factory=list)
    documents: dict[Document, str] = field(default_factory=dict)
    grammars: list[dict[str, Any]] = field(default_factory=list)

    def expression(self, grammar: Grammar) -> str:
        """The expression of a grammar in a rule; it is one item, or in parentheses."""
        if isinstance(grammar, LiteralText):
            return self._literal(grammar.text)
        if isinstance(grammar, PlainText):
            return json.dumps(grammar.text, ensure_ascii=False)
        if isinstance(grammar, RegexText):
            return f"/{regex_to_lark(grammar.regex)}/" if grammar.regex else '""'
        if isinstance(grammar, Document):
            if grammar not in self.documents:
                self.documents[grammar] = self._document(grammar)
            return self.documents[grammar]
        if isinstance(grammar, Rules):
            return self._named({"lark_grammar": _as_lark(grammar.text)})
        if isinstance(grammar, Concatenation):
            return f"({' '.join(map(self.expression, grammar.parts))})"
        if isinstance(grammar, Alternatives):
            return self._rule(" | ".join(map(self.expression, grammar.options)))
        if isinstance(grammar, Repetition):
            return self._repetition(grammar)
        return self._triggered(grammar)

    def _literal(self, text: str) -> str:
        if not self.special_tokens:
            return json.dumps(text, ensure_ascii=False)
        names = "|".join(re.escape(name) for name in sorted(self.special_tokens, key=len, reverse=True))
        parts = [part for part in re.split(f"({names})", text) if part]
        items = [self._token(part) or json.dumps(part, ensure_ascii=False) for part in parts]
        return f"({' '.join(items)})" if items else '""'

    def _token(self, text: str) -> str | None:
        number = self.special_tokens.get(text)
        return None if number is None else f"<[{number}]>"

    def _document(self, document: Document) -> str:
        if document.schema is None:
            return self._named({"json_schema": _ANY_OBJECT})
        return self._named({"json_schema": {**json.loads(document.schema), "x-guidance": _ON_ONE_LINE}})

    def _repetition(self, repetition: Repetition) -> str:
        item, separator = self.expression(repetition.item), self.expression(repetition.separator)
        least, most = max(repetition.least, 1) - 1, "" if repetition.most is None else repetition.most - 1
        whole = f"({item} ({separator} {item}){{{least},{most}}})"
        return whole if repetition.least else f"{whole}?"

    def _triggered(self, grammar: TriggeredText) -> str:
        """Free text, and the bodies behind triggers: behind text by a lazy lexeme, which ends at the trigger."""
        if _FREE_TEXT not in self.lines:
            self.lines.append(_FREE_TEXT)
        bodies = [(trigger, self.expression(body)) for trigger, body in grammar.triggers]
        triggers = {self.special_tokens[trigger] for trigger, _ in grammar.triggers if trigger in self.special_tokens}
        others = sorted(set(self.special_tokens.values()) - triggers - {self.eos_id})
        free = self._free("FREE_TEXT", others)
        body = self._bodies("FREE_TEXT", bodies)
        if grammar.not_begin:
            first = self._first_text(grammar.not_begin)
            behind_token = f" | {self._first_token(first, others, grammar.not_begin)} {free}* (FREE_TEXT | {body})"
            return self._rule(f"{first} | {self._bodies(first, bodies)}{behind_token if others else ''}")
        if grammar.most is None:
            return self._rule(f"({' | '.join([*([free] if free else []), body])})* FREE_TEXT")
        text = f"{free}* FREE_TEXT" if free else "FREE_TEXT"
        item = f"({free}* {body})" if free else body
        bodies_only = f"{item}{{{max(grammar.least, 1)},{grammar.most}}}"
        return self._rule(bodies_only if grammar.least else f"{text} | {bodies_only}")

    def _first_text(self, not_begin: str) -> str:
        """Free text that does not begin with ``not_begin``: any, if that is a special token."""
        if not_begin in self.special_tokens:
            return "FREE_TEXT"
        name = f"FIRST_TEXT_{len(self.lines)}"
        self.lines.append(rf"{name}: FREE_TEXT & ~/[ \t\r\n]*{regex_to_lark(re.escape(not_begin))}(.|\n)*/")
        return name

    def _first_token(self, first: str, others: Sequence[int], not_begin: str) -> str:
        """The ``first`` text and a special token, which is not ``not_begin`` behind white space."""
        number = self.special_tokens.get(not_begin)
        allowed = self._free(first, [other for other in others if other != number])
        if number is None:
            return str(allowed)
        name = f"TEXT_{len(self.lines)}"
        self.lines.append(rf"{name}: FREE_TEXT & ~/[ \t\r\n]*/")
        return self._rule(" | ".join(filter(None, [allowed, f"{name} <[{number}]>"])))

    def _free(self, text: str, others: Sequence[int]) -> str | None:
        """``text`` and one of the special tokens ``others``; None if there are none."""
        return self._rule(f"{text} <[{','.join(map(str, others))}]>") if others else None

    def _bodies(self, text: str, bodies: Sequence[tuple[str, str]]) -> str:
        """``text``, a trigger and its body."""
        return self._rule(" | ".join(self._behind(text, trigger, body) for trigger, body in bodies))

    def _behind(self, text: str, trigger: str, body: str) -> str:
        token = self._token(trigger)
        if token is not None:
            return self._rule(f"{text} {token} {body}")
        name = f"trigger_{len(self.lines)}"
        self.lines.append(f"{name}[lazy]: {text} {json.dumps(trigger, ensure_ascii=False)}")
        return self._rule(f"{name} {body}")

    def _rule(self, expression: str) -> str:
        name = f"rule_{len(self.lines)}"
        self.lines.append(f"{name}: {expression}")
        return name

    def _named(self, grammar: dict[str, Any]) -> str:
        name = f"part_{len(self.grammars)}"
        self.grammars.append({"name": name, **grammar})
        return f"@{name}"


def _as_lark(text: str) -> str:
    """Rules in Lark's syntax, converted from GBNF's if they are written in that."""
    if "::=" not in text:
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        if lines and line.lstrip().startswith("|"):  # the converter wants alternatives on the line before
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return gbnf_to_lark("\n".join(lines))
