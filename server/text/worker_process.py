"""Processes that take jobs from the server, one after another, as JSON through pipes."""

from __future__ import annotations

import atexit
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

_LENGTH = struct.Struct("<Q")
_ENVIRONMENT = ("LANG", "LD_LIBRARY_PATH", "PATH", "TZ")


class WorkerPool:
    """Up to ``max_processes`` processes of a module, started when they are needed and again after one has ended.

    Safe to use from any thread. A job may take ``max_seconds``.
    """

    def __init__(self, module: str, *, max_processes: int, max_seconds: float) -> None:
        self._module, self._max_seconds = module, max_seconds
        self._free: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(max_processes)
        atexit.register(self.close)

    def ask(self, job: Any, *, last: str | None = None) -> Any:
        """The result of a job; None if the process ended. A result with the key ``last`` ends its process."""
        with self._slots:
            process = self._take()
            result = ask_worker(process, job, max_seconds=self._max_seconds)
            if result is None or last in result:
                end_worker(process)
            else:
                with self._lock:
                    self._free.append(process)
            return result

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            while self._free:
                process = self._free.pop()
                if process.poll() is None:
                    return process
                end_worker(process)
        return start_worker(self._module)

    def close(self) -> None:
        """End the processes that are free."""
        with self._lock:
            while self._free:
                end_worker(self._free.pop())


def start_worker(module: str) -> subprocess.Popen[bytes]:
    """Start ``python -m module``, with little of the server's environment."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C is for the server
    )


def ask_worker(process: subprocess.Popen[bytes], job: Any, *, max_seconds: float) -> Any:
    """The result of a job; None if the process ended, or was ended after ``max_seconds``."""
    assert process.stdin is not None
    assert process.stdout is not None
    watchdog = threading.Timer(max_seconds, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        write_message(process.stdin, job)
        return read_message(process.stdout)
    except (OSError, ValueError):  # the process ended while it read or wrote
        return None
    finally:
        watchdog.cancel()


def end_worker(process: subprocess.Popen[bytes]) -> None:
    """End the process and close its pipes."""
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was not written yet
                continue
    process.wait()


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
