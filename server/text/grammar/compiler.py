"""Compiles grammars within limits, and keeps the compiled ones."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llguidance import LLMatcher

from server.errors import InvalidRequest
from server.text.deadline import DeadlineExceeded, deadline
from server.text.grammar.grammar import Grammar, Rules, documents, kind_of
from server.text.grammar.library import library_grammar
from server.text.grammar.limits import MAX_GRAMMAR_BYTES, parser_limits
from server.text.grammar.matcher import GrammarMatcher
from server.text.grammar.refusals import reason_of
from server.text.grammar.schema import Source, refusal
from server.text.grammar.tokenizer import GrammarTokenizer
from server.text.grammar.trial import grammar_trial

NUM_THREADS = 4
MAX_CACHE_BYTES = 64 * 1024 * 1024
MAX_REFUSED = 256
"""Refused grammars whose refusal is kept."""
REFUSED_SECONDS = 60.0
"""How long a refusal is kept: a busy machine may refuse what a quiet one would not."""
MAX_FORCED_TOKENS = 8192
"""Most tokens that a grammar may force at its start: more are an endless document."""
_MAX_CONVERSION_SECONDS = 1.0
_MAX_SEARCH_SECONDS = 3.0
_BYTES_PER_GRAMMAR = 100_000
_TOO_COSTLY = "it needs too much time or memory to compile"


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar for one tokenizer, from which sequences get their matchers; ``num_bytes`` is its size in memory."""

    start: GrammarMatcher
    num_bytes: int
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def matcher(self) -> GrammarMatcher:
        """A matcher at the start of the grammar."""
        with self._lock:
            return self.start.copy()


class GrammarCompiler:
    """Compiled grammars, the most recently used ones, of at most ``max_bytes`` in all. Safe to use from any thread.

    ``pool`` are the threads that compile, so that neither requests nor the engine wait for it.
    """

    def __init__(self, *, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._compiled: OrderedDict[tuple[int, Grammar], tuple[GrammarTokenizer, CompiledGrammar]] = OrderedDict()
        self._refused: OrderedDict[tuple[int, bytes], tuple[float, InvalidRequest]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self.pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")

    @property
    def num_bytes(self) -> int:
        """Bytes of the grammars that are kept."""
        return self._num_bytes

    def compile(self, grammar: Grammar, tokenizer: GrammarTokenizer) -> CompiledGrammar:
        """The compiled grammar. Takes up to seconds. Raises ``InvalidRequest`` if it cannot be compiled."""
        key = (id(tokenizer), grammar)
        found = self._find(key, tokenizer)
        if found is None:
            digest = (id(tokenizer), hashlib.sha256(repr(grammar).encode()).digest())
            self._raise_refused(digest)
            try:
                found = _compile(grammar, tokenizer)
            except InvalidRequest as error:
                self._keep_refused(digest, error)
                raise
            self._keep(key, tokenizer, found)
        return found

    def _raise_refused(self, digest: tuple[int, bytes]) -> None:
        """Refuse a grammar at once that was refused before, so that repeating it costs nothing."""
        with self._lock:
            since, error = self._refused.get(digest, (-math.inf, None))
        if error is not None and time.monotonic() - since < REFUSED_SECONDS:
            raise InvalidRequest(str(error), param=error.param, code=error.code)

    def _keep_refused(self, digest: tuple[int, bytes], error: InvalidRequest) -> None:
        kept = InvalidRequest(str(error), param=error.param, code=error.code)  # without a traceback and its variables
        with self._lock:
            self._refused[digest] = (time.monotonic(), kept)
            self._refused.move_to_end(digest)
            if len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)

    def _find(self, key: tuple[int, Grammar], tokenizer: GrammarTokenizer) -> CompiledGrammar | None:
        with self._lock:
            entry = self._compiled.get(key)
            if entry is None or entry[0] is not tokenizer:
                return None
            self._compiled.move_to_end(key)
            return entry[1]

    def _keep(self, key: tuple[int, Grammar], tokenizer: GrammarTokenizer, compiled: CompiledGrammar) -> None:
        with self._lock:
            replaced = self._compiled.pop(key, None)
            self._num_bytes += compiled.num_bytes - (0 if replaced is None else replaced[1].num_bytes)
            self._compiled[key] = (tokenizer, compiled)
            while self._num_bytes > self._max_bytes:
                _, (_, oldest) = self._compiled.popitem(last=False)
                self._num_bytes -= oldest.num_bytes


def _compile(grammar: Grammar, tokenizer: GrammarTokenizer) -> CompiledGrammar:
    built = _build(grammar, tokenizer)
    if isinstance(built, CompiledGrammar):
        return built
    parts = list(documents(grammar))
    is_searched = len(parts) > 1 and built != _TOO_COSTLY
    until = time.monotonic() + _MAX_SEARCH_SECONDS
    for part in parts if is_searched else ():
        if time.monotonic() > until:
            break
        alone = _build(part, tokenizer)
        if not isinstance(alone, CompiledGrammar):
            raise refusal(part.source, kind_of(part), alone)
    source = parts[0].source if parts else Source("tools", "tools")
    raise refusal(source, kind_of(parts[0]) if parts else "grammar", built)


def _build(grammar: Grammar, tokenizer: GrammarTokenizer) -> CompiledGrammar | str:
    """The compiled grammar, or why there is none."""
    try:
        with deadline(_MAX_CONVERSION_SECONDS):
            text = library_grammar(grammar, tokenizer.special_tokens, tokenizer.eos_id)
    except (Exception, DeadlineExceeded):  # noqa: BLE001 - the library's converter of GBNF raises any
        return "it is not a valid grammar"
    if len(text) > MAX_GRAMMAR_BYTES:
        return f"it has more than {MAX_GRAMMAR_BYTES} bytes together with the others"
    num_bytes = grammar_trial().num_bytes(text, tokenizer)
    if num_bytes is None or num_bytes > MAX_CACHE_BYTES:
        return _TOO_COSTLY
    matcher = LLMatcher(tokenizer.library, text, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return reason_of(matcher.get_error(), with_place=isinstance(grammar, Rules) and "::=" not in grammar.text)
    start = GrammarMatcher(
        matcher,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        special_ids=frozenset(tokenizer.special_tokens.values()),
    )
    if len(start.pending) > MAX_FORCED_TOKENS:
        return "its document would have no end"
    return CompiledGrammar(start, num_bytes + len(text) + _BYTES_PER_GRAMMAR)
