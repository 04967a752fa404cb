"""Renders chat templates in processes of their own, which a template may exhaust without harm to the server."""

from __future__ import annotations

import atexit
import subprocess
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from server.text.worker_process import ask_worker, end_worker, start_worker

MAX_PROCESSES = 2
MAX_CPU_SECONDS = 2.0
MAX_WAIT_SECONDS = 30.0
"""For a process on a machine that is busy; its CPU time has a limit of its own."""
MAX_MESSAGE_CHARS = 300


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
            job = {"template": template, "variables": variables, **limits}
            result = ask_worker(process, job, max_seconds=MAX_WAIT_SECONDS)
            if result is None or "memory" in result:
                end_worker(process)
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
                end_worker(process)
        return start_worker("server.text.template_worker")

    def close(self) -> None:
        """End the processes that are free."""
        with self._lock:
            while self._free:
                end_worker(self._free.pop())


@cache
def template_processes() -> TemplateProcesses:
    """The processes of this program."""
    processes = TemplateProcesses()
    atexit.register(processes.close)
    return processes
