"""The official JavaScript client against a real server: what the Python one forgives, it may not."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ServerProcess

SCRIPT = Path(__file__).with_name("openai_client.mjs")


@pytest.fixture(scope="module")
def report(
    tool: Callable[[str], str], server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the script reports."""
    folder = tmp_path_factory.mktemp("node")
    shutil.copy(SCRIPT, folder)
    install = [tool("npm"), "install", "--no-audit", "--no-fund", "openai@6"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = [tool("node"), SCRIPT.name, f"{server.url}/v1"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_the_base_and_every_adapter_answer_under_their_own_name(report: dict[str, Any]) -> None:
    assert report["models"]
    for model, answer in report["answers"].items():
        assert answer["model"] == model
        assert set(answer["streamed"]["models"]) == {model}


def test_a_stream_says_what_the_whole_answer_says(report: dict[str, Any]) -> None:
    for answer in report["answers"].values():
        streamed = answer["streamed"]
        assert streamed["text"] == answer["text"]
        assert streamed["finish_reasons"] == [answer["finish_reason"]]
        assert streamed["usage"] == answer["usage"]


def test_the_stream_helper_puts_the_text_together(report: dict[str, Any]) -> None:
    first = report["answers"][report["models"][0]]["text"]
    assert report["helper"]
    assert first.startswith(report["helper"])


def test_an_unknown_model_is_the_clients_own_not_found_error(report: dict[str, Any]) -> None:
    assert report["error"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"}


def test_a_client_that_leaves_its_stream_stops_the_sequence(report: dict[str, Any], server: ServerProcess) -> None:
    assert report["left"]
    server.until("no sequence runs", lambda: server.metric("quickchange_sequences_running") == 0, timeout=5)
    assert server.metric("quickchange_requests_total", adapter="base", finish_reason="cancelled") == 1
