"""Data types shared by API, engine and model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple


class FinishReason(Enum):
    """Why a sequence ended, as in OpenAI's API: ``TOOL_CALLS`` is a ``STOP`` whose answer has tool calls."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    ``processors`` are names and values of logits processors (``model/logits/registry.py``). ``num_logprobs`` asks for
    log probabilities: of the chosen token, and of this number of most likely tokens.
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
        """Whether the most likely token is chosen; also at temperatures so low that dividing by them would overflow."""
        return self.temperature < 1e-4


@dataclass(frozen=True, order=True)
class LoRARequest:
    """An adapter that a sequence uses: its weights digest, and the scale of its delta."""

    digest: str
    scale: float = 1.0


@dataclass(eq=False)
class Sequence:
    """One choice of a request in the engine: prompt, output and state.

    The deltas of ``adapters`` are added to the base; the base alone has none. ``cache_namespace`` is a digest of API
    key and cache salt: KV prefixes and n-grams are shared only within it. ``num_computed`` counts the tokens whose keys
    and values are in the slot, ``num_cached`` those that were reused. ``seed`` is the requested or a random one.
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
        """Tokens without keys and values: the rest of the prompt, or the last sampled token."""
        return self.num_tokens - self.num_computed

    @property
    def decoding(self) -> bool:
        """Whether the prompt is computed: each step then yields at least one token."""
        return self.num_computed >= len(self.prompt_ids)

    def ids(self, start: int, end: int) -> list[int]:
        """Token ids at positions ``start`` to ``end`` of prompt and output together."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        return [*self.prompt_ids[start:end], *self.output_ids[: max(0, end - num_prompt)]]


@dataclass(frozen=True)
class Segment:
    """The rows of one sequence in a batch: positions ``start`` to ``start + length``, in KV slot ``slot``.

    The last rows may be ``drafts``: proposed tokens behind the last known token.
    """

    sequence: Sequence
    slot: int
    start: int
    length: int
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The position behind the last row that is no draft."""
        return self.start + self.length - len(self.drafts)

    @property
    def samples(self) -> bool:
        """Whether the segment reaches the last known token. Its row, and the row of each draft, then yield a token."""
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
    """A sampled token; if its sequence asks for log probabilities, with its own and those of the most likely tokens.

    They are the model's, before processors, temperature and filters. ``top_logprobs`` are (id, log probability) pairs,
    most likely first.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class SampleRow(NamedTuple):
    """A row to sample from: output token ``number`` of a sequence; ``given`` is the draft before it, if any."""

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
    """Return the memory of a KV slot behind its first ``length`` positions to the operating system."""

    slot: int
    length: int


KVOperation = CopyPrefix | ReleaseTail


@dataclass(frozen=True)
class Batch:
    """The rows of one step, segment after segment. ``kv_ops`` are applied before the forward pass, in order."""

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
        """The token to sample from each row of the logits."""
        return [
            SampleRow(segment.sequence, len(segment.sequence.output_ids) + place, given)
            for segment in self.segments
            if segment.samples
            for place, given in enumerate((None, *segment.drafts))
        ]


@dataclass(frozen=True)
class StepOutput:
    """A token of a sequence, its end, or both; a step may yield several. ``failed`` is the reason of a failure."""

    sequence_id: int
    token: SampledToken | None
    finish_reason: FinishReason | None = None
    failed: str | None = None

    @property
    def last(self) -> bool:
        """Whether it is the sequence's last output."""
        return self.finish_reason is not None or self.failed is not None
