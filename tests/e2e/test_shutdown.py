"""A stopping server: requests that run, requests that come, the end of its time, a second signal, its exit status."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from server.cli.http_server import CUT_STATUS
from tests.serving import ServerProcess, started_server

ENDLESS: dict[str, Any] = {
    "model": "tolstoy",
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 1900,
    "ignore_eos": True,
}


@contextmanager
def running(*flags: str) -> Iterator[ServerProcess]:
    with started_server(*flags) as server:
        yield server
        log = "\n".join(server.log)
        assert "Traceback" not in log, log


class Stream:
    """An endless stream, read by a thread until the server ends it."""

    def __init__(self, server: ServerProcess) -> None:
        self.lines: list[str] = []
        self._server = server
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        server.until("the stream has begun", lambda: len(self.lines) > 3)

    def _read(self) -> None:
        url = f"{self._server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json={**ENDLESS, "stream": True}, timeout=60) as response:
            self.lines += [""]
            for line in response.iter_lines():
                if line:
                    self.lines.append(line)

    def end(self) -> list[str]:
        """Its last two lines."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.lines[-2:]


def assert_cut(lines: list[str]) -> None:
    event, done = lines
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert done == "data: [DONE]"


def test_new_requests_are_refused_while_running_ones_get_their_time() -> None:
    with running("--shutdown-timeout", "1") as server:
        stream = Stream(server)
        server.process.terminate()
        server.until("it drains", lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        assert httpx.get(f"{server.url}/livez").status_code == 200
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=ENDLESS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["connection"] == "close"
        assert_cut(stream.end())
        assert server.process.wait(30) == CUT_STATUS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_running_requests_at_once(number: signal.Signals) -> None:
    with running("--shutdown-timeout", "100") as server:
        stream = Stream(server)
        server.process.send_signal(number)
        server.until("it drains", lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        since = time.monotonic()
        server.process.send_signal(number)
        assert_cut(stream.end())
        assert server.process.wait(30) == 128 + number
        assert time.monotonic() - since < 10


def test_a_request_that_is_not_streamed_is_a_503_when_it_is_cut() -> None:
    with running("--shutdown-timeout", "0") as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{server.url}/v1/chat/completions", json=ENDLESS, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        server.until("it runs", lambda: server.metric("quickchange_sequences_running") == 1)
        server.process.terminate()
        thread.join(60)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "shutting_down")
        assert server.process.wait(30) == CUT_STATUS


def test_an_idle_server_stops_at_once_with_status_0() -> None:
    with running() as server:
        since = time.monotonic()
        server.process.terminate()
        assert server.process.wait(30) == 0
        assert time.monotonic() - since < 5
