"""Tries grammars in a process of their own, which they may exhaust or crash without harm to the server."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from server.text.grammar.tokenizer import GrammarTokenizer
from server.text.template_process import read_message, write_message

MAX_WAIT_SECONDS = 20.0
"""For a process on a machine that is busy; its CPU time has a limit of its own."""
_ENVIRONMENT = ("LANG", "LD_LIBRARY_PATH", "PATH", "TZ")


class GrammarTrial:
    """One process, started at the first grammar and again after it has ended. Safe to use from any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def num_bytes(self, grammar: str, tokenizer: GrammarTokenizer) -> int | None:
        """The memory that building a grammar takes; None if it takes too much, or too long, or fails badly."""
        job = {
            "grammar": grammar,
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": tokenizer.special_tokens,
            "eos_id": tokenizer.eos_id,
        }
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.end()
                self._process = _start()
            result = _ask(self._process, job)
            if result is None:
                self.end()
                return None
        kilobytes = result["kilobytes"]
        return None if kilobytes is None else 1024 * int(kilobytes)

    def end(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # what was not written yet
                    continue
        process.wait()


@cache
def grammar_trial() -> GrammarTrial:
    """The process of this program."""
    trial = GrammarTrial()
    atexit.register(trial.end)
    return trial


def _start() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "server.text.grammar.trial_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C is for the server
    )


def _ask(process: subprocess.Popen[bytes], job: object) -> dict[str, int | None] | None:
    """The result of a job; None if the process ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    watchdog = threading.Timer(MAX_WAIT_SECONDS, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        write_message(process.stdin, job)
        result: dict[str, int | None] | None = read_message(process.stdout)
    except (OSError, ValueError):  # the process ended while it read or wrote
        return None
    finally:
        watchdog.cancel()
    return result
