"""The nouns of generation: what is asked of the engine, what it works on, and what it says after each step."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple


class FinishReason(Enum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class SequenceStatus(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    ``processors`` are names and values of those that change the logits before (``model/logits/registry.py``).
    ``num_logprobs`` asks for log probabilities: of the chosen token, and of so many of the likeliest.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    processors: tuple[tuple[str, Any], ...] = ()
    num_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken; a temperature so low amounts to it, and would overflow."""
        return self.temperature < 1e-4


@dataclass(frozen=True, order=True)
class LoRARequest:
    """An adapter's part in a sequence: its weights digest, and the factor on its delta."""

    digest: str
    scale: float = 1.0


@dataclass(eq=False)
class Sequence:
    """One generation; a request with ``n=3`` is three of them.

    ``adapters`` are those whose deltas are added to the base, none for the base alone. ``cache_namespace``
    is a digest of API key and cache salt: KV prefixes and drafts are shared only within it. ``num_computed``
    counts the tokens whose keys and values are in the slot; ``num_cached`` of them were there before. Tokens are
    drawn by ``seed``: the one that was asked for, or one of its own.
    """

    id: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    params: SamplingParams
    adapters: tuple[LoRARequest, ...] = ()
    eos_ids: frozenset[int] = frozenset()
    cache_namespace: bytes = b""
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    slot: int | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.prompt_ids and self.max_tokens > 0
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to go through the model: the rest of the prompt, or the one just sampled."""
        return self.num_tokens - self.num_computed

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt is computed, so that each step yields a token."""
        return self.num_computed >= len(self.prompt_ids)

    def ids(self, start: int, end: int) -> list[int]:
        """Token ids at positions ``start`` to ``end``, of prompt and output end to end."""
        border = len(self.prompt_ids)
        if start >= border:
            return self.output_ids[start - border : end - border]
        return [*self.prompt_ids[start:end], *self.output_ids[: max(0, end - border)]]


@dataclass(frozen=True)
class Segment:
    """A run of rows of one sequence in a batch: positions ``start`` to ``start + length``, in KV slot ``slot``.

    The last rows may be ``drafts``: guesses at the tokens behind the last known one.
    """

    sequence: Sequence
    slot: int
    start: int
    length: int
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """One past the last position of a token that is known, not drafted."""
        return self.start + self.length - len(self.drafts)

    @property
    def samples(self) -> bool:
        """Whether the segment reaches the last known token, whose row yields the next; each draft's yields one more."""
        return self.end == self.sequence.num_tokens

    @property
    def num_sampled(self) -> int:
        """Rows that yield a token, the last ones of the segment."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def ids(self) -> list[int]:
        """The token of each row."""
        return [*self.sequence.ids(self.start, self.end), *self.drafts]


class SampledToken(NamedTuple):
    """A chosen token. Where its sequence asks for log probabilities: its own, and ids and those of the likeliest.

    They are the model's, before processors, temperature and filters; ``top_logprobs`` begin with the likeliest.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class SampleRow(NamedTuple):
    """A token to be drawn: the ``number``-th of a sequence's output, where the one before it came out as ``given``."""

    sequence: Sequence
    number: int
    given: int | None = None


@dataclass(frozen=True)
class CopyPrefix:
    """Copy the keys and values of positions 0 to ``length`` from one KV slot to another."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class ReleaseTail:
    """Give the memory of a KV slot behind its first ``length`` positions back to the operating system."""

    slot: int
    length: int


KVOperation = CopyPrefix | ReleaseTail


@dataclass(frozen=True)
class Batch:
    """What one step computes: segments end to end. ``kv_ops`` are applied before, in their order."""

    segments: tuple[Segment, ...]
    kv_ops: tuple[KVOperation, ...] = ()

    def __post_init__(self) -> None:
        assert self.segments

    @property
    def num_rows(self) -> int:
        """Rows of the flat forward pass."""
        return sum(segment.length for segment in self.segments)

    @property
    def draws(self) -> list[SampleRow]:
        """What is to be drawn from each row of the logits."""
        return [
            SampleRow(segment.sequence, len(segment.sequence.output_ids) + place, given)
            for segment in self.segments
            if segment.samples
            for place, given in enumerate((None, *segment.drafts))
        ]


@dataclass(frozen=True)
class StepOutput:
    """One token of a sequence, its end, or both; a step may yield several. ``failed`` says why it could not go on."""

    sequence_id: int
    token: SampledToken | None
    finish_reason: FinishReason | None = None
    failed: str | None = None

    @property
    def last(self) -> bool:
        """Whether nothing more comes for this sequence."""
        return self.finish_reason is not None or self.failed is not None
