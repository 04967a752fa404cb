"""JSON schemas (draft 2020-12): which keywords are honoured, ignored or refused, and how large a schema may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from server.errors import InvalidRequest

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 64
"""Most nested arrays and objects in a schema."""
MAX_NODES = 20_000
"""Most values in a schema."""
MAX_PROPERTIES = 1000
"""Most properties of all objects of a schema."""

TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
FORMATS = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
)  # every string follows them; formats that no specification defines are notes
REFUSED_FORMATS = frozenset(
    {
        "idn-email",
        "idn-hostname",
        "iri",
        "iri-reference",
        "json-pointer",
        "regex",
        "relative-json-pointer",
        "uri-reference",
        "uri-template",
    }
)
REFUSED_KEYWORDS = frozenset(
    {
        "$dynamicRef",
        "$recursiveRef",
        "additionalItems",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)
_VALUES = frozenset(
    {
        "$ref",
        "const",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "pattern",
        "required",
        "type",
    }
)
_SCHEMAS = frozenset({"additionalProperties", "items"})
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_MAPS = frozenset({"$defs", "definitions", "patternProperties", "properties"})
KEYWORDS = _VALUES | _SCHEMAS | _LISTS | _MAPS | {"format"}
"""The keywords that are honoured. All others are notes (``title``, ``default``) and have no effect."""
_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
_NUMBERS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf")
_NEUTRAL: Mapping[str, Any] = {"uniqueItems": False}


@dataclass(frozen=True)
class Source:
    """Where a grammar comes from, for errors: the JSON path of its field, and how a message names it.

    For instance ``Source("response_format", "response_format 'person'")``.
    """

    param: str
    subject: str


def refusal(source: Source, kind: str, reason: str) -> InvalidRequest:
    """The error for a ``kind`` of grammar: a schema, a regular expression, a grammar, a choice."""
    return InvalidRequest(
        f"Invalid {kind} for {source.subject}: {reason}.", param=source.param, code="invalid_json_schema"
    )


def checked_schema(schema: Mapping[str, Any] | bool, source: Source, *, lenient: bool = False) -> dict[str, Any]:
    """The keywords of a schema that are honoured. Raises ``InvalidRequest`` for any that cannot be.

    With ``lenient`` keywords and formats that are not supported are left out.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    _check_size(schema, source)
    return _Check(source, lenient=lenient).keywords(schema, "")


def _check_size(schema: Mapping[str, Any], source: Source) -> None:
    """Limit depth and number of values before anything reads all of them."""
    pending: list[tuple[Any, int]] = [(schema, 1)]
    num_nodes = num_chars = 0
    while pending:
        value, depth = pending.pop()
        num_nodes += 1
        if depth > MAX_DEPTH:
            raise refusal(source, "schema", f"it is nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, dict):
            num_chars += sum(map(len, value))
            pending += ((item, depth + 1) for item in value.values())
        elif isinstance(value, list):
            pending += ((item, depth + 1) for item in value)
        elif isinstance(value, str):
            num_chars += len(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise refusal(source, "schema", "a number in it is not finite")
        if num_nodes + len(pending) > MAX_NODES:
            raise refusal(source, "schema", f"it has more than {MAX_NODES} values")
        if num_chars > MAX_SCHEMA_BYTES:
            raise refusal(source, "schema", f"it has more than {MAX_SCHEMA_BYTES} bytes")


class _Check:
    def __init__(self, source: Source, *, lenient: bool) -> None:
        self._source, self._lenient = source, lenient
        self._num_properties = 0

    def schema(self, schema: Any, path: str) -> Any:
        """A schema without notes, at ``path``, such as ``properties.age``."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            self._refuse(path, "it should be an object, or true or false")
        return self.keywords(schema, path)

    def keywords(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The honoured keywords of a schema that is an object."""
        checked: dict[str, Any] = {}
        for keyword, value in schema.items():
            where = f"{path}.{keyword}" if path else keyword
            if keyword in KEYWORDS:
                self._keyword(keyword, value, where, checked)
            elif keyword in REFUSED_KEYWORDS and value != _NEUTRAL.get(keyword, ...) and not self._lenient:
                self._refuse(where, "this keyword is not supported")
        return checked

    def _keyword(self, keyword: str, value: Any, path: str, checked: dict[str, Any]) -> None:
        if keyword in _SCHEMAS:
            if isinstance(value, list):
                self._refuse(path, "an array of schemas is written as 'prefixItems'")
            checked[keyword] = self.schema(value, path)
        elif keyword in _LISTS:
            checked[keyword] = self._list(value, path)
        elif keyword in _MAPS:
            checked[keyword] = self._map(keyword, value, path)
        elif keyword == "format":
            self._format(value, path, checked)
        else:
            self._check_value(keyword, value, path)
            checked[keyword] = value

    def _list(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            self._refuse(path, "it should be an array with at least one schema")
        return [self.schema(item, f"{path}[{number}]") for number, item in enumerate(value)]

    def _map(self, keyword: str, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self._refuse(path, "it should be an object of schemas")
        if keyword == "properties":
            self._num_properties += len(value)
            if self._num_properties > MAX_PROPERTIES:
                self._refuse("", f"it has more than {MAX_PROPERTIES} properties")
        return {name: self.schema(item, f"{path}.{name}") for name, item in value.items()}

    def _format(self, value: Any, path: str, checked: dict[str, Any]) -> None:
        if not isinstance(value, str):
            self._refuse(path, "it should be a string")
        if value in FORMATS:
            checked["format"] = value
        elif value in REFUSED_FORMATS and not self._lenient:
            self._refuse(path, f"the format '{value}' is not supported")

    def _check_value(self, keyword: str, value: Any, path: str) -> None:
        """Check the type of a keyword's value, so that the error can name its place."""
        if keyword == "type":
            names = value if isinstance(value, list) else [value]
            if not names or not all(isinstance(name, str) and name in TYPES for name in names):
                self._refuse(path, f"it should be one or several of {', '.join(sorted(TYPES))}")
        elif keyword == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            self._refuse(path, "only references into the schema itself ('#/$defs/...') are followed")
        elif keyword == "enum" and not (isinstance(value, list) and value):
            self._refuse(path, "it should be an array with at least one value")
        elif keyword == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            self._refuse(path, "it should be an array of strings")
        elif keyword == "pattern" and not isinstance(value, str):
            self._refuse(path, "it should be a string")
        elif keyword in _COUNTS and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31):
            self._refuse(path, "it should be an integer from 0 to 2147483647")
        elif keyword in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            self._refuse(path, "it should be a number")

    def _refuse(self, path: str, reason: str) -> NoReturn:
        shown = "".join(char if char.isprintable() else "?" for char in path)[-200:]
        raise refusal(self._source, "schema", f"at '{shown}': {reason}" if shown else reason)
