"""The base of all request bodies: JSON types are not converted, and ``null`` means absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "it is not valid Unicode: it holds half a surrogate pair") from None
    return text


def is_neutral(value: object, neutral: tuple[Any, ...]) -> bool:
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


class RequestModel(BaseModel):
    """JSON types are not converted, ``null`` means absent, and unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_without_effect(cls, raw: object) -> object:
        if not isinstance(raw, dict):
            raise PydanticCustomError("object_type", "it should be a JSON object")
        present = {key: value for key, value in raw.items() if value is not None and key not in cls.ignored}
        return {key: value for key, value in present.items() if not is_neutral(value, cls.neutral.get(key, ()))}


Text = Annotated[str, AfterValidator(well_formed)]
