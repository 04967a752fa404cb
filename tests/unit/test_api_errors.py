"""Every error is an envelope with the status, type, code and param of the contract, and echoes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.app import create_app
from server.api.errors import ERROR_REPLIES, reply_to
from server.api.middleware import MAX_BODY_BYTES
from server.api.validation import param_path
from server.errors import EngineUnavailable, InvalidRequest, ModelNotFound, QueueFull, QuickchangeError
from tests.fakes import BASE, FakeEngine, Script, ask, server_state

CHAT = "/v1/chat/completions"
ONE = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


def app(engine: FakeEngine | None = None) -> FastAPI:
    """An application over a fake engine."""
    return create_app(server_state(engine or FakeEngine()))


def leaves(tree: type[QuickchangeError]) -> Iterator[type[QuickchangeError]]:
    """The classes nobody derives from."""
    below = tree.__subclasses__()
    if not below:
        yield tree
    for each in below:
        yield from leaves(each)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The envelope's content, which always has four keys."""
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_every_leaf_of_the_tree_has_a_reply() -> None:
    assert set(leaves(QuickchangeError)) == set(ERROR_REPLIES)


def test_a_failure_of_the_server_is_not_described_to_the_client() -> None:
    for error in (RuntimeError("/secret/path 0x7f"), QuickchangeError("/secret/path")):
        reply = reply_to(error, request_id="abc")
        assert reply.status == 500
        assert "secret" not in json.dumps(reply.body)
        assert "abc" in reply.body["error"]["message"]


def test_what_may_be_tried_again_says_when() -> None:
    for error in (QueueFull(3), EngineUnavailable("stopped")):
        reply = reply_to(error, request_id="abc")
        assert reply.status == 503
        assert 1 <= int(reply.headers["Retry-After"]) <= 60


def test_the_code_of_an_invalid_request_is_its_own() -> None:
    body = reply_to(InvalidRequest("no", param="seed", code="invalid_type"), request_id="abc").body
    assert (body["error"]["code"], body["error"]["param"]) == ("invalid_type", "seed")


def test_a_missing_model_is_what_clients_match_on() -> None:
    reply = reply_to(ModelNotFound("nobody"), request_id="abc")
    assert reply.status == 404
    assert (reply.body["error"]["code"], reply.body["error"]["param"]) == ("model_not_found", "model")


def test_a_path_is_written_as_in_javascript() -> None:
    assert param_path(("body", "messages", 2, "content")) == "messages[2].content"
    assert param_path(("body",)) is None


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": []}, "empty_array", "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "missing_required_parameter", "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_value", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "x", "contents": "y"}]},
            "unknown_parameter",
            "messages[0].contents",
        ),
        ({"temperature": "0.5"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"temperature": 2.5}, "decimal_above_max_value", "temperature"),
        ({"top_p": -1}, "decimal_below_min_value", "top_p"),
        ({"n": 0}, "integer_below_min_value", "n"),
        ({"n": 129}, "integer_above_max_value", "n"),
        ({"n": 1.5}, "invalid_type", "n"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"seed": 2**63}, "integer_above_max_value", "seed"),
        ({"stop": ""}, "string_below_min_length", "stop[0]"),
        ({"stop": ["x"] * 17}, "array_above_max_length", "stop"),
        ({"stream_options": 3}, "invalid_type", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_usages": 1}},
            "unknown_parameter",
            "stream_options.include_usages",
        ),
        ({"logprobs": 1}, "invalid_type", "logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"presence_penalty": 2.5}, "decimal_above_max_value", "presence_penalty"),
        ({"repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "array_above_max_length", "logit_bias"),
        ({"min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
        ({"stop_token_ids": [-1]}, "integer_below_min_value", "stop_token_ids[0]"),
        ({"stop_token_ids": [10**6]}, "invalid_value", "stop_token_ids"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"model": 3}, "invalid_type", "model"),
        ({"messages": [{"role": "user", "content": "xyz " * 300}]}, "context_length_exceeded", "messages"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], code: str, param: str) -> None:
    body = json.dumps({**ONE, **change})
    response = ask(app(), "POST", CHAT, content=body, headers={"content-type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["code"], error["param"]) == (code, param)


def test_the_context_error_has_the_words_clients_look_for() -> None:
    message = error_of(ask(app(), "POST", CHAT, json={**ONE, "messages": [{"role": "user", "content": "xyz " * 300}]}))[
        "message"
    ]
    assert "maximum context length is 256 tokens" in message


@pytest.mark.parametrize("body", [b"{", b"[]", b"3", b"null", b"", b'{"a":' * 3000, b"9" * 5000])
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    response = ask(app(), "POST", CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


def test_an_empty_body_is_called_empty() -> None:
    response = ask(app(), "POST", CHAT, content=b"", headers={"content-type": "application/json"})
    assert error_of(response)["message"] == "The request body must be a JSON object, and it is empty or null."


def test_nothing_of_the_body_is_repeated() -> None:
    secret = "my-secret-prompt"
    for change in ({"messages": secret}, {"temperature": secret}, {"messages": [{"role": secret, "content": secret}]}):
        assert secret not in ask(app(), "POST", CHAT, json={**ONE, **change}).text


@pytest.mark.parametrize(
    ("method", "url", "status", "code"),
    [("GET", "/v2/nothing", 404, "unknown_url"), ("GET", CHAT, 405, "method_not_allowed")],
)
def test_unknown_urls_and_methods_are_answered_alike(method: str, url: str, status: int, code: str) -> None:
    response = ask(app(), method, url)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


def test_a_body_that_is_not_declared_json_is_refused() -> None:
    response = ask(app(), "POST", CHAT, content=json.dumps(ONE), headers={"content-type": "text/plain"})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_too_large_is_refused_whether_its_length_is_announced_or_not(announced: bool) -> None:
    body = b'"' + b"x" * MAX_BODY_BYTES + b'"'

    async def in_parts() -> Any:
        yield body

    content = body if announced else in_parts()
    response = ask(app(), "POST", CHAT, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


def test_a_request_with_two_lengths_is_refused_and_its_connection_closed() -> None:
    """A proxy that believes the other length would send what follows as another client's request."""
    headers = {"content-type": "application/json", "content-length": "2", "transfer-encoding": "chunked"}
    app = create_app(server_state(FakeEngine()))
    response = ask(app, "POST", "/v1/chat/completions", content=b"{}", headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_framing")
    assert response.headers["connection"] == "close"


def test_a_bug_is_a_500_with_the_request_id() -> None:
    engine = FakeEngine()
    engine.max_model_len = "nonsense"  # type: ignore[assignment]
    response = ask(app(engine), "POST", CHAT, json=ONE, headers={"x-request-id": "find-me"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "find-me"
    assert "find-me" in error_of(response)["message"]


@pytest.mark.parametrize("given", ["a b", "x" * 129, "<script>", ""])
def test_a_request_id_that_is_not_plain_is_replaced(given: str) -> None:
    assert ask(app(), "GET", "/health", headers={"x-request-id": given}).headers["x-request-id"] != given


def test_refusals_are_counted_by_status() -> None:
    state = server_state(FakeEngine([Script(then="fail", text="")]))
    application = create_app(state)
    for body in ({**ONE, "model": "nobody"}, {**ONE, "n": 129}, ONE):
        ask(application, "POST", CHAT, json=body)
    counts = {status: state.metrics.http_errors.labels(status)._value.get() for status in ("400", "404", "500")}
    assert counts == {"400": 1, "404": 1, "500": 1}


@pytest.mark.parametrize(("error", "levels"), [(QueueFull(3), set()), (EngineUnavailable("stopped"), {"ERROR"})])
def test_a_full_queue_is_no_error_of_the_log_and_a_stopped_engine_is(
    error: QuickchangeError, levels: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Under load the log had a line at ERROR for each request that was refused."""

    class Failing(FakeEngine):
        def submit(self, *arguments: Any, **named: Any) -> Any:
            raise error

    with caplog.at_level("INFO", logger="quickchange.api"):
        answer = ask(app(Failing()), "POST", CHAT, json=ONE)
    assert answer.status_code == 503
    assert {record.levelname for record in caplog.records if type(error).__name__ in record.getMessage()} == levels
