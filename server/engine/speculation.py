"""Drafts without a second model: what followed the last tokens before will probably follow them again.

Prompt lookup decoding (Saxena 2023) with a memory: what follows each pair and triple of tokens is known from a
sequence's prompt, and learned from all outputs of the same adapters and the same cache namespace, because an adapter
that keeps a template repeats itself. A draft is walked through these tables while its probability lasts. The
model judges every token of it in the step that computes the next one anyway, so a wrong draft costs rows, never tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from server.sequence import LoRARequest, Segment, Sequence

MAX_DRAFT_ROWS = 32
"""Rows of drafts in one step, over all sequences: beyond them a step is bound by arithmetic, and every row costs."""
MAX_PROMPT = 2048
"""Tokens of a prompt that are looked up in, the last ones."""
MAX_NGRAMS = 4096
"""N-grams remembered of all outputs of one (adapters, cache namespace), about 250 bytes each."""
MAX_TABLES = 64
"""How many (adapters, cache namespace) are remembered, the last used ones."""
MAX_PAUSE = 32
"""Most steps in which a sequence whose drafts were wrong gets none."""

_ORDERS = (3, 2)
_LONGEST = max(_ORDERS)
_MAX_HITS = 32
_INITIAL_ACCEPTANCE_RATE, _LEARNING = 0.5, 0.05
_BY_PROMPT = 0.8
"""How probable it is taken to be that what followed in the prompt follows again: it is about this very matter."""
_PAIR = 0.8
"""A pair of tokens tells less than a triple."""


class NGrams:
    """What followed each pair and triple of tokens, and how often in a row. At most ``max_entries`` are kept.

    Two generations: where the young one is full it becomes the old one, whose entries are lost unless they are met.
    ``acceptance_rate`` is the share of drafts that were right of late.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_young = max_entries // 2
        self._young: dict[tuple[int, ...], tuple[int, int]] = {}
        self._old: dict[tuple[int, ...], tuple[int, int]] = {}
        self.acceptance_rate = _INITIAL_ACCEPTANCE_RATE

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: tuple[int, ...]) -> tuple[int, int] | None:
        """The token that followed, and how often without another."""
        return self._young.get(key) or self._old.get(key)

    def learn(self, ids: list[int], start: int) -> None:
        """Note what the tokens from index ``start`` followed. One that contradicts halves the count."""
        for place in range(max(start, min(_ORDERS)), len(ids)):
            token = ids[place]
            for order in _ORDERS:
                if order <= place:
                    self._note(tuple(ids[place - order : place]), token)

    def _note(self, key: tuple[int, ...], token: int) -> None:
        known, hits = self.get(key) or (token, 0)
        if known == token:
            self._young[key] = (token, min(hits + 1, _MAX_HITS))
        else:
            self._young[key] = (known, hits // 2) if hits > 1 else (token, 1)
        if len(self._young) > self._max_young:
            self._old, self._young = self._young, {}


@dataclass
class _Track:
    """What is known of one running sequence: what followed last in its prompt, and what outputs like its own said.

    ``pause`` counts the steps in which it gets no draft, ``misses`` the drafts in a row that were wrong.
    """

    prompt: dict[tuple[int, ...], int]
    shared: NGrams
    misses: int = 0
    pause: int = 0

    def draft(self, context: list[int], *, most: int, least_likely: float, stop_ids: frozenset[int]) -> tuple[int, ...]:
        """The most likely tokens after the context, up to the first of ``stop_ids`` while likely enough."""
        drafts: list[int] = []
        likely = max(self.shared.acceptance_rate, 1.1 * least_likely)  # however low, what is nearly sure is tried
        while len(drafts) < most:
            token, chance = self._next(context)
            likely *= chance
            if likely < least_likely:
                break
            drafts.append(token)
            if token in stop_ids:
                break
            context = [*context[-_LONGEST + 1 :], token]
        return tuple(drafts)

    def _next(self, context: list[int]) -> tuple[int, float]:
        """The likeliest next token by the longest n-gram that is known, and its probability; 0 where none is."""
        for order in _ORDERS:
            if order > len(context):
                continue
            key = tuple(context[-order:])
            weight = 1.0 if order > 2 else _PAIR
            said, hits = self.shared.get(key) or (0, 0)
            chance = hits / (hits + 1)
            if chance <= _BY_PROMPT and (token := self.prompt.get(key)) is not None:
                return token, _BY_PROMPT * weight
            if hits:
                return said, chance * weight
        return 0, 0.0


class Speculation:
    """Gives drafts to the segments of a batch, at most ``max_drafts`` each, and learns from what the model said."""

    def __init__(self, *, max_drafts: int, max_model_len: int) -> None:
        self._max_drafts, self._max_model_len = max_drafts, max_model_len
        self._tracks: WeakKeyDictionary[Sequence, _Track] = WeakKeyDictionary()
        self._shared: OrderedDict[tuple[tuple[LoRARequest, ...], bytes], NGrams] = OrderedDict()

    def extend(self, segments: Iterable[Segment], *, room: int) -> list[Segment]:
        """The segments, with drafts of at most ``room`` rows together behind those that reach the last known token."""
        segments = list(segments)
        room = min(room, MAX_DRAFT_ROWS)
        # A row costs little beside a step of few rows, and as much as a token is worth beside one of many.
        least_likely = min(0.75, 0.1 + sum(segment.samples for segment in segments) / 40)
        for place, segment in enumerate(segments):
            if segment.samples and (drafts := self._drafts(segment.sequence, room, least_likely)):
                segments[place] = replace(segment, length=segment.length + len(drafts), drafts=drafts)
                room -= len(drafts)
        return segments

    def learn(self, segment: Segment, num_new: int) -> None:
        """Take in the tokens that the model said: ``num_new``, of which all but one had been drafted."""
        sequence = segment.sequence
        track = self._track(sequence)
        first = max(0, sequence.num_tokens - num_new - _LONGEST)
        ids = sequence.ids(first, sequence.num_tokens)
        track.shared.learn(ids, len(ids) - num_new)
        if segment.drafts:
            track.shared.acceptance_rate += _LEARNING * (
                (num_new - 1) / len(segment.drafts) - track.shared.acceptance_rate
            )
            track.misses = track.misses + 1 if num_new <= 1 else 0
            track.pause = min(2 ** (track.misses - 1), MAX_PAUSE) if track.misses > 1 else 0

    def forget(self, digest: str) -> None:
        """Drop what was learned from an adapter that is gone."""
        for key in [key for key in self._shared if any(use.digest == digest for use in key[0])]:
            del self._shared[key]

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
        return track.draft(context, most=most, least_likely=least_likely, stop_ids=sequence.eos_ids)

    def _track(self, sequence: Sequence) -> _Track:
        """What is known of a sequence."""
        if (track := self._tracks.get(sequence)) is None:
            prompt = _followers(sequence.prompt_ids[-MAX_PROMPT:])
            track = self._tracks[sequence] = _Track(prompt, self._shared_table(sequence))
        return track

    def _shared_table(self, sequence: Sequence) -> NGrams:
        key = (sequence.adapters, sequence.cache_namespace)
        table = self._shared.setdefault(key, NGrams(MAX_NGRAMS))
        self._shared.move_to_end(key)
        if len(self._shared) > MAX_TABLES:
            self._shared.popitem(last=False)
        return table


def _followers(ids: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """What followed each n-gram of a text, the last time where there were several."""
    found: dict[tuple[int, ...], int] = {}
    for order in _ORDERS:
        found.update(zip(zip(*(ids[start:] for start in range(order)), strict=False), ids[order:], strict=False))
    return found
