"""Renders chat templates in processes of their own, which a template may exhaust without harm to the server."""

from __future__ import annotations

import atexit
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

MAX_PROCESSES = 2
MAX_CPU_SECONDS = 2.0
MAX_WAIT_SECONDS = 30.0
"""For a process on a machine that is busy; its CPU time has a limit of its own."""
MAX_MESSAGE_CHARS = 300
_LENGTH = struct.Struct("<Q")
_ENVIRONMENT = ("LANG", "LD_LIBRARY_PATH", "PATH", "TZ")


class TemplateRefusal(Exception):
    """The template raised an exception; the text is its message."""


class TemplateLimitExceeded(Exception):
    """The template needs more time or memory than a template may."""


class TemplateProcesses:
    """Up to ``MAX_PROCESSES`` processes, started when they are needed and again after one has ended."""

    def __init__(self) -> None:
        self._free: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(MAX_PROCESSES)

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text of a template. Raises ``TemplateRefusal`` or ``TemplateLimitExceeded``."""
        with self._slots:
            process = self._take()
            limits = {"seconds": MAX_CPU_SECONDS, "max_message": MAX_MESSAGE_CHARS}
            result = _ask(process, {"template": template, "variables": variables, **limits})
            if result is None or "memory" in result:
                _end(process)
                raise TemplateLimitExceeded("it needs too much time or memory")
            with self._lock:
                self._free.append(process)
        if "error" in result:
            raise TemplateRefusal(result["error"])
        return str(result["text"])

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            while self._free:
                process = self._free.pop()
                if process.poll() is None:
                    return process
                _end(process)
        return _start()

    def close(self) -> None:
        """End the processes that are free."""
        with self._lock:
            while self._free:
                _end(self._free.pop())


@cache
def template_processes() -> TemplateProcesses:
    """The processes of this program."""
    processes = TemplateProcesses()
    atexit.register(processes.close)
    return processes


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "server.text.template_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C is for the server
    )


def _ask(process: subprocess.Popen[bytes], job: Mapping[str, Any]) -> Any:
    """The result of a job; None if the process ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    watchdog = threading.Timer(MAX_WAIT_SECONDS, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        write_message(process.stdin, job)
        return read_message(process.stdout)
    except (OSError, ValueError):  # the process ended while it read or wrote
        return None
    finally:
        watchdog.cancel()


def read_message(stream: IO[bytes]) -> Any:
    """The next message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    length = _LENGTH.unpack(head)[0]
    body = stream.read(length)
    return json.loads(body) if len(body) == length else None


def write_message(stream: IO[bytes], message: Any) -> None:
    """Write a message and flush."""
    body = json.dumps(message).encode()
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was not written yet
                continue
    process.wait()
