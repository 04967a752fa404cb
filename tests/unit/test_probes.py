"""Probes, and a server that drains: what it still answers, and what it refuses."""

from __future__ import annotations

import pytest

from server.api.app import create_app
from server.api.operations import MAX_STEP_SECONDS
from tests.fakes import BASE, FakeEngine, ask, server_state

PROBES = ("/livez", "/readyz", "/startupz", "/health")
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


def statuses(engine: FakeEngine, *, started: bool = True, draining: bool = False) -> dict[str, int]:
    """The status of each probe."""
    state = server_state(engine)
    state.lifecycle.started, state.lifecycle.draining = started, draining
    app = create_app(state)
    return {path.strip("/"): ask(app, "GET", path).status_code for path in PROBES}


def test_probes_tell_what_a_restart_and_what_waiting_would_help() -> None:
    assert statuses(FakeEngine()) == {"livez": 200, "readyz": 200, "startupz": 200, "health": 200}
    assert statuses(FakeEngine(), started=False)["startupz"] == 503
    dead = statuses(FakeEngine(alive=False))
    assert dead == {"livez": 503, "readyz": 503, "startupz": 200, "health": 503}
    hanging = statuses(FakeEngine(step_seconds=MAX_STEP_SECONDS + 1))
    assert (hanging["livez"], hanging["readyz"]) == (503, 200)
    stopping = statuses(FakeEngine(), draining=True)
    assert stopping == {"livez": 200, "readyz": 503, "startupz": 200, "health": 503}


def test_a_draining_server_refuses_requests_and_shows_its_metrics() -> None:
    state = server_state(FakeEngine())
    app = create_app(state)
    assert ask(app, "POST", "/v1/chat/completions", json=CHAT).status_code == 200
    state.lifecycle.draining = True
    for path in ("/v1/chat/completions", "/v1/messages"):
        refused = ask(app, "POST", path, json=CHAT)
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    error = ask(app, "POST", "/v1/chat/completions", json=CHAT).json()["error"]
    assert (error["code"], error["type"]) == ("shutting_down", "service_unavailable_error")
    assert ask(app, "GET", "/metrics").status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/no-such-path"])
def test_a_request_counts_until_it_is_answered(path: str) -> None:
    state = server_state(FakeEngine())
    assert ask(create_app(state), "GET", path).status_code in (200, 404, 405)
    assert state.lifecycle.num_requests == 0
