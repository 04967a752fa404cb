"""Log records as text, or as one JSON object a line (``--log-format json``).

A record whose only argument is ``Fields`` has names and values: ``name=value`` in text, members of the object in JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Fields(dict[str, Any]):
    """Names and values of a log record: ``logger.info("%s", Fields(...))``. None is written ``-`` in text."""

    def __str__(self) -> str:
        return " ".join(f"{name}={'-' if value is None else value}" for name, value in self.items())


class JsonFormatter(logging.Formatter):
    """One object a line: ``time`` (UTC), ``level``, ``logger``, then the fields, or ``message``; ``exception``.

    JSON escapes control characters, so that no text can begin a line of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(record.args, Mapping):
            entry.update(record.args)
        else:
            entry["message"] = record.getMessage()
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging() -> None:
    """Write log records as text to standard error, unless the program that runs this has handlers of its own."""
    logging.basicConfig(level=logging.INFO, format=TEXT_FORMAT, stream=sys.stderr)


def log_as_json() -> None:
    """Write log records as JSON from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
