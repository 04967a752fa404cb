"""The fields by which a request constrains its answers: OpenAI's ``response_format``, and vLLM's.

Without such a field no function of this module runs.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.model import RequestModel, Text
from server.errors import InvalidRequest
from server.text.grammar.grammar import Grammar, choice, json_object, json_schema, regex, rules
from server.text.grammar.schema import MAX_SCHEMA_BYTES, Source

MAX_FORMAT_NAME = 64
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")
CONSTRAINTS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
_GUIDED = ("json", "regex", "choice", "grammar")


def _schema_value(value: object) -> object:
    """A schema as an object, or, as vLLM takes it, as JSON text."""
    if isinstance(value, str):
        if len(value) > MAX_SCHEMA_BYTES:
            raise PydanticCustomError("string_too_long", f"it should have at most {MAX_SCHEMA_BYTES} characters")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise PydanticCustomError("json_schema", "it should be a JSON schema, as an object or text") from None
    if not isinstance(value, dict | bool):
        raise PydanticCustomError("object_type", "it should be a JSON schema")
    return value


JSONSchema = Annotated[dict[str, Any] | bool, BeforeValidator(_schema_value)]


class JSONSchemaFormat(RequestModel):
    """The schema of ``response_format``. Answers follow it also where ``strict`` is false."""

    name: Annotated[Text, Field(min_length=1, max_length=MAX_FORMAT_NAME)] = "schema"
    description: Text | None = None
    schema_value: JSONSchema | None = Field(None, alias="schema")
    strict: bool | None = None


class AnswerFormatField(RequestModel):
    """``response_format``: any text, any JSON object, or a JSON document by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("missing", "", {"field": "json_schema"})
        return self


class StructuredOutputs(RequestModel):
    """vLLM's ``structured_outputs``: one of these."""

    json_value: JSONSchema | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if len(self.names) != 1:
            raise PydanticCustomError(
                "structured_outputs", "it should name one of json, regex, choice, grammar, json_object"
            )
        return self

    @property
    def names(self) -> list[str]:
        """The constraints that are set."""
        return [name for name in (*_GUIDED, "json_object") if self.value(name) not in (None, False)]

    def value(self, name: str) -> Any:
        """The value of a constraint."""
        return self.json_value if name == "json" else getattr(self, name)


class ConstrainedRequest(RequestModel):
    """A request whose answers may be constrained, by one field."""

    response_format: AnswerFormatField | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JSONSchema | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None

    def answer_grammar(self) -> Grammar | None:
        """What the content of an answer may be; None for any text.

        Takes milliseconds for a large schema. Raises ``InvalidRequest`` for what is not supported, and for two fields.
        """
        names = self._constraints()
        if not names:
            return None
        if len(names) > 1:
            message = (
                f"Invalid '{names[1]}': it cannot be used together with '{names[0]}': one field constrains an answer."
            )
            raise InvalidRequest(message, param=names[1])
        if self.structured_outputs is not None:
            name = self.structured_outputs.names[0]
            return _guided(name, self.structured_outputs.value(name), f"structured_outputs.{name}")
        if names[0] == "response_format" and self.response_format is not None:
            return _of_format(self.response_format)
        return _guided(names[0].removeprefix("guided_"), getattr(self, names[0]), names[0])

    def _constraints(self) -> list[str]:
        is_text = self.response_format is not None and self.response_format.type == "text"
        names = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        return names[1:] if is_text else names


def _of_format(asked: AnswerFormatField) -> Grammar:
    format = asked.json_schema
    if format is None or format.schema_value is None:
        return json_object(Source("response_format", "response_format"))
    name = format.name if _PLAIN_NAME.fullmatch(format.name) else "schema"
    return json_schema(format.schema_value, Source("response_format", f"response_format '{name}'"))


def _guided(kind: str, value: Any, field: str) -> Grammar:
    source = Source(field, f"'{field}'")
    if kind == "json":
        return json_schema(value, source)
    if kind == "json_object":
        return json_object(source)
    if kind == "choice":
        return choice(value, source)
    if not value:
        raise InvalidRequest(f"Invalid '{field}': it is empty.", param=field)
    return regex(value, source) if kind == "regex" else rules(value, source)
