"""The OpenAPI document of an application: FastAPI's, with what it cannot know of statuses, media types and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.auth.routes import PROBES
from server.api.envelopes import ANTHROPIC_PATH, OLLAMA_PATH
from server.api.openapi import answers
from server.api.openapi.bodies import make_true

Json = dict[str, Any]
JSON, SSE, NDJSON, HTML, TEXT = (
    "application/json",
    "text/event-stream",
    "application/x-ndjson",
    "text/html",
    "text/plain",
)
OPENMETRICS = "application/openmetrics-text"


@dataclass(frozen=True)
class Success:
    """A successful answer: a model as JSON, with ``stream`` also in this media type, or text of ``media_types``."""

    model: type[BaseModel] | None = None
    stream: str | None = None
    media_types: tuple[str, ...] = ()


SUCCESSES: Mapping[tuple[str, str], Success] = {
    ("post", "/v1/chat/completions"): Success(answers.ChatCompletion, SSE),
    ("post", "/v1/completions"): Success(answers.Completion, SSE),
    ("post", "/v1/responses"): Success(answers.Response, SSE),
    ("post", "/v1/embeddings"): Success(answers.EmbeddingsAnswer),
    ("post", "/tokenize"): Success(answers.Tokens),
    ("post", "/v1/tokenize"): Success(answers.Tokens),
    ("post", "/detokenize"): Success(answers.DetokenizedText),
    ("post", "/v1/detokenize"): Success(answers.DetokenizedText),
    ("get", "/v1/models"): Success(answers.ServedModels),
    ("get", "/v1/models/{model}"): Success(answers.ServedModel),
    ("delete", "/v1/models/{model}"): Success(answers.DeletedModel),
    ("post", "/v1/models/{model}/pin"): Success(answers.PinnedModel),
    ("post", "/v1/models/{model}/unpin"): Success(answers.PinnedModel),
    ("post", "/v1/models/{model}/rollback"): Success(answers.PinnedModel),
    ("post", "/v1/load_lora_adapter"): Success(answers.LoadedAdapter),
    ("post", "/v1/unload_lora_adapter"): Success(answers.LoadedAdapter),
    ("post", "/v1/messages"): Success(answers.AnthropicAnswer, SSE),
    ("post", "/v1/messages/count_tokens"): Success(answers.TokenCount),
    ("post", "/api/chat"): Success(answers.OllamaTurnAnswer, NDJSON),
    ("post", "/api/generate"): Success(answers.OllamaTurnAnswer, NDJSON),
    ("post", "/api/embed"): Success(answers.OllamaVectorsAnswer),
    ("post", "/api/show"): Success(answers.OllamaModelAnswer),
    ("post", "/api/embeddings"): Success(answers.OllamaVectorAnswer),
    ("get", "/api/tags"): Success(answers.OllamaModelsAnswer),
    ("get", "/api/ps"): Success(answers.OllamaModelsAnswer),
    ("get", "/api/version"): Success(answers.ServerVersion),
    ("get", "/version"): Success(answers.ServerVersion),
    ("get", "/metrics"): Success(media_types=(TEXT, OPENMETRICS)),
    ("get", "/openapi.json"): Success(answers.OpenAPIDocument),
    ("get", "/"): Success(media_types=(HTML,)),
    ("get", "/docs"): Success(media_types=(HTML,)),
    ("get", "/redoc"): Success(media_types=(HTML,)),
    ("get", "/assets/{name}"): Success(media_types=("text/javascript", "text/css")),
    ("get", "/health"): Success(answers.HealthStatus),
    ("get", "/livez"): Success(answers.HealthStatus),
    ("get", "/readyz"): Success(answers.HealthStatus),
    ("get", "/startupz"): Success(answers.HealthStatus),
}
_STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "The key is missing or wrong.",
    403: "The key may not do this, or the host name is not one of the server's.",
    404: "There is no such model, or the key may not use it.",
    408: "The body did not arrive in time.",
    409: "The adapter has another version than `expected_digest`.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The key's limit is reached; `Retry-After` says when to come back.",
    500: "The server failed; the message has the id for its log.",
    503: "The server is busy, draining or stopped; `Retry-After` says when to come back.",
}
_WITH_EXPECTED_DIGEST = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_ERRORS: Mapping[str, Json] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
    "OllamaError": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
}
_SECURITY_SCHEMES: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_REQUEST_ID: Json = {"x-request-id": {"description": "The id of the request in the log.", "schema": {"type": "string"}}}


def openapi_document(app: FastAPI, *, needs_key: bool) -> Json:
    """The document; ``needs_key`` tells whether requests without a key are refused."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes, summary=app.summary)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    make_true(schemas)
    models = [(success.model, "serialization") for success in SUCCESSES.values() if success.model is not None]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas.update(definitions.get("$defs", {}))
    schemas.update(_ERRORS)
    components["securitySchemes"] = _SECURITY_SCHEMES
    optional: list[Json] = [] if needs_key else [{}]
    document["security"] = [*optional, {"bearer": []}, {"x-api-key": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(operation, method, path)
    return document


def _complete(operation: Json, method: str, path: str) -> None:
    """Add the answers of an operation."""
    success = SUCCESSES.get((method, path), Success(media_types=(JSON,)))
    responses = {"200": _response("The answer.", _content(success))}
    if path in PROBES:
        operation["security"] = []
        responses["503"] = _response("Not yet, or no longer.", _content(success))
    error = {"schema": {"$ref": f"#/components/schemas/{_error_form(path)}"}}
    for status in _error_statuses(method, path, has_body="requestBody" in operation):
        responses.setdefault(str(status), _response(_STATUSES[status], {JSON: error}))
    operation["responses"] = responses


def _error_statuses(method: str, path: str, *, has_body: bool) -> list[int]:
    if path in PROBES:
        return [403, 429, 500]
    statuses = [401, 403, 429, 500, 503]
    if has_body:
        statuses += [400, 404, 408, 413, 415]
    if path in _WITH_EXPECTED_DIGEST:
        statuses.append(409)
    if "{" in path:
        statuses += [400, 404]
    return sorted(set(statuses))


def _content(success: Success) -> Json:
    if success.model is None:
        return {media_type: {"schema": {"type": "string"}} for media_type in success.media_types}
    content: Json = {JSON: {"schema": {"$ref": f"#/components/schemas/{success.model.__name__}"}}}
    if success.stream is not None:
        content[success.stream] = {"schema": {}}  # tools read events as text or as objects
    return content


def _response(description: str, content: Json) -> Json:
    return {"description": description, "headers": _REQUEST_ID, "content": content}


def _error_form(path: str) -> str:
    if path.startswith(ANTHROPIC_PATH):
        return "AnthropicError"
    return "OllamaError" if path.startswith(OLLAMA_PATH) else "Error"
