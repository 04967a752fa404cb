"""An error has the form of the API that was called, whoever raised it."""

from __future__ import annotations

import pytest

from server.api.app import create_app
from server.api.validation import param_path
from tests.fakes import FakeEngine, ask, server_state


@pytest.mark.parametrize(
    ("content_type", "status", "kind"),
    [("application/json", 404, "not_found_error"), ("text/plain", 415, "invalid_request_error")],
)
def test_an_error_below_anthropics_path_is_anthropics(content_type: str, status: int, kind: str) -> None:
    headers = {"content-type": content_type, "x-request-id": "mine"}
    url = "/v1/messages/batches"
    response = ask(create_app(server_state(FakeEngine())), "POST", url, content=b"{}", headers=headers)
    body = response.json()
    assert (response.status_code, response.headers["request-id"]) == (status, "mine")
    assert body["error"].pop("message")
    assert list(body["error"].pop("details")) == ["error_code", "param"]
    assert body == {"type": "error", "error": {"type": kind}, "request_id": "mine"}


def test_an_error_below_ollamas_path_is_a_sentence() -> None:
    response = ask(create_app(server_state(FakeEngine())), "POST", "/api/pull", json={"model": "llama"})
    assert response.status_code == 404
    assert list(response.json()) == ["error"]
    assert isinstance(response.json()["error"], str)


def test_any_other_error_is_openais() -> None:
    response = ask(create_app(server_state(FakeEngine())), "GET", "/v1/nothing")
    assert list(response.json()["error"]) == ["message", "type", "param", "code"]
    assert "request-id" not in response.headers


def test_the_path_of_a_field_leaves_out_which_model_of_a_union_was_chosen() -> None:
    assert param_path(("body", "input", 2, "(message)", "role")) == "input[2].role"
