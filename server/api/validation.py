"""A wrong body as one error in the server's own words: the field, what its value is, and what it should be.

pydantic and ``json`` find what is wrong; their sentences are for programmers of Python and are never shown. Values
are not repeated, but for numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.errors import InvalidRequest

Detail = Mapping[str, Any]
"""One of pydantic's errors: ``type``, ``loc``, ``msg``, ``input``, ``ctx``."""

MAX_PARAM_CHARS = 120
MAX_ALTERNATIVES = 8
_MAX_SHOWN_NUMBER = 10**20

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unsupported_parameter",
    "misspelled": "unknown_parameter",
    "unsupported": "unsupported_parameter",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "string_too_short": "string_below_min_length",
    "string_too_long": "string_above_max_length",
}
_BOUNDS = {
    "greater_than": ("gt", "below_min_value"),
    "greater_than_equal": ("ge", "below_min_value"),
    "less_than": ("lt", "above_max_value"),
    "less_than_equal": ("le", "above_max_value"),
}
_WANTED = {
    "bool_type": "be true or false",
    "int_type": "be an integer",
    "int_from_float": "be an integer",
    "int_parsing_size": "be an integer of 64 bits",
    "float_type": "be a number",
    "finite_number": "be a finite number",
    "string_type": "be a string",
    "string_unicode": "be valid Unicode",
    "list_type": "be an array",
    "tuple_type": "be an array",
    "dict_type": "be an object",
    "model_type": "be an object",
    "model_attributes_type": "be an object",
    "none_required": "be null",
    "invalid_key": "be an object whose keys are strings",
    "literal_error": "be {expected}",
    "enum": "be {expected}",
    "union_tag_invalid": "be of type {expected_tags}",
    "union_tag_not_found": "have a 'type'",
    "greater_than": "be greater than {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be less than {lt}",
    "less_than_equal": "be at most {le}",
    "multiple_of": "be a multiple of {multiple_of}",
    "too_short": "have at least {min_length} {items}",
    "too_long": "have at most {max_length} {items}",
    "string_too_short": "have at least {min_length} {characters}",
    "string_too_long": "have at most {max_length} {characters}",
    "string_pattern_mismatch": "match {pattern}",
}
_WRONG_JSON = {
    "Expecting value": "a value is expected there",
    "Expecting property name enclosed in double quotes": "a name in double quotes is expected there",
    "Expecting ':' delimiter": "a ':' is expected there",
    "Expecting ',' delimiter": "a ',' or the end of the array or object is expected there",
    "Unterminated string starting at": "the string that begins there has no end",
    "Invalid control character at": "there is a control character in a string, which must be escaped",
    "Invalid \\escape": "there is an unknown escape sequence",
    "Invalid \\uXXXX escape": "the '\\u' there needs four hex digits",
    "Extra data": "there is more behind the end of the value",
}
_KINDS: Sequence[tuple[type, str]] = (
    (bool, "true or false"),
    (int, "an integer"),
    (float, "a number"),
    (str, "a string"),
    (list, "an array"),
    (dict, "an object"),
)


def validation_error(details: Sequence[Detail], body: object) -> InvalidRequest:
    """The first of pydantic's errors of a body, where a value has several types what is wrong with the closest one."""
    first = details[0]
    if first["type"] == "json_invalid":
        return _wrong_json(first, body)
    rivals = [detail for detail in details[:MAX_ALTERNATIVES] if _field(detail, body) == _field(first, body)]
    deepest = max(rivals, key=lambda detail: len(_path(detail, body)))
    equals = [detail for detail in rivals if _path(detail, body) == _path(deepest, body)]
    wanted = list(dict.fromkeys(_wanted(detail) for detail in equals if detail["type"].endswith("_type")))
    return invalid_request(deepest, body, wanted=wanted if len(wanted) > 1 else ())


def invalid_request(detail: Detail, body: object = None, *, wanted: Sequence[str] = ()) -> InvalidRequest:
    """One of pydantic's errors as OpenAI's message, param and code; ``wanted`` are what the value may be."""
    context = detail.get("ctx", {})
    param = _joined(_path(detail, body))
    if param is None:
        value = detail.get("input")
        kind = "empty or null" if value is None else _kind(value)
        return InvalidRequest(f"The request body must be a JSON object, and it is {kind}.", code="invalid_json")
    code = _code(_type_of(detail), context)
    match code:
        case "missing_required_parameter":
            message = f"Missing required parameter: '{param}'."
        case "unknown_parameter":
            message = f"Unknown parameter: '{param}'. Did you mean '{context['intended']}'?"
        case "unsupported_parameter" if detail["type"] == "extra_forbidden":
            message = f"Unsupported parameter: '{param}' is not supported by this server."
        case _:
            message = f"Invalid '{param}': {_sentence(detail, wanted)}."
    return InvalidRequest(message, param=param, code=code)


def param_path(location: Iterable[str | int], body: object = None) -> str | None:
    """``("body", "messages", 2, "content")`` as ``messages[2].content``; None for the body itself.

    A step in parentheses, or one that the body does not have before others, is no field: it is how a union names the
    type that it tried.
    """
    return _joined(_steps(list(location)[1:], body, is_missing=True))


def _joined(steps: Iterable[str | int]) -> str | None:
    path = ""
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")[:MAX_PARAM_CHARS] or None


def _steps(location: Sequence[str | int], body: object, *, is_missing: bool) -> list[str | int]:
    """The steps that are fields and indices; ``is_missing``: the body need not have the last one."""
    named = [step for step in location if isinstance(step, int) or not step.startswith("(")]
    if not isinstance(body, dict):
        return named
    value: object = body
    steps: list[str | int] = []
    for place, step in enumerate(named):
        is_absent = is_missing and place == len(named) - 1
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and step < len(value) else None
        elif isinstance(value, dict) and (step in value or is_absent):
            value = value.get(step)
        else:
            continue
        steps.append(step)
    return steps


def _path(detail: Detail, body: object) -> list[str | int]:
    """The fields of an error; our own name in ``field`` which one below their location they mean."""
    field = [detail["ctx"]["field"]] if "field" in detail.get("ctx", {}) else []
    is_missing = bool(field) or detail["type"] in ("missing", "extra_forbidden")
    return _steps([*detail["loc"][1:], *field], body, is_missing=is_missing)


def _field(detail: Detail, body: object) -> list[str | int]:
    """The path up to the first union."""
    path = _path(detail, body)
    for length, (step, named) in enumerate(zip(path, detail["loc"][1:], strict=False)):
        if step != named:
            return path[:length]
    return path


def _sentence(detail: Detail, wanted: Sequence[str]) -> str:
    """Our own errors have a message that begins in lower case, a library's do not."""
    if detail["msg"][:1].islower():
        return str(detail["msg"])
    should = " or ".join(wanted).replace(" or be ", " or ") or _wanted(detail)
    return f"it should {should}, and {_what_it_is(detail)}"


def _wanted(detail: Detail) -> str:
    context = dict(detail.get("ctx", {}))
    length = context.get("min_length", context.get("max_length"))
    context["items"] = "item" if length == 1 else "items"
    context["characters"] = "character" if length == 1 else "characters"
    return _WANTED.get(_type_of(detail), "have another value").format(**context)


def _type_of(detail: Detail) -> str:
    """pydantic counts items also of a string that a validator of ours has seen before."""
    is_text = detail["type"] in ("too_short", "too_long") and isinstance(detail.get("input"), str)
    return f"string_{detail['type']}" if is_text else str(detail["type"])


def _what_it_is(detail: Detail) -> str:
    value = detail.get("input")
    if detail["type"] in ("too_short", "too_long", "string_too_short", "string_too_long"):
        return f"it has {len(value)}" if isinstance(value, str | list | dict) else f"it is {_kind(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "it is not"
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_SHOWN_NUMBER:
        return f"it is {value}"
    return "it is another" if detail["type"] in ("literal_error", "enum") else f"it is {_kind(value)}"


def _kind(value: object) -> str:
    if isinstance(value, int) and abs(value) >= _MAX_SHOWN_NUMBER:
        return "a very large integer"
    return next(
        (name for kind, name in _KINDS if isinstance(value, kind)), "null" if value is None else "another value"
    )


def _wrong_json(detail: Detail, body: object) -> InvalidRequest:
    """Where JSON text is wrong, in lines and columns from 1."""
    position, text = detail["loc"][-1], body if isinstance(body, str) else ""
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    reason = _WRONG_JSON.get(detail["ctx"]["error"], "it cannot be read there")
    return InvalidRequest(
        f"The request body is not valid JSON at line {line}, column {column}: {reason}.", code="invalid_json"
    )


def _code(error_type: str, context: Mapping[str, Any]) -> str:
    if error_type in _CODES:
        return _CODES[error_type]
    if error_type in _BOUNDS:
        key, code = _BOUNDS[error_type]
        return f"{'integer' if isinstance(context[key], int) else 'decimal'}_{code}"
    return "invalid_type" if error_type.endswith("_type") or error_type == "int_from_float" else "invalid_value"
