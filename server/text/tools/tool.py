"""What a request says about a tool, and what a format of calls does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from server.text.grammar.grammar import Grammar, json_schema
from server.text.grammar.limits import MAX_GRAMMAR_BYTES
from server.text.grammar.schema import Source, checked_schema, refusal
from server.text.stepped_parser import PartWriter
from server.text.text_reader import Steps, TextReader

_SCHEMAS = {"additionalProperties", "anyOf", "items", "oneOf", "prefixItems"}
_DEFINITIONS = ("$defs", "definitions")
_SCHEMAS_BY_NAME = {*_DEFINITIONS, "patternProperties", "properties"}
MAX_FAILED_CALLS = 8
"""Texts that look like the beginning of a call and are none, before the rest of an answer is taken as text."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON schema of its arguments, and ``source`` its place.

    Keywords of the schema that a grammar cannot follow are refused with ``strict``, and otherwise ignored.
    """

    name: str
    source: Source
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def json_arguments(self) -> Grammar:
        """Arguments as a JSON object. Raises ``InvalidRequest`` for a schema that cannot be followed."""
        lenient = not self.strict
        checked = checked_schema(self.parameters, self.source, lenient=lenient)
        return json_schema(closed({"type": "object", **checked}), self.source, lenient=lenient)

    def check_arguments(self) -> None:
        """Raises ``InvalidRequest`` for a schema that is too large, with all definitions for each argument."""
        checked = checked_schema(self.parameters, self.source, lenient=not self.strict)
        definitions = json.dumps({key: checked[key] for key in _DEFINITIONS if key in checked})
        if len(definitions) * len(checked.get("properties", ())) > MAX_GRAMMAR_BYTES:
            raise refusal(self.source, "schema", "it is too large, with its definitions for each argument")

    def argument_schemas(self) -> dict[str, Any]:
        """The schema of each argument, with the definitions that its references name."""
        properties = self.parameters.get("properties")
        named = {key: self.parameters[key] for key in _DEFINITIONS if key in self.parameters}
        if not isinstance(properties, Mapping):
            return {}
        return {key: {**named, **value} if isinstance(value, Mapping) else value for key, value in properties.items()}

    def requires(self, argument: str) -> bool:
        """Whether an argument must be there."""
        required = self.parameters.get("required")
        return isinstance(required, list) and argument in required


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose objects have only the properties that it names, unless it says that they may have others.

    Without that a model may add arguments for ever. A schema with ``allOf`` is left as it is: each part of it
    names only some of the properties.
    """
    return dict(schema) if _has_all_of(schema) else _closed(schema)


def _has_all_of(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_has_all_of, schema))
    return isinstance(schema, Mapping) and ("allOf" in schema or any(map(_has_all_of, schema.values())))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for keyword in _SCHEMAS & found.keys():
        found[keyword] = _closed(found[keyword])
    for keyword in _SCHEMAS_BY_NAME & found.keys():
        found[keyword] = {name: _closed(value) for name, value in found[keyword].items()}
    if "properties" in found and "patternProperties" not in found:
        found.setdefault("additionalProperties", False)
    return found


class CallGrammar(NamedTuple):
    """One call: literal text before and behind the arguments."""

    before: str
    arguments: Grammar
    behind: str


class ToolFormat(Protocol):
    """How a family of models writes calls."""

    @property
    def name(self) -> str:
        """Its name in a sidecar's ``tool_format``."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens, which the parser has to see."""

    @property
    def trigger(self) -> str:
        """With what a call in the middle of an answer begins; "": a call is possible only at the beginning."""

    @property
    def opening(self) -> str:
        """Text before all calls of an answer."""

    @property
    def separator(self) -> str | None:
        """Text between two calls; None if an answer has only one."""

    @property
    def closing(self) -> str:
        """Text behind all calls."""

    def read(self, reader: TextReader, writer: PartWriter, tools: Sequence[Tool]) -> Steps[None]:
        """Text and calls up to the end of the answer."""

    def grammar(self, tool: Tool) -> CallGrammar:
        """One call of ``tool``. Raises ``InvalidRequest`` for a schema that cannot be followed."""

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        """One call, as the model writes it."""
