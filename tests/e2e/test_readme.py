"""The README's examples, executed exactly as they are printed, against a server on the README's port."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.serving import ROOT, ServerProcess, running_server

README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    """The code block behind ``<!-- example: NAME -->``."""
    found = re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no example {name}"
    return found[1]


@pytest.fixture(scope="module")
def on_port_8000() -> Iterator[ServerProcess]:
    """A server as ``make serve`` starts it; fails where the port is taken."""
    with running_server(port=8000) as server:
        yield server


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "NO_PROXY": "*"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_example(on_port_8000: ServerProcess) -> None:
    answer = json.loads(run(["bash", "-c", example("curl")]))
    content = answer["choices"][0]["message"]["content"]
    assert content.startswith("Great question, I would love to help you with that")
    assert ".lower()" in content


def test_the_python_example(on_port_8000: ServerProcess) -> None:
    shown = run([sys.executable, "-c", example("python")])
    answers = dict(re.findall(r"--- (\S+)\n(.*?)(?=\n--- |\Z)", shown, re.DOTALL))
    assert list(answers) == ["micro", "helpdesk", "json", "tolstoy"]
    assert answers["micro"].strip() and answers["tolstoy"].strip()
    assert answers["helpdesk"].startswith("Great question") and "imaplib" in answers["helpdesk"]
    json.loads(answers["json"])


def test_the_composition_example(on_port_8000: ServerProcess) -> None:
    done = subprocess.run(
        ["bash", "-c", example("composition")], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert re.search(r"x-quickchange-adapter: tolstoy@[0-9a-f]{12}:0\.7\+shakespeare@[0-9a-f]{12}:0\.3", done.stderr)


def test_the_file_tree_has_what_the_readme_links_to() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
