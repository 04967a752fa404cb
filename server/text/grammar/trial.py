"""Tries grammars in a process of their own, which they may exhaust or crash without harm to the server."""

from __future__ import annotations

import atexit
import subprocess
import threading
from functools import cache

from server.text.grammar.tokenizer import GrammarTokenizer
from server.text.worker_process import ask_worker, end_worker, start_worker

MAX_WAIT_SECONDS = 20.0
"""For a process on a machine that is busy; its CPU time has a limit of its own."""


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
                self._process = start_worker("server.text.grammar.trial_worker")
            result = ask_worker(self._process, job, max_seconds=MAX_WAIT_SECONDS)
            if result is None:
                self.end()
                return None
        kilobytes = result["kilobytes"]
        return None if kilobytes is None else 1024 * int(kilobytes)

    def end(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            end_worker(process)


@cache
def grammar_trial() -> GrammarTrial:
    """The process of this program."""
    trial = GrammarTrial()
    atexit.register(trial.end)
    return trial
