"""A process that renders chat templates within limits of memory and CPU time, which the operating system enforces.

A job and its result are JSON behind their length in bytes. A job that exceeds its CPU time ends the process. The
environment of templates is that of transformers (``utils/chat_template_utils.py``), without its tracking of spans.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from server.adapters.content.templates import TEMPLATE_EXTENSIONS
from server.text.worker_process import read_message, write_message

MAX_BYTES = 512 * 1024 * 1024
"""Address space of the process, of which Python itself takes about 30 MB."""
MAX_CHARS = 4 * 1024 * 1024
"""Maximum length of a rendered prompt."""


class _Dict:
    """``dict`` of a template, without the methods of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As of ``dict``."""
        return dict.fromkeys(*args, **kwargs)


class _TemplateNamespace(Namespace):
    """A namespace without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}, because it begins with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML's escapes, which jinja2's own filter writes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=TEMPLATE_EXTENSIONS)
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_TemplateNamespace
    )
    return environment.from_string(template)


def _result(job: dict[str, Any]) -> dict[str, Any]:
    try:
        text = _compiled(job["template"]).render(job["variables"])
    except MemoryError:
        return {"memory": True}
    except Exception as error:  # noqa: BLE001 - a template is a program: any exception is possible
        return {"error": str(error)[: job["max_message"]] or type(error).__name__}
    if len(text) > MAX_CHARS:
        return {"error": f"the rendered prompt has {len(text)} characters"}
    return {"text": text}


def main() -> None:
    """Render jobs until the stream of jobs ends, or one exceeds a limit."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (job := read_message(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])  # SIGPROF ends the process
        result = _result(job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_message(sys.stdout.buffer, result)
        if "memory" in result:
            return


if __name__ == "__main__":
    main()
