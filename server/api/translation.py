"""A body of another API as a chat request, whose errors are told in the names of that body."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from server.api.protocol import ChatRequest
from server.api.validation import invalid_request
from server.errors import RequestError


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """A chat request of these fields, of which None is absent. Raises ``RequestError``."""
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        detail = error.errors()[0]
        raise invalid_request({**detail, "loc": ("body", *detail["loc"])}) from None


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
