"""Errors as HTTP: the only place that knows the status, type and code of each error.

Bodies are OpenAI's envelope, ``{"error": {"message", "type", "param", "code"}}``, made by one function for responses
and for stream events; ``envelopes`` has the forms of other APIs. Of the request they repeat names of fields only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from server.api.envelopes import OLLAMA_PATH, error_in_form_of, request_id_header
from server.api.routing import RouteTable
from server.api.validation import validation_error
from server.errors import (
    AdapterBusy,
    AdapterNotLoaded,
    AdapterPending,
    AdapterRejected,
    AdminOff,
    BaseModelRefused,
    BodyTooLarge,
    ConcurrencyLimitExceeded,
    ContextLengthExceeded,
    EngineUnavailable,
    GenerationFailed,
    HostNotAllowed,
    InsufficientPermissions,
    InvalidKey,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    QueueFull,
    QueueShareFull,
    QueueTimeout,
    QuickchangeError,
    RateLimitExceeded,
    RequestError,
    ServerOverloaded,
    SettingsError,
    ShuttingDown,
    StartFailed,
    TooManySequences,
    TooManyWrongKeys,
    UnsupportedParameter,
    VersionMoved,
)

_log = logging.getLogger("quickchange.api")
_OVERLOADS = (QueueFull, QueueTimeout, ServerOverloaded)
_CLIENT, _SERVER, _BUSY = "invalid_request_error", "server_error", "service_unavailable_error"
_LIMITED = "rate_limit_error"
_MAX_RETRY_AFTER = 60  # seconds: OpenAI's clients do not wait longer
_CLIENT_CLOSED_REQUEST = 499


class ClientGone(Exception):
    """The client disconnected before its response was complete."""


@dataclass(frozen=True)
class ErrorReply:
    """The reply to a class of errors; ``retry_after`` is in seconds."""

    status: int
    type: str
    code: str | None
    retry_after: int | None = None


INTERNAL = ErrorReply(500, _SERVER, "internal_error")
ERROR_REPLIES: Mapping[type[QuickchangeError], ErrorReply] = {
    InvalidRequest: ErrorReply(400, _CLIENT, "invalid_value"),
    UnsupportedParameter: ErrorReply(400, _CLIENT, "unsupported_parameter"),
    ContextLengthExceeded: ErrorReply(400, _CLIENT, "context_length_exceeded"),
    PromptTooLong: ErrorReply(400, _CLIENT, "context_length_exceeded"),
    BodyTooLarge: ErrorReply(413, _CLIENT, "request_too_large"),
    TooManySequences: ErrorReply(400, _CLIENT, "too_many_sequences"),
    ModelNotFound: ErrorReply(404, _CLIENT, "model_not_found"),
    InvalidKey: ErrorReply(401, _CLIENT, "invalid_api_key"),
    InsufficientPermissions: ErrorReply(403, _CLIENT, "insufficient_permissions"),
    AdapterBusy: ErrorReply(429, _LIMITED, "adapter_busy"),
    VersionMoved: ErrorReply(409, _CLIENT, "version_conflict"),
    RateLimitExceeded: ErrorReply(429, _LIMITED, "rate_limit_exceeded"),
    ConcurrencyLimitExceeded: ErrorReply(429, _LIMITED, "rate_limit_exceeded"),
    QueueShareFull: ErrorReply(429, _LIMITED, "rate_limit_exceeded"),
    TooManyWrongKeys: ErrorReply(429, _LIMITED, "rate_limit_exceeded"),
    HostNotAllowed: ErrorReply(403, _CLIENT, "host_not_allowed"),
    AdminOff: ErrorReply(403, _CLIENT, "admin_off"),
    QueueFull: ErrorReply(503, _BUSY, "server_overloaded", retry_after=1),
    QueueTimeout: ErrorReply(503, "timeout_error", "queue_timeout"),
    ServerOverloaded: ErrorReply(503, _BUSY, "server_overloaded", retry_after=1),
    AdapterPending: ErrorReply(503, _BUSY, "adapter_pending", retry_after=1),
    AdapterNotLoaded: ErrorReply(503, _BUSY, "adapter_not_loaded", retry_after=5),
    ShuttingDown: ErrorReply(503, _BUSY, "shutting_down", retry_after=5),
    EngineUnavailable: ErrorReply(503, _BUSY, "engine_unavailable", retry_after=5),
    GenerationFailed: ErrorReply(500, _SERVER, "generation_failed"),
    AdapterRejected: ErrorReply(400, _CLIENT, "adapter_rejected"),
    BaseModelRefused: INTERNAL,
    SettingsError: INTERNAL,
    StartFailed: INTERNAL,
}

_HTTP_CODES: Mapping[int, tuple[str | None, str]] = {
    400: (
        "invalid_json",
        "The request body cannot be read as JSON: it must be UTF-8, without very deep nesting and very long numbers.",
    ),
    404: ("unknown_url", "Unknown request URL: see /v1/models, /v1/chat/completions and /v1/completions."),
    405: ("method_not_allowed", "This method is not allowed here."),
    408: ("request_timeout", "The request body did not arrive in time."),
    413: ("request_too_large", "The request body is too large."),
    415: ("unsupported_media_type", "The body must be JSON, with 'Content-Type: application/json'."),
}


@dataclass(frozen=True)
class Reply:
    """An error as status, body and headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    def response(self, scope: Scope) -> Response:
        """The response to the request with this ASGI scope, in the form of the API that it called."""
        path, request_id = scope["path"], scope["state"]["request_id"]
        body = error_in_form_of(path, self.body, status=self.status, request_id=request_id)
        return JSONResponse(body, self.status, {**self.headers, **request_id_header(path, request_id)})


def error_body(message: str, *, type: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's envelope."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def reply_to(error: Exception, *, request_id: str) -> Reply:
    """The reply to any error. A status of 500 tells the request id only, not what went wrong."""
    kind = ERROR_REPLIES.get(type(error), INTERNAL) if isinstance(error, QuickchangeError) else INTERNAL
    code = error.code if isinstance(error, InvalidRequest) else kind.code
    param = error.param if isinstance(error, RequestError) else None
    message = str(error)
    known = error.retry_after if isinstance(error, QuickchangeError) else None
    retry_after = kind.retry_after if known is None else known
    headers = {} if retry_after is None else {"Retry-After": str(_whole_seconds(retry_after))}
    if isinstance(error, InvalidKey):
        headers["WWW-Authenticate"] = "Bearer"
    if kind.status == INTERNAL.status:
        message = f"The server failed to answer this request. Its id in the server's log is {request_id}."
        headers["x-should-retry"] = "false"  # OpenAI's clients would repeat the request twice
    return Reply(kind.status, error_body(message, type=kind.type, code=code, param=param), headers)


def _whole_seconds(seconds: float) -> int:
    return max(1, min(math.ceil(seconds), _MAX_RETRY_AFTER))


def http_reply(status: int, headers: Mapping[str, str] | None = None, message: str | None = None) -> Reply:
    """The reply to an HTTP status without an error of ours."""
    code, known = _HTTP_CODES.get(status, (None, "The request cannot be served."))
    return Reply(status, error_body(message or known, type=_CLIENT, code=code), dict(headers or {}))


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of the application a reply; ``RequestMiddleware`` replies to bugs."""
    app.add_exception_handler(QuickchangeError, _on_known_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGone, _on_client_gone)


async def _on_known_error(request: Request, error: Exception) -> Response:
    reply = reply_to(error, request_id=request.state.request_id)
    if reply.status >= INTERNAL.status:
        # a full queue is no fault, and under load it would be a line for each request
        level = logging.DEBUG if isinstance(error, _OVERLOADS) else logging.ERROR
        _log.log(level, "request_id=%s %s: %s", request.state.request_id, type(error).__name__, error)
    return reply.response(request.scope)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    reply = reply_to(validation_error(error.errors(), error.body), request_id=request.state.request_id)
    return reply.response(request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """A path or method that is unknown, or an error while the body was read, which FastAPI wraps."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, QuickchangeError):
        return await _on_known_error(request, error.__cause__)
    routes = request.app.state.routes
    assert isinstance(routes, RouteTable)
    path = request.scope["path"]
    headers, message = dict(error.headers or {}), None
    if error.status_code == 405:
        headers["Allow"] = ", ".join(routes.methods(path))
        message = f"This path has no method {request.method:.20}; it has {headers['Allow']}."
    meant = routes.meant_by(path) if error.status_code == 404 else None
    if meant is not None:
        message = f"Unknown request URL. Did you mean {meant}? A client's base URL ends in /v1, once."
    elif error.status_code == 404 and path.startswith(OLLAMA_PATH):
        message = "Unknown request URL: of Ollama's API there are chat, generate, embed, tags, show, ps and version."
    return http_reply(error.status_code, headers, message).response(request.scope)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
