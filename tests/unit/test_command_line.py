"""The command line answers before it imports what takes seconds: torch and transformers."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "serve", "chat", "adapters", "adapters list", "adapters check", "adapters add", "adapters convert", "adapters pin",
    "adapters unpin", "adapters rollback", "base", "base list", "base get",
)  # fmt: skip
FAILING = (
    "serve --max-num-seqs none",
    "serve --base-model no-such-folder",
    "serve --base-model tests",
    "serve --adapters-dir pyproject.toml",
    "chat --base-model no-such-folder --port 1 Hello",
    "chat --url http://127.0.0.1:1 Hello",
    "adapters list --max-num-seqs none",
    "adapters list --base-model no-such-folder",
    "adapters check no-such-adapter",
    "adapters check --base-model no-such-folder helpdesk",
    "adapters convert no-such-adapter",
    "adapters pin helpdesk",
    "base list --base-model no-such-folder",
    "base get no-such-base",
)
PROGRAM = """\
import sys
from server.__main__ import main

for line in sys.stdin.read().splitlines():
    try:
        status = main(line.split())
    except SystemExit as ended:
        status = ended.code
    heavy = [name for name in ("torch", "transformers", "numba", "peft") if name in sys.modules]
    print("#", line, "->", status, *heavy)
"""


def ends(commands: Sequence[str]) -> list[str]:
    """Commands one after another in one process: each with its exit status, and what is imported of what is heavy."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(commands),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [line.removeprefix("# ") for line in done.stdout.splitlines() if line.startswith("# ")]


def test_help_needs_no_torch() -> None:
    assert ends([f"{command} --help" for command in COMMANDS]) == [f"{command} --help -> 0" for command in COMMANDS]


def test_what_fails_at_once_needs_no_torch() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        failing = [*FAILING, f"serve --port {taken.getsockname()[1]}"]
        assert ends(failing) == [f"{command} -> 1" for command in failing]


def test_pins_and_an_empty_shelf_need_no_torch(tmp_path: Path) -> None:
    """A base is loaded to judge folders; where there are none it stays on the disk."""
    flags = f"--no-demo-adapters --adapters-dir {tmp_path / 'adapters'} --state-dir {tmp_path / 'state'}"
    commands = [f"adapters list {flags}", f"adapters pin helpdesk {flags}"]
    assert ends(commands) == [f"{command} -> 0" for command in commands]
