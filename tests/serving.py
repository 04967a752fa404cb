"""A real server process for tests: ``python -m server`` on a free loopback port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
_SERVING = re.compile(r"serving on (http://\S+)")


@dataclass
class ServerProcess:
    """A running server: where it listens, and what it has logged so far."""

    url: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        text = httpx.get(f"{self.url}/metrics").text
        total = 0.0
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if re.split(r"[{ ]", sample)[0] == name and all(
                f'{key}="{label}"' in sample for key, label in labels.items()
            ):
                total += float(value)
        return total

    def models(self) -> list[str]:
        """The names in the model list."""
        return [model["id"] for model in httpx.get(f"{self.url}/v1/models").json()["data"]]

    def until(self, description: str, condition: object, *, timeout: float = 30.0) -> None:
        """Wait until ``condition()`` holds; fails with the description and the end of the log."""
        assert callable(condition)
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{description}: not within {timeout} s\n" + "\n".join(self.log[-20:])
            time.sleep(0.05)


@contextlib.contextmanager
def running_server(
    *flags: str, cwd: Path = ROOT, port: int = 0, start_timeout: float = 120.0
) -> Iterator[ServerProcess]:
    """Start a server and wait until it listens; at the end it must stop by SIGTERM with status 0."""
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUICKCHANGE_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    server = ServerProcess("", process)
    thread = threading.Thread(target=_read_log, args=(server,), daemon=True)
    thread.start()
    try:
        server.until("the server listens", lambda: server.url or process.poll() is not None, timeout=start_timeout)
        server.until(
            "the server answers", lambda: _healthy(server) or process.poll() is not None, timeout=start_timeout
        )
        assert process.poll() is None, "the server did not start:\n" + "\n".join(server.log)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        thread.join(5)
    assert status == 0, f"the server ended with status {status}:\n" + "\n".join(server.log[-20:])


def _read_log(server: ServerProcess) -> None:
    assert server.process.stderr is not None
    with server.process.stderr as lines:
        for line in lines:
            server.log.append(line.rstrip())
            if match := _SERVING.search(line):
                server.url = match[1]


def _healthy(server: ServerProcess) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{server.url}/health", timeout=1.0).status_code == 200
    return False
