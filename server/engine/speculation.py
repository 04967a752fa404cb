"""Speculative decoding without a draft model: drafts from n-gram tables.

Prompt lookup decoding (Saxena 2023), extended by outputs: which token follows each pair and triple of tokens is read
from a sequence's prompt, and learned from all outputs of the same adapters and cache namespace, because answers of an
adapter repeat phrases. A draft is extended token by token while its estimated probability is high enough. The model
verifies all draft tokens in the step that computes the next token, so a wrong draft costs rows, never tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from server.sequence import LoRARequest, Segment, Sequence

MAX_DRAFT_ROWS = 32
"""Most draft rows in one step, over all sequences: with more rows a step is bound by arithmetic."""
MAX_PROMPT = 2048
"""Last tokens of a prompt that are read into its table."""
MAX_NGRAMS = 4096
"""N-grams kept of the outputs of one (adapters, cache namespace), about 250 bytes each."""
MAX_TABLES = 64
"""Tables of (adapters, cache namespace) kept, the most recently used ones."""
MAX_PAUSE = 32
"""Most steps without drafts for a sequence whose drafts were rejected."""

_ORDERS = (3, 2)
_LONGEST = max(_ORDERS)
_MAX_HITS = 32
_INITIAL_ACCEPTANCE_RATE, _LEARNING = 0.5, 0.05
_BY_PROMPT = 0.8
"""Estimated probability that a token which followed in the prompt follows again."""
_PAIR = 0.8
"""Factor on the probability where only a pair of tokens is known, not a triple."""


class NGrams:
    """The token that followed each pair and triple of tokens, and its count. At most ``max_entries`` are kept.

    Two generations: when the young one is full it becomes the old one, and the entries of the old one are dropped.
    ``acceptance_rate`` is the moving average of the share of accepted draft tokens.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_young = max_entries // 2
        self._young: dict[tuple[int, ...], tuple[int, int]] = {}
        self._old: dict[tuple[int, ...], tuple[int, int]] = {}
        self.acceptance_rate = _INITIAL_ACCEPTANCE_RATE

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: tuple[int, ...]) -> tuple[int, int] | None:
        """The token that followed, and its count."""
        return self._young.get(key) or self._old.get(key)

    def learn(self, ids: list[int], start: int) -> None:
        """Learn which n-grams the tokens from index ``start`` follow. A different token halves the count."""
        for place in range(max(start, min(_ORDERS)), len(ids)):
            token = ids[place]
            for order in _ORDERS:
                if order <= place:
                    self._learn_token(tuple(ids[place - order : place]), token)

    def _learn_token(self, key: tuple[int, ...], token: int) -> None:
        known, hits = self.get(key) or (token, 0)
        if known == token:
            self._young[key] = (token, min(hits + 1, _MAX_HITS))
        else:
            self._young[key] = (known, hits // 2) if hits > 1 else (token, 1)
        if len(self._young) > self._max_young:
            self._old, self._young = self._young, {}


@dataclass
class _Track:
    """The tables of one running sequence: n-grams of its prompt, and the ``shared`` ones of outputs.

    ``pause`` counts the coming steps without drafts, ``misses`` the rejected drafts in a row.
    """

    prompt: dict[tuple[int, ...], int]
    shared: NGrams
    misses: int = 0
    pause: int = 0

    def draft(self, context: list[int], *, most: int, least_likely: float, stop_ids: frozenset[int]) -> tuple[int, ...]:
        """The most likely tokens after the context, while likely enough, up to the first of ``stop_ids``."""
        drafts: list[int] = []
        # With a low acceptance rate, tokens that are almost certain by their n-gram are drafted even so.
        probability = max(self.shared.acceptance_rate, 1.1 * least_likely)
        while len(drafts) < most:
            token, factor = self._next(context)
            probability *= factor
            if probability < least_likely:
                break
            drafts.append(token)
            if token in stop_ids:
                break
            context = [*context[-_LONGEST + 1 :], token]
        return tuple(drafts)

    def _next(self, context: list[int]) -> tuple[int, float]:
        """The most likely next token by the longest known n-gram, and its probability; 0 if none is known."""
        for order in _ORDERS:
            if order > len(context):
                continue
            key = tuple(context[-order:])
            weight = 1.0 if order > 2 else _PAIR
            token, hits = self.shared.get(key) or (0, 0)
            probability = hits / (hits + 1)
            if probability <= _BY_PROMPT and key in self.prompt:
                return self.prompt[key], _BY_PROMPT * weight
            if hits:
                return token, probability * weight
        return 0, 0.0


class Speculation:
    """Adds at most ``max_drafts`` drafts to each segment of a batch, and learns from the model's tokens."""

    def __init__(self, *, max_drafts: int, max_model_len: int) -> None:
        self._max_drafts, self._max_model_len = max_drafts, max_model_len
        self._tracks: WeakKeyDictionary[Sequence, _Track] = WeakKeyDictionary()
        self._shared: OrderedDict[tuple[tuple[LoRARequest, ...], bytes], NGrams] = OrderedDict()

    def add_drafts(self, segments: Iterable[Segment], *, room: int) -> list[Segment]:
        """The segments, with at most ``room`` draft rows in total behind those that reach the last known token."""
        segments = list(segments)
        room = min(room, MAX_DRAFT_ROWS)
        # An additional row costs little in a step of few rows, and about as much as a token in one of many.
        least_likely = min(0.75, 0.1 + sum(segment.samples for segment in segments) / 40)
        for place, segment in enumerate(segments):
            drafts = (
                self._drafts(segment.sequence, room, least_likely) if segment.samples and not segment.forced else ()
            )
            if drafts:
                segments[place] = replace(segment, length=segment.length + len(drafts), drafts=drafts)
                room -= len(drafts)
        return segments

    def learn(self, segment: Segment, num_new: int, *, num_forced: int = 0) -> None:
        """Learn from the ``num_new`` tokens of a step: one, the accepted drafts, and those that a grammar forced."""
        sequence = segment.sequence
        track = self._track(sequence)
        first = max(0, sequence.num_tokens - num_new - _LONGEST)
        ids = sequence.ids(first, sequence.num_tokens)
        track.shared.learn(ids, len(ids) - num_new)
        if segment.drafts and not segment.forced:
            share = (num_new - num_forced - 1) / len(segment.drafts)
            track.shared.acceptance_rate += _LEARNING * (share - track.shared.acceptance_rate)
            track.misses = track.misses + 1 if num_new - num_forced <= 1 else 0
            track.pause = min(2 ** (track.misses - 1), MAX_PAUSE) if track.misses > 1 else 0

    def forget(self, digest: str) -> None:
        """Drop the tables of an adapter that was removed."""
        for adapters, namespace in list(self._shared):
            if any(adapter.digest == digest for adapter in adapters):
                del self._shared[adapters, namespace]

    def _drafts(self, sequence: Sequence, room: int, least_likely: float) -> tuple[int, ...]:
        track = self._track(sequence)
        if track.pause:
            track.pause -= 1
            return ()
        known = sequence.num_tokens
        most = min(
            room,
            max(1, self._max_drafts >> track.misses),
            sequence.max_tokens - len(sequence.output_ids) - 1,
            self._max_model_len - known - 1,
        )
        context = sequence.ids(max(0, known - _LONGEST), known)
        drafts = track.draft(context, most=most, least_likely=least_likely, stop_ids=sequence.eos_ids)
        if drafts and sequence.matcher is not None:
            return drafts[: sequence.matcher.num_allowed(drafts)]
        return drafts

    def _track(self, sequence: Sequence) -> _Track:
        track = self._tracks.get(sequence)
        if track is None:
            prompt = _followers(sequence.prompt_ids[-MAX_PROMPT:])
            track = _Track(prompt, self._shared_table(sequence))
            self._tracks[sequence] = track
        return track

    def _shared_table(self, sequence: Sequence) -> NGrams:
        key = (sequence.adapters, sequence.cache_namespace)
        table = self._shared.setdefault(key, NGrams(MAX_NGRAMS))
        self._shared.move_to_end(key)
        if len(self._shared) > MAX_TABLES:
            self._shared.popitem(last=False)
        return table


def _followers(ids: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """The token that followed each n-gram of a text at its last occurrence."""
    found: dict[tuple[int, ...], int] = {}
    for order in _ORDERS:
        found.update(zip(zip(*(ids[start:] for start in range(order)), strict=False), ids[order:], strict=False))
    return found
