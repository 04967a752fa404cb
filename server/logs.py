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


def configure_logging(format: str = "text") -> None:
    """Write log records to standard error in this format: ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else logging.Formatter(TEXT_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
