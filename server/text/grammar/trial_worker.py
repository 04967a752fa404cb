"""The process in which grammars are tried: ``trial`` starts it. Each grammar is built in a fork with limits.

A grammar may need any time or memory, or end the process: llguidance recurses on the stack, and cannot be interrupted.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from server.text.grammar.limits import parser_limits
from server.text.worker_process import read_message, write_message

MAX_CPU_SECONDS = 1
MAX_ADDRESS_BYTES = 1024**3
STACK_BYTES = 4 * 1024 * 1024
"""Of the thread that builds: half of what the server's threads have."""


class _Bytes:
    """A tokenizer whose tokens are bytes, with the special tokens of another."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocab_size: int, special_tokens: dict[str, int], eos_id: int) -> None:
        self._ids = [number for number in range(vocab_size) if number not in special_tokens.values()][:256]
        self.eos_token_id = eos_id
        self.special_token_ids = sorted(special_tokens.values())
        self.tokens = [b""] * vocab_size
        for byte, number in enumerate(self._ids):
            self.tokens[number] = bytes([byte])
        for name, number in special_tokens.items():
            self.tokens[number] = name.encode()

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._ids[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def main() -> None:
    threading.stack_size(STACK_BYTES)
    while (job := read_message(sys.stdin.buffer)) is not None:
        write_message(sys.stdout.buffer, {"kilobytes": _kilobytes(job)})


def _kilobytes(job: dict[str, Any]) -> int | None:
    """The memory that a grammar took in a fork; None if it went beyond the limits."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _build(job, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as result:
        text = result.read()
    _, status = os.waitpid(child, 0)
    return int(text) if text and os.waitstatus_to_exitcode(status) == 0 else None


def _build(job: dict[str, Any], writer: int) -> None:
    """In the fork: build, compute the first token, write the memory that it took, and exit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    thread = threading.Thread(target=_try, args=(job,))
    thread.start()
    thread.join()
    os.write(writer, b"%d" % (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
    os._exit(0)


def _try(job: dict[str, Any]) -> None:
    vocabulary = _Bytes(job["vocab_size"], job["special_tokens"], job["eos_id"])
    tokenizer = LLTokenizer(vocabulary, n_vocab=job["vocab_size"], eos_token=[job["eos_id"]])  # type: ignore[arg-type]
    matcher = LLMatcher(tokenizer, job["grammar"], log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
        matcher.compute_ff_tokens()
        matcher.deep_copy()


if __name__ == "__main__":
    main()
