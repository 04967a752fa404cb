"""``/openapi.json`` has every route, with the statuses, media types and bodies that the server really has."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route

from server.api.app import ROUTERS, create_app
from server.api.auth.access import Access
from server.api.auth.keys import ApiKey, KeyRing, digest_of
from server.api.auth.principal import AccessScope, Principal
from server.api.openapi.document import SUCCESSES
from tests.fakes import BASE, FakeEngine, adapter, ask, server_state

ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, Route)]
HELLO: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(server_state(FakeEngine(), adapter("poet")))


@pytest.fixture(scope="module")
def document(app: FastAPI) -> dict[str, Any]:
    return dict(ask(app, "GET", "/openapi.json").json())


def test_every_route_is_described_and_nothing_else(document: dict[str, Any]) -> None:
    routed = {(route.path.replace(":path}", "}"), method.lower()) for route in ROUTES for method in route.methods or ()}
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert described - {(path, method) for method, path in SUCCESSES} == set()
    assert described == {(path, method) for path, method in routed if method != "head"}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    """And no schema of FastAPI's own errors is left."""
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    referred = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert referred <= schemas.keys()
    assert "ValidationError" not in text
    assert '"422"' not in text


def test_every_operation_has_its_errors_in_the_form_of_its_api(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        form = "AnthropicError" if path.startswith("/v1/messages") else "Error"
        form = "OllamaError" if path.startswith("/api/") else form
        for operation in operations.values():
            responses = operation["responses"]
            assert {"200", "403", "500"} <= responses.keys()
            assert ("400" in responses) >= ("requestBody" in operation)
            assert ("404" in responses) >= ("{" in path)
            for status, response in responses.items():
                (schema, *_) = [content["schema"] for content in response["content"].values()]
                if status not in ("200", "503"):
                    assert schema == {"$ref": f"#/components/schemas/{form}"}


def test_keys_are_needed_where_keys_are_configured(document: dict[str, Any]) -> None:
    assert document["security"][0] == {}
    key = ApiKey(digest_of("key"), Principal("key", "key", frozenset({AccessScope.INFER})))
    state = replace(server_state(FakeEngine()), access=Access(KeyRing((key,), is_open=False)))
    closed = ask(create_app(state), "GET", "/openapi.json", headers={"x-api-key": "key"}).json()
    assert closed["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert closed["paths"]["/health"]["get"]["security"] == []


BODIES: dict[tuple[str, str], Any] = {
    ("post", "/v1/chat/completions"): HELLO,
    ("post", "/v1/completions"): {"model": BASE, "prompt": "hello"},
    ("post", "/v1/responses"): {"model": BASE, "input": "hello"},
    ("post", "/v1/messages"): {**HELLO, "max_tokens": 8},
    ("post", "/v1/messages/count_tokens"): HELLO,
    ("post", "/tokenize"): {"model": BASE, "prompt": "hello"},
    ("post", "/detokenize"): {"model": BASE, "tokens": [40, 41]},
    ("post", "/v1/tokenize"): {"model": BASE, "messages": HELLO["messages"]},
    ("post", "/v1/detokenize"): {"model": BASE, "tokens": []},
    ("post", "/api/chat"): {**HELLO, "stream": False},
    ("post", "/api/generate"): {"model": BASE, "prompt": "hello", "stream": False},
    ("post", "/api/show"): {"model": BASE},
}
"""Of the endpoints that answer without a model behind the engine."""


def real(app: FastAPI, method: str, path: str, body: Any) -> httpx.Response:
    path = path.replace("{model}", "poet").replace("{name}", "swagger-ui.css")
    return ask(app, method.upper(), path, **({} if body is None else {"json": body}))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{min(route.methods)} {route.path}")
def test_a_real_answer_is_as_described(app: FastAPI, document: dict[str, Any], route: Route) -> None:
    path = route.path.replace(":path}", "}")
    for method in map(str.lower, route.methods or ()):
        body = BODIES.get((method, path))
        if method == "head" or (method == "post" and body is None):
            continue
        reply = real(app, method, path, body)
        described = document["paths"][path][method]["responses"]
        assert str(reply.status_code) in described
        media_type = reply.headers["content-type"].partition(";")[0]
        assert media_type in described[str(reply.status_code)]["content"]
        model = SUCCESSES[method, path].model
        if reply.status_code == 200 and model is not None:
            model.model_validate_json(reply.content, strict=True)


def test_streams_have_their_media_type(app: FastAPI, document: dict[str, Any]) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        reply = real(app, "post", path, {**BODIES["post", path], "stream": True})
        described = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert reply.headers["content-type"].partition(";")[0] in described.keys() - {"application/json"}


def test_bodies_are_as_they_are_accepted(document: dict[str, Any]) -> None:
    """Null is absent, a single string is a list of one, and fields that are known without effect are listed."""
    schemas = document["components"]["schemas"]
    chat, completion = schemas["ChatRequest"]["properties"], schemas["CompletionRequest"]["properties"]
    assert {"type": "string", "minLength": 1, "maxLength": 1024} in chat["stop"]["anyOf"]
    assert {"type": "null"} in chat["temperature"]["anyOf"]
    assert {"type": "null"} in chat["n"]["anyOf"]
    assert len(completion["prompt"]["anyOf"]) == 4
    assert {"type": "string"} in schemas["Message"]["properties"]["content"]["anyOf"]
    assert chat["metadata"] == {"description": "Has no effect."}
