"""What request bodies are really accepted: pydantic's JSON schema knows types, not the validators in front of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from server.api.protocol.model import RequestModel

Schema = dict[str, Any]

_TOKEN_IDS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPTS: Schema = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        _TOKEN_IDS,
        {"type": "array", "minItems": 1, "items": _TOKEN_IDS},
    ]
}
CONVERTED: Mapping[str, Mapping[str, Schema]] = {
    "CompletionRequest": {"prompt": _PROMPTS},
    "EmbeddingRequest": {"input": _PROMPTS},
}
"""Fields that a ``PlainValidator`` reads, by the name of their model."""
_BIASES: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": 1024,
}
_ALSO: Mapping[str, Schema] = {
    "stop": {"type": "string", "minLength": 1, "maxLength": 1024},
    "content": {"type": "string"},
    "input": {"type": "string"},
    "system": {"type": "string"},
    "output": {"type": "string"},
}
"""Fields that also take a single value instead of an array."""


_OPTIONAL: Mapping[str, str] = {"InputMessage": "type"}
"""Fields that a validator fills in before they are required, by the name of their model."""


def make_true(schemas: dict[str, Schema]) -> None:
    """Correct the schemas of request bodies in place."""
    for model in {model.__name__: model for model in _subclasses(RequestModel)}.values():
        if model.__name__ in schemas:
            _make_true(model, schemas[model.__name__])


def _make_true(model: type[RequestModel], schema: Schema) -> None:
    properties: dict[str, Schema] = schema.setdefault("properties", {})
    if model.__name__ in _OPTIONAL:
        schema["required"] = [name for name in schema["required"] if name != _OPTIONAL[model.__name__]]
    converted = CONVERTED.get(model.__name__, {})
    for name, field in list(properties.items()):
        if name == "logit_bias":
            properties[name] = _BIASES
        elif name in converted:
            properties[name] = converted[name]
        elif name in _ALSO and not any(each.get("type") == "string" for each in _alternatives(field)):
            properties[name] = {"anyOf": [_ALSO[name], *_alternatives(field)]}
    for name in sorted(model.ignored - properties.keys()):
        properties[name] = {"description": "Has no effect."}
    for name, values in sorted(model.neutral.items()):
        properties.setdefault(name, {"enum": list(values), "description": "Not supported with another value."})
    for name in properties.keys() - set(schema.get("required", ())):
        properties[name] = _nullable(properties[name])


def _nullable(field: Schema) -> Schema:
    """Null is the same as absent."""
    if "anyOf" not in field and "type" not in field and "enum" not in field and "$ref" not in field:
        return field
    alternatives = _alternatives(field)
    if any(each.get("type") == "null" for each in alternatives):
        return field
    kept: Schema = {key: field[key] for key in ("default", "description", "title") if key in field}
    return {"anyOf": [*alternatives, {"type": "null"}], **kept}


def _alternatives(field: Schema) -> list[Schema]:
    if "anyOf" in field:
        return list(field["anyOf"])
    return [{key: value for key, value in field.items() if key not in ("default", "description", "title")}]


def _subclasses(model: type[RequestModel]) -> Iterator[type[RequestModel]]:
    for child in model.__subclasses__():
        yield child
        yield from _subclasses(child)
