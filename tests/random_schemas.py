"""Random JSON schemas, and the length of their longest document, for tests of constrained answers.

``random_schema`` gives schemas of which every document is short: no recursion, and limits on every string, number,
array and object. ``longest_document`` bounds the characters of any document by such a schema.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

WORDS = ("id", "name", "city", "unit", "größe", "price", "tags", "kind", "date", "naïve", 'a"b', "x y", "东京", "n/a")
PATTERNS = {"^[a-z]{1,6}$": 6, "^[A-Z]{2}-[0-9]{1,3}$": 6, "^(red|green|blue)$": 5, "^\\d{4}$": 4}
FORMATS = {"date": 10, "ipv4": 15, "uuid": 36}


def random_schema(source: random.Random, *, depth: int = 3) -> dict[str, Any]:
    """A schema of which every document is bounded; an object at the top, as clients send."""
    return _object(source, depth)


def longest_document(schema: Any) -> int:
    """At least the characters of the longest document of a schema by ``random_schema``, as JSON text."""
    if "anyOf" in schema:
        return max([longest_document(option) for option in schema["anyOf"]])
    if "enum" in schema:
        return max(map(_length, schema["enum"]))
    if "const" in schema:
        return _length(schema["const"])
    kind = schema["type"]
    if kind == "object":
        return 2 + sum(_length(name) + 4 + longest_document(item) for name, item in schema["properties"].items())
    if kind == "array":
        return 2 + int(schema["maxItems"]) * (2 + longest_document(schema["items"]))
    if kind == "string":
        return 2 + 6 * _longest_string(schema)
    lengths = {"integer": 8, "number": 40, "boolean": 5, "null": 4}
    return lengths[kind]


def _longest_string(schema: Mapping[str, Any]) -> int:
    if "pattern" in schema:
        return PATTERNS[schema["pattern"]]
    return FORMATS[schema["format"]] if "format" in schema else int(schema["maxLength"])


def _length(value: object) -> int:
    return len(json.dumps(value))


def _any(source: random.Random, depth: int) -> dict[str, Any]:
    leaves = [_string, _integer, _literal, _boolean, _nullable]
    if depth <= 0:
        return source.choice(leaves)(source, depth)
    return source.choice([*leaves, _object, _object, _array, _options])(source, depth)


def _object(source: random.Random, depth: int) -> dict[str, Any]:
    names = source.sample(WORDS, source.randint(1, 4))
    properties = {name: _any(source, depth - 1) for name in names}
    required = [name for name in names if source.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(source: random.Random, depth: int) -> dict[str, Any]:
    least = source.randint(0, 2)
    return {"type": "array", "items": _any(source, depth - 1), "minItems": least, "maxItems": least + 1}


def _options(source: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(source, depth - 1) for _ in range(source.randint(2, 3))]}


def _string(source: random.Random, depth: int) -> dict[str, Any]:
    kind = source.random()
    if kind < 0.25:
        return {"type": "string", "pattern": source.choice(list(PATTERNS))}
    if kind < 0.45:
        return {"type": "string", "format": source.choice(list(FORMATS))}
    least = source.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + source.randint(0, 8)}


def _integer(source: random.Random, depth: int) -> dict[str, Any]:
    least = source.randint(-1000, 1000)
    schema = {"type": "integer", "minimum": least, "maximum": least + source.randint(0, 2000)}
    return {**schema, "multipleOf": 5, "maximum": least + 100} if source.random() < 0.2 else schema


def _literal(source: random.Random, depth: int) -> dict[str, Any]:
    values = ["red", "green", "日本", 'quo"te', 7, -1.5, None, True, [1, "two"], {"k": "v"}, "<|im_end|>"]
    if source.random() < 0.3:
        return {"const": source.choice(values)}
    return {"enum": source.sample(values, source.randint(1, 4))}


def _boolean(source: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _nullable(source: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_string(source, depth), {"type": "null"}]}
