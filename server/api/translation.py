"""A body of another API as a chat request or a completion, whose errors are told in the names of that body."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError

from server.api.protocol import ChatRequest, CompletionRequest, GenerationRequest
from server.api.validation import validation_error
from server.errors import RequestError

Model = TypeVar("Model", bound=GenerationRequest)


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """A chat request of these fields, of which None is absent. Raises ``RequestError``."""
    return _validated(ChatRequest, fields)


def completion_request(fields: Mapping[str, Any]) -> CompletionRequest:
    """As ``chat_request``."""
    return _validated(CompletionRequest, fields)


def _validated(model: type[Model], fields: Mapping[str, Any]) -> Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        details = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
        raise validation_error(details, fields) from None


@contextmanager
def in_own_names(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors that name a field of the chat request name that of the body; ``names`` has the fields that differ.

    What is below a renamed field has another form in the body, so its path ends there.
    """
    try:
        yield
    except RequestError as error:
        field = (error.param or "").partition(".")[0].partition("[")[0]
        if field in names:
            _rename(error, names[field])
        raise


def _rename(error: RequestError, name: str) -> None:
    assert error.param is not None
    error.args = (str(error).replace(f"'{error.param}'", f"'{name}'"),)
    error.param = name
