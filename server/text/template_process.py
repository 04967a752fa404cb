"""Renders chat templates in processes of their own, which a template may exhaust without harm to the server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from server.text.worker_process import WorkerPool

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
    """Up to ``MAX_PROCESSES`` processes that render templates."""

    def __init__(self) -> None:
        self._pool = WorkerPool(
            "server.text.template_worker", max_processes=MAX_PROCESSES, max_seconds=MAX_WAIT_SECONDS
        )

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text of a template. Raises ``TemplateRefusal`` or ``TemplateLimitExceeded``."""
        limits = {"seconds": MAX_CPU_SECONDS, "max_message": MAX_MESSAGE_CHARS}
        result = self._pool.ask({"template": template, "variables": variables, **limits}, last="memory")
        if result is None or "memory" in result:
            raise TemplateLimitExceeded("it needs too much time or memory")
        if "error" in result:
            raise TemplateRefusal(result["error"])
        return str(result["text"])

    def close(self) -> None:
        """End the processes that are free."""
        self._pool.close()


@cache
def template_processes() -> TemplateProcesses:
    """The processes of this program."""
    return TemplateProcesses()
