"""The body of an error in the form of the API that was called, which the path of the request tells.

Errors are written as OpenAI's, ``{"error": {"message", "type", "param", "code"}}``; Anthropic's and Ollama's clients
read another body.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

ANTHROPIC_PATH, OLLAMA_PATH = "/v1/messages", "/api/"
_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_in_form_of(path: str, body: Json, *, status: int, request_id: str) -> Json:
    """OpenAI's error body in the form of the API at a path."""
    if path.startswith(ANTHROPIC_PATH):
        return anthropic_error(body, status=status, request_id=request_id)
    return ollama_error(body) if path.startswith(OLLAMA_PATH) else body


def request_id_header(path: str, request_id: str) -> dict[str, str]:
    """The header that Anthropic's clients read; ``x-request-id`` is on every response."""
    return {"request-id": request_id} if path.startswith(ANTHROPIC_PATH) else {}


def anthropic_error(body: Json, *, status: int, request_id: str) -> Json:
    """Anthropic's error: the type follows from the status; ``details`` has OpenAI's code, and the field."""
    openais = body["error"]
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    details = {"error_code": openais["code"], "param": openais["param"]}
    error = {"type": kind, "message": openais["message"], "details": details}
    return {"type": "error", "error": error, "request_id": request_id}


def ollama_error(body: Json) -> Json:
    """Ollama's error: the message alone."""
    return {"error": body["error"]["message"]}
