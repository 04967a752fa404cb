"""Clients that nobody here wrote, each in an environment of its own, against a real server with a real chat model.

What is asked of them is form, not sense: an answer of the right kind, with a model of 135M parameters.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serving import ROOT, ServerProcess, running_server

CLIENTS = Path(__file__).with_name("clients")
NODE_PACKAGES = ("openai@6", "ai@6", "@ai-sdk/openai@3", "@ai-sdk/openai-compatible@2", "zod@4")
MODEL = "smollm2"
ASYNCIO = [
    argument
    for option in ("mode=auto", "default_fixture_loop_scope=session", "default_test_loop_scope=session")
    for argument in ("-o", f"asyncio_{option}")
]
NEEDS_SENSE = {"test_agent_loop[model0]", "test_agent_loop[model1]", "test_json_mode"}
"""LangChain's tests that need the right answer without a grammar: a tool called by choice, an object of a schema in
the prompt alone. A model of 135M parameters does not give it."""
NOT_TEXT = {
    "test_audio_inputs",
    "test_image_inputs",
    "test_image_tool_message",
    "test_pdf_inputs",
    "test_pdf_tool_message",
}
"""LangChain's tests of other media, which it skips for a text model."""


@pytest.fixture(scope="module")
def chat_server(smollm2: Path) -> Iterator[ServerProcess]:
    """SmolLM2 with its adapters."""
    with running_server(
        "--base-model", str(smollm2), "--served-model-name", MODEL, "--adapters-dir", str(ROOT / "adapters")
    ) as running:
        yield running


def environment(folder: Path, requirements: str) -> str:
    """The interpreter of a new environment with these packages, at the versions that the file has."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r"]
    done = subprocess.run([*install, str(CLIENTS / requirements)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module")
def frameworks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return environment(tmp_path_factory.mktemp("frameworks"), "frameworks.txt")


def report_of(*command: str) -> dict[str, str]:
    """What a script prints at its end: a case and its result each, ``ok`` or what went wrong."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return report


def failures(report: dict[str, str]) -> dict[str, str]:
    assert report
    return {case: result for case, result in report.items() if result != "ok"}


def test_langchains_own_tests_of_a_chat_model_pass(frameworks: str, chat_server: ServerProcess, tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    command = [frameworks, "-m", "pytest", "-q", *ASYNCIO, f"--junitxml={results}"]
    variables = {**os.environ, "QUICKCHANGE_URL": chat_server.url, "QUICKCHANGE_MODEL": MODEL, "LANGSMITH_TRACING": ""}
    suite = shutil.copy(CLIENTS / "langchain_suite.py", tmp_path / "test_langchain.py")
    done = subprocess.run(
        [*command, str(suite)], env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=1800
    )
    cases = xml.etree.ElementTree.parse(results).getroot().iter("testcase")
    outcomes = {case.attrib["name"]: {child.tag for child in case} for case in cases}
    bad = {name for name, tags in outcomes.items() if tags & {"failure", "error"}}
    skipped = {name for name, tags in outcomes.items() if "skipped" in tags}
    print(f"passed {len(outcomes) - len(bad) - len(skipped)} of {len(outcomes)}; skipped: {sorted(skipped)}")
    assert bad <= NEEDS_SENSE, done.stdout[-6000:]
    assert skipped >= NOT_TEXT


@pytest.mark.parametrize("script", ["pydantic_ai_client", "litellm_client"])
def test_frameworks_get_text_objects_and_tool_calls(frameworks: str, chat_server: ServerProcess, script: str) -> None:
    assert failures(report_of(frameworks, str(CLIENTS / f"{script}.py"), chat_server.url, MODEL)) == {}


def test_instructor_gets_objects_in_its_modes(chat_server: ServerProcess, tmp_path: Path) -> None:
    python = environment(tmp_path / "environment", "instructor.txt")
    assert failures(report_of(python, str(CLIENTS / "instructor_client.py"), chat_server.url, MODEL)) == {}


def test_the_command_llm_gets_text_objects_and_tool_calls(frameworks: str, chat_server: ServerProcess) -> None:
    report = report_of(frameworks, str(CLIENTS / "llm_client.py"), chat_server.url, MODEL)
    assert [case for case, output in report.items() if not output or output.startswith("status")] == [], report
    assert json.loads(report["schema"])["color"] in ("red", "green")


def test_the_ai_sdk_and_openais_run_tools_get_text_objects_and_tool_calls(
    tool: Callable[[str], str], chat_server: ServerProcess, tmp_path: Path
) -> None:
    shutil.copy(CLIENTS / "ai_sdk.mjs", tmp_path)
    install = [tool("npm"), "install", "--no-audit", "--no-fund", *NODE_PACKAGES]
    done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert failures(report_of(tool("node"), str(tmp_path / "ai_sdk.mjs"), chat_server.url, MODEL)) == {}
