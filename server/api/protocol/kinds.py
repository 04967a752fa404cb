"""Values of several kinds in one list, such as content parts: ``type`` tells which model a value is."""

from __future__ import annotations

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError


def kind_of(value: object) -> str:
    """The tag of a value in a union: its ``type`` in parentheses, which keeps it out of the path of a field."""
    return f"({value['type']})" if isinstance(value, dict) else f"({getattr(value, 'type', None)})"


def only(*kinds: str, default: str | None = None) -> BeforeValidator:
    """Refuse values of other kinds by name; a value without a ``type`` has the ``default`` one."""

    def check(value: object) -> object:
        if not isinstance(value, dict):
            raise PydanticCustomError("object_type", "it should be a JSON object")
        if value.get("type") is None and default is not None:
            return {**value, "type": default}
        if value.get("type") not in kinds:
            message = f"this server supports {' and '.join(map(repr, kinds))} only"
            raise PydanticCustomError("unsupported", message, {"field": "type"})
        return value

    return BeforeValidator(check)


def as_list_of(kind: str) -> BeforeValidator:
    """A string as a list of one part of this kind; other values as they are."""

    def convert(value: object) -> object:
        return [{"type": kind, "text": value}] if isinstance(value, str) else value

    return BeforeValidator(convert)
