"""The base of all request bodies: JSON types are not converted, and ``null`` means absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.known_fields import LOOKALIKES
from server.api.protocol.misspelled import Spelling

MAX_FIELDS = 256


def well_formed(text: str) -> str:
    """The text. Raises an error if it cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "it is not valid Unicode: it holds half a surrogate pair") from None
    return text


def is_neutral(value: object, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of ``neutral``; false is not 0."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def _whole_number(value: object) -> object:
    """256 for 256.0, which some clients send; other values as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Location = tuple[str | int, ...]
Text = Annotated[str, AfterValidator(well_formed)]
Integer = Annotated[int, BeforeValidator(_whole_number)]


class RequestModel(BaseModel):
    """An object of a request. ``null`` means absent, and JSON types are not converted.

    ``ignored`` are known fields without effect. ``neutral`` are fields that are not supported, each with the values
    that have no effect; another value is refused. Any other field is taken and has no effect, unless it is a misspelled
    known one; ``fields_without_effect`` finds those that have none.
    """

    model_config = ConfigDict(strict=True, extra="ignore")
    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _keep_fields_with_effect(cls, raw: object) -> object:
        if not isinstance(raw, dict):
            raise PydanticCustomError("object_type", "it should be a JSON object")
        if len(raw) > MAX_FIELDS:
            raise PydanticCustomError("too_long", f"it should have at most {MAX_FIELDS} fields")
        kept = {}
        for name, value in raw.items():
            if name not in known_names(cls):
                _check_spelling(cls, name)
            elif value is None:
                continue
            elif name in field_names(cls):
                kept[name] = value
            elif not is_neutral(value, cls.neutral.get(name, (value,))):
                cls.refuse(name)
        return kept

    @classmethod
    def refuse(cls, name: str) -> None:
        """Raises the error of a field that is not supported."""
        raise PydanticCustomError("unsupported", "it is not supported by this server", {"field": name})


def _check_spelling(model: type[RequestModel], name: str) -> None:
    intended = None if name in LOOKALIKES else _spelling(model).intended(name)
    if intended is not None:
        raise PydanticCustomError("misspelled", "it is unknown", {"field": name, "intended": intended})


@cache
def field_names(model: type[RequestModel]) -> Mapping[str, str]:
    """The names in JSON of the fields that a model honours, and those of its attributes."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


@cache
def known_names(model: type[RequestModel]) -> frozenset[str]:
    """The fields that a model honours, ignores or refuses."""
    return frozenset([*field_names(model), *model.ignored, *model.neutral])


@cache
def _spelling(model: type[RequestModel]) -> Spelling:
    return Spelling(known_names(model))


def fields_without_effect(raw: object, model: RequestModel, *, known: bool) -> Iterator[Location]:
    """Locations of the fields of ``raw``, the JSON of ``model``, that had no effect, at every level.

    Those are the unknown ones, and with ``known`` also those of ``ignored``.
    """
    if not isinstance(raw, dict):
        return
    for name, value in raw.items():
        is_ignored = name in model.ignored and name not in type(model).model_fields
        if value is not None and (name not in known_names(type(model)) or (known and is_ignored)):
            yield (name,)
    for name, attribute in field_names(type(model)).items():
        for place, item, parsed in _nested(name, raw.get(name), getattr(model, attribute)):
            for location in fields_without_effect(item, parsed, known=known):
                yield (*place, *location)


def _nested(name: str, raw: object, value: object) -> Iterator[tuple[Location, object, RequestModel]]:
    """The models in a field, each with its location and JSON; none where a validator replaced the JSON by another."""
    if isinstance(value, RequestModel):
        yield (name,), raw, value
    elif isinstance(value, list) and isinstance(raw, list) and len(raw) == len(value):
        for index, (item, parsed) in enumerate(zip(raw, value, strict=True)):
            if isinstance(parsed, RequestModel):
                yield (name, index), item, parsed
