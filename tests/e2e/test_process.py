"""The process: clients that go away, logs, shutdown, starts that fail."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from base_files.names import BASE_MODEL_HELP
from tests.serving import ROOT, ServerProcess, running_server


def run(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "server", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, **more
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server: ServerProcess, stream: bool) -> None:
    """Eight greedy answers of 1900 tokens take many seconds. How many still run at the disconnect is unknown."""
    body = {"model": "tolstoy", "messages": [{"role": "user", "content": "Tell me a story."}], "stream": stream, "n": 8}
    cancelled = server.metric("quickchange_requests_total", adapter="tolstoy", finish_reason="cancelled")
    ended = server.metric("quickchange_requests_total", adapter="tolstoy")
    generated = server.metric("quickchange_generated_tokens_total", adapter="tolstoy")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
        content = httpx.Request("POST", server.url, json=body | {"max_tokens": 1900, "temperature": 0}).read()
        headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n\r\n"
        raw.sendall(head.encode() + content)
        server.until("it runs", lambda: server.metric("quickchange_sequences_running") > 0)
    server.until("its slots are free", lambda: server.metric("quickchange_kv_slots_used") == 0)
    server.until("all are counted", lambda: server.metric("quickchange_requests_total", adapter="tolstoy") == ended + 8)
    now = server.metric("quickchange_requests_total", adapter="tolstoy", finish_reason="cancelled")
    assert 0 < now - cancelled <= 8
    assert server.metric("quickchange_generated_tokens_total", adapter="tolstoy") - generated < 8 * 1900


def test_an_idle_connection_outlives_that_of_a_client(server: ServerProcess) -> None:
    """Server and clients both dropped idle connections after 5 s: a request met one that was just being closed."""
    connection = HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=10)
    with contextlib.closing(connection):
        for pause in (5.3, 0.0):  # httpx keeps an idle connection for 5 s
            connection.request("GET", "/health")
            used = connection.sock
            assert connection.getresponse().read() and connection.sock is used is not None
            time.sleep(pause)


def test_one_log_line_a_request_without_content(server: ServerProcess, client: OpenAI) -> None:
    already = len(server.log)
    client.chat.completions.create(
        model="helpdesk",
        messages=[{"role": "user", "content": "canary-7431"}],
        max_tokens=5,
        extra_headers={"x-request-id": "my-id"},
    )
    server.until("the line is there", lambda: any("request_id=my-id" in line for line in server.log[already:]))
    lines = [line for line in server.log[already:] if "quickchange.request" in line]
    assert len(lines) == 1
    assert "adapter=helpdesk@" in lines[0] and "finish=length" in lines[0] and "completion_tokens=5" in lines[0]
    assert not any("canary-7431" in line for line in server.log)
    assert "canary-7431" not in httpx.get(f"{server.url}/metrics").text


def test_a_running_answer_is_finished_before_the_server_stops() -> None:
    with running_server() as server, OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="tolstoy", messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=40, stream=True
        )
        next(iter(stream))
        server.process.terminate()
        reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
        assert reasons[-1] in ("stop", "length")


def test_a_taken_port_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        since = time.monotonic()
        ended = run("serve", "--port", str(taken.getsockname()[1]))
    assert ended.returncode == 1
    assert "choose another --host or --port" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - since < 60


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--base-model", "no-such-folder"), f"base_model must be {BASE_MODEL_HELP}"),
        (("--base-model", "tests"), "has no config.json"),
        (("--max-model-len", "100000"), "the base was made for 2048 tokens"),
        (("--max-num-seqs", "none"), "setting max_num_seqs (--max-num-seqs or QUICKCHANGE_MAX_NUM_SEQS) is 'none'"),
    ],
)
def test_a_start_that_cannot_be_says_why(flags: tuple[str, ...], words: str) -> None:
    ended = run("serve", "--port", "0", *flags)
    assert ended.returncode == 1
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_explains_every_setting() -> None:
    shown = run("serve", "--help").stdout
    assert "--max-num-batched-tokens" in shown and "default: 512" in shown


def test_an_unknown_command_shows_the_usage() -> None:
    ended = run("dance")
    assert ended.returncode == 2
    assert "there is no command 'dance'" in ended.stderr


def test_adapters_are_listed_with_what_is_wrong(watched: Path) -> None:
    (watched / "empty").mkdir()
    try:
        ended = run("adapters", "--adapters-dir", str(watched), "--no-demo-adapters")
    finally:
        (watched / "empty").rmdir()
    assert ended.returncode == 1
    assert "empty: NOT SERVED: adapter_config.json and adapter_model.safetensors are missing" in ended.stdout
    assert "helpdesk@" in ended.stdout


def test_one_question_for_a_pipe(server: ServerProcess) -> None:
    by_argument = run("chat", "--url", server.url, "--adapter", "helpdesk", "How do I lower-case a string?")
    piped = run("chat", "--url", server.url, "--adapter", "helpdesk", input="How do I lower-case a string?")
    assert by_argument.stdout == piped.stdout
    assert ".lower()" in by_argument.stdout
    assert by_argument.stderr == ""


def test_chat_starts_a_server_of_its_own_where_none_runs() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = run("chat", "--port", str(port), "--adapter", "helpdesk", "How do I lower-case a string?")
    assert ended.returncode == 0
    assert ".lower()" in ended.stdout


def test_chat_with_an_unknown_adapter_says_so(server: ServerProcess) -> None:
    ended = run("chat", "--url", server.url, "--adapter", "ghost", "Hi")
    assert ended.returncode == 1
    assert "`ghost` does not exist" in ended.stderr
