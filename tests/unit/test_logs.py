"""Log records as text and as JSON; one record is one line, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

from server.api.app import create_app
from server.logs import TEXT_FORMAT, Fields, JsonFormatter
from tests.fakes import FakeEngine, Script, adapter, ask, server_state


def lines(formatter: logging.Formatter, name: str = "quickchange.request") -> tuple[logging.Handler, io.StringIO]:
    """A handler on a logger, and what it writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler, stream


def logged(formatter: logging.Formatter) -> str:
    """The log line of one request."""
    handler, stream = lines(formatter)
    try:
        app = create_app(server_state(FakeEngine([Script("the cat")]), adapter("poet")))
        body: dict[str, Any] = {"model": "poet", "messages": [{"role": "user", "content": "hello"}]}
        ask(app, "POST", "/v1/chat/completions", json=body, headers={"x-request-id": "id-1"})
    finally:
        logging.getLogger("quickchange.request").removeHandler(handler)
    (line,) = stream.getvalue().splitlines()
    return line


def test_a_request_is_one_object_with_numbers() -> None:
    entry = json.loads(logged(JsonFormatter()))
    assert (entry["level"], entry["logger"], entry["request_id"]) == ("info", "quickchange.request", "id-1")
    assert (entry["adapter"], entry["finish"]) == ("poet@poet-version", "stop")
    assert all(isinstance(entry[name], int) for name in ("prompt_tokens", "completion_tokens", "duration_ms"))


def test_the_text_of_a_request_has_the_same_names() -> None:
    text = logged(logging.Formatter(TEXT_FORMAT))
    assert "request_id=id-1 adapter=poet@poet-version finish=stop prompt_tokens=" in text
    assert "first_token_ms=-" in str(Fields(first_token_ms=None))


def test_control_characters_begin_no_line_and_tracebacks_are_members() -> None:
    handler, stream = lines(JsonFormatter(), "quickchange.test")
    logger = logging.getLogger("quickchange.test")
    try:
        logger.info("a name with %s", "\r\nERROR forged \x1b[31m\u2028")
        try:
            raise RuntimeError("broken\nin two")
        except RuntimeError:
            logger.exception("a step failed")
    finally:
        logger.removeHandler(handler)
    first, second = stream.getvalue().splitlines()
    assert json.loads(first)["message"] == "a name with \r\nERROR forged \x1b[31m\u2028"
    assert first.isascii() and first.isprintable()
    entry = json.loads(second)
    assert entry["message"] == "a step failed"
    assert "RuntimeError: broken" in entry["exception"]
