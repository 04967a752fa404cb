"""Tries grammars in processes of their own, which they may exhaust or crash without harm to the server."""

from __future__ import annotations

from functools import cache

from server.text.grammar.tokenizer import GrammarTokenizer
from server.text.worker_process import WorkerPool

MAX_PROCESSES = 2
MAX_WAIT_SECONDS = 20.0
"""For a process on a machine that is busy; its CPU time has a limit of its own."""


class GrammarTrial:
    """Up to ``MAX_PROCESSES`` processes that build grammars. Safe to use from any thread."""

    def __init__(self) -> None:
        self._pool = WorkerPool(
            "server.text.grammar.trial_worker", max_processes=MAX_PROCESSES, max_seconds=MAX_WAIT_SECONDS
        )

    def num_bytes(self, grammar: str, tokenizer: GrammarTokenizer) -> int | None:
        """The memory that building a grammar takes; None if it takes too much, or too long, or fails badly."""
        job = {
            "grammar": grammar,
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": tokenizer.special_tokens,
            "eos_id": tokenizer.eos_id,
        }
        result = self._pool.ask(job)
        if result is None or result["kilobytes"] is None:
            return None
        return 1024 * int(result["kilobytes"])


@cache
def grammar_trial() -> GrammarTrial:
    """The processes of this program."""
    return GrammarTrial()
