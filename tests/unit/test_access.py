"""Who may do what: every request has a principal, and what is not open needs a key whose scope opens it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.api import admin
from server.api.app import create_app
from server.api.auth.access import Access
from server.api.auth.keys import ApiKey, KeyRing, admin_key, digest_of
from server.api.auth.middleware import credential_of
from server.api.auth.principal import AccessScope, Principal
from server.api.auth.routes import PROBES, required_scope
from tests.fakes import BASE, FakeEngine, adapter, ask, server_state

CHAT = "/v1/chat/completions"
ONE = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
ADMIN = "an-admin-key-of-some-length"
KEYS = {scope.value: f"key-with-the-scope-{scope.value}" for scope in AccessScope}
HEADERS_WITHOUT_KEY: list[dict[str, str]] = [{}, {"authorization": "Bearer none"}]
ADMIN_ROUTES = [
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("DELETE", "/v1/models/one"),
    ("POST", "/v1/models/one/pin"),
    ("POST", "/v1/models/one/unpin"),
    ("POST", "/v1/models/one/rollback"),
]


def app_with(access: Access) -> FastAPI:
    return create_app(replace(server_state(FakeEngine()), access=access))


def one_key_a_scope() -> KeyRing:
    keys = [
        ApiKey(digest_of(key), Principal(f"key:{name}", name, frozenset({AccessScope(name)})))
        for name, key in KEYS.items()
    ]
    return KeyRing(keys, is_open=False)


@pytest.fixture
def protected() -> FastAPI:
    """A server with one key for each scope."""
    return app_with(Access(one_key_a_scope()))


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {key}"}}


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", CHAT, "/v2/nothing", "/openapi.json"])
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}])
def test_without_a_right_key_every_path_is_a_401(protected: FastAPI, path: str, headers: dict[str, str]) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        response = ask(protected, method, path, headers=headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), method
        assert method == "HEAD" or code_of(response) == (401, "invalid_api_key")


def test_probes_need_no_key(protected: FastAPI) -> None:
    assert ask(protected, "GET", "/health").status_code == 200
    assert code_of(ask(protected, "POST", "/health")) == (401, "invalid_api_key")


@pytest.mark.parametrize("name", KEYS)
def test_a_key_opens_its_scope_and_admin_opens_all(protected: FastAPI, name: str) -> None:
    key = bearer(KEYS[name])
    statuses = {
        "infer": ask(protected, "POST", CHAT, json=ONE, **key).status_code,
        "metrics": ask(protected, "GET", "/metrics", **key).status_code,
        "train": ask(protected, "GET", "/v1/files", **key).status_code,
    }
    opened = {"infer": 200, "metrics": 200, "train": 404}
    assert statuses == {scope: opened[scope] if name in (scope, "admin") else 403 for scope in statuses}
    for method, path in ADMIN_ROUTES:
        response = ask(protected, method, path, **key)
        assert (response.status_code == 403) == (name != "admin" or "admin_off" in response.text)


def test_a_scope_that_is_missing_is_named(protected: FastAPI) -> None:
    response = ask(protected, "GET", "/metrics", **bearer(KEYS["infer"]))
    assert code_of(response) == (403, "insufficient_permissions")
    assert "'metrics'" in response.json()["error"]["message"]


def test_anthropics_header_is_a_key_too(protected: FastAPI) -> None:
    assert ask(protected, "GET", "/v1/models", headers={"x-api-key": KEYS["infer"]}).status_code == 200


@pytest.mark.parametrize(
    "value", [b"", b"Bearer", b"Bearer ", b"Basic a2V5", b"Bearer \xff\xfe", "Bearer schl\u00fcssel".encode(), b"\x80"]
)
def test_a_header_that_is_no_key_is_a_401(protected: FastAPI, value: bytes) -> None:
    response = ask(protected, "GET", "/v1/models", headers=[(b"authorization", value)])
    assert code_of(response) == (401, "invalid_api_key")


def test_a_key_is_never_repeated(protected: FastAPI) -> None:
    for path in ("/v1/models", "/metrics", CHAT):
        response = ask(protected, "GET", path, **bearer("canary-of-a-wrong-key"))
        assert "canary" not in response.text + str(response.headers)


def test_a_key_sent_twice_is_wrong() -> None:
    key = KEYS["infer"].encode()
    assert credential_of([(b"Authorization", b"Bearer " + key)]) == key
    assert credential_of([(b"authorization", b"Bearer " + key)] * 2) != key
    assert credential_of([(b"x-api-key", key), (b"X-Api-Key", b"")]) != key


def test_without_keys_everybody_infers_and_nobody_changes_adapters() -> None:
    app = app_with(Access())
    for headers in HEADERS_WITHOUT_KEY:
        assert ask(app, "POST", CHAT, json=ONE, headers=headers).status_code == 200
        assert ask(app, "GET", "/metrics", headers=headers).status_code == 200
        for method, path in ADMIN_ROUTES:
            assert code_of(ask(app, method, path, headers=headers)) == (403, "admin_off")


def test_an_admin_key_alone_protects_what_changes_adapters() -> None:
    app = app_with(Access(KeyRing((admin_key(ADMIN),))))
    assert ask(app, "POST", CHAT, json=ONE).status_code == 200
    for method, path in ADMIN_ROUTES:
        assert code_of(ask(app, method, path)) == (401, "invalid_api_key")
        assert code_of(ask(app, method, path, **bearer("wrong"))) == (401, "invalid_api_key")


async def test_a_websocket_is_refused() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/health", "raw_path": b"/health", "headers": [], "query_string": b""}
    await app_with(Access())(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_every_route_needs_a_key_but_probes_and_what_changes_adapters_needs_an_admins() -> None:
    """A route that nobody thought of is not open, and one of the admin endpoints is for admins."""
    admins = [route for route in admin.router.routes if isinstance(route, APIRoute)]
    changes = {(method, route.path) for route in admins for method in route.methods or ()}
    routes = [
        (method.upper(), path)
        for path, operations in app_with(Access()).openapi()["paths"].items()
        for method in operations
    ]
    assert changes <= set(routes) and len(routes) > 10
    for method, path in routes:
        scope = required_scope(method, path.replace("{model}", "a/b"), on_loopback=False)
        assert (scope is None) == (path in PROBES), path
        assert (scope is AccessScope.ADMIN) == ((method, path) in changes), path


def test_an_adapter_that_a_key_may_not_use_is_unknown_to_every_endpoint() -> None:
    """Also to an endpoint that is new: the bodies are those of all endpoints, of which each takes one at least."""
    keys = [
        ApiKey(digest_of("all"), Principal("key:all", "all", frozenset({AccessScope.INFER}))),
        ApiKey(digest_of("few"), Principal("key:few", "few", frozenset({AccessScope.INFER}), frozenset({"other"}))),
    ]
    state = replace(server_state(FakeEngine(), adapter("poet")), access=Access(KeyRing(keys, is_open=False)))
    app = create_app(state)
    messages = {"messages": ONE["messages"]}
    bodies: list[dict[str, Any]] = [messages, {**messages, "max_tokens": 9}, {"tokens": [1]}, {}]
    bodies += [{"prompt": "x"}, {"input": "x"}]
    paths = [
        path
        for path, operations in app.openapi()["paths"].items()
        if "post" in operations and required_scope("POST", path, on_loopback=False) is AccessScope.INFER
    ]
    assert {CHAT, "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses"} <= set(paths)

    def answer(path: str, model: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"authorization": "Bearer few", "x-request-id": "same"}
        return ask(app, "POST", path, json={"model": model, **body}, headers=headers)

    for path in paths:
        hidden = [answer(path, "poet", body) for body in bodies]
        unknown = [answer(path, "nobody", body) for body in bodies]
        assert {each.status_code for each in hidden} in ({404}, {400, 404}), path
        assert [each.text.replace("poet", "nobody") for each in hidden] == [each.text for each in unknown], path
    assert ask(app, "POST", CHAT, json={**ONE, "model": "poet"}, **bearer("all")).status_code == 200
    reads = [path for path, operations in app.openapi()["paths"].items() if "get" in operations and "{" not in path]
    assert "/v1/models" in reads
    for path in ("/", "/v1/models/poet", *reads):
        assert "poet" not in ask(app, "GET", path, **bearer("few")).text.replace("`poet` does not exist", ""), path
    assert "poet" in ask(app, "GET", "/v1/models", **bearer("all")).text
