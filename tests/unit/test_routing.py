"""HEAD is where GET is, a 405 lists the methods of its path, and an unknown path is told which one was meant."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fastapi import FastAPI

from server.api.app import ROUTERS, create_app
from server.api.auth.access import Access
from server.api.auth.keys import ApiKey, KeyRing, digest_of
from server.api.auth.principal import AccessScope, Principal
from tests.fakes import BASE, FakeEngine, adapter, ask, server_state

CHAT = "/v1/chat/completions"
ONE = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


KEY = {"authorization": "Bearer key"}


def app_with(scope: AccessScope) -> FastAPI:
    """A server with one key of a scope."""
    key = ApiKey(digest_of("key"), Principal("key", "key", frozenset({scope})))
    return create_app(
        replace(server_state(FakeEngine(), adapter("poet")), access=Access(KeyRing((key,), is_open=False)))
    )


@pytest.fixture
def app() -> FastAPI:
    return create_app(server_state(FakeEngine(), adapter("poet")))


def paths(method: str) -> set[str]:
    routes = [route for router in ROUTERS for route in router.routes]
    found = {getattr(route, "path", "") for route in routes if method in (getattr(route, "methods", None) or ())}
    return {path.replace("{model:path}", "poet").replace("{model}", "poet") for path in found}


@pytest.mark.parametrize("path", sorted(paths("GET")))
def test_head_is_get_without_a_body(app: FastAPI, path: str) -> None:
    get, head = ask(app, "GET", path), ask(app, "HEAD", path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["x-request-id"]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_a_405_lists_the_methods_of_its_path(method: str) -> None:
    for path in sorted(paths("GET") | paths("POST") | paths("DELETE")):
        reply = ask(app_with(AccessScope.ADMIN), method, path, headers=KEY)
        if reply.status_code == 405:
            allowed = reply.headers["allow"].split(", ")
            assert allowed == [name for name in ("GET", "HEAD", "POST", "DELETE") if name in allowed]
            assert set(allowed) - {"HEAD"} == {name for name in ("GET", "POST", "DELETE") if path in paths(name)}
            assert f"it has {reply.headers['allow']}." in reply.text


def test_get_and_delete_of_a_model_are_both_allowed() -> None:
    assert (
        ask(app_with(AccessScope.ADMIN), "PUT", "/v1/models/poet", headers=KEY).headers["allow"] == "GET, HEAD, DELETE"
    )


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        ("/api/v1/chat/completions", CHAT),
        ("/openai/deployments/x/chat/completions", CHAT),
        ("/completions", "/v1/completions"),
        ("/models", "/v1/models"),
        ("/v1/v1/models", "/v1/models"),
        ("/v1/v1/models/poet", "/v1/models/{model}"),
        ("/v1/health", "/health"),
        ("/v1/metrics/", "/metrics"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_told_which_one_was_meant(app: FastAPI, method: str, path: str, meant: str) -> None:
    reply = ask(app, method, path)
    assert reply.status_code == 404
    assert f"Did you mean {meant}?" in reply.text


def test_a_path_like_no_other_is_not_guessed_and_not_repeated(app: FastAPI) -> None:
    for path in ("/v2/nothing", "/" + "x/" * 5000, "/secret-text"):
        message = ask(app, "POST", path).json()["error"]["message"]
        assert "Did you mean" not in message
        assert "secret-text" not in message


def test_slashes_at_the_end_of_a_path_do_not_matter(app: FastAPI) -> None:
    assert ask(app, "POST", f"{CHAT}/", json=ONE).status_code == 200
    assert ask(app, "GET", "/v1/models//").json() == ask(app, "GET", "/v1/models").json()
    assert ask(app, "GET", "/v1/models/poet/").json()["id"] == "poet"


@pytest.mark.parametrize("path", ["/metrics/", "/v1/load_lora_adapter/", "/v1/unload_lora_adapter//"])
def test_a_slash_opens_no_door(path: str) -> None:
    """The scope is judged by the path that is served."""
    for method in ("GET", "HEAD", "POST"):
        assert ask(app_with(AccessScope.INFER), method, path, headers=KEY).status_code == 403
