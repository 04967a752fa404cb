"""Data types shared by API, engine and model."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


class FinishReason(Enum):
    """Why a sequence ended, as in OpenAI's API: ``TOOL_CALLS`` is a ``STOP`` whose answer has tool calls."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


class ConstrainedRow(NamedTuple):
    """What a grammar allows for one token: the ``forced`` token, or those of ``allowed`` [vocab]."""

    forced: int | None
    allowed: NDArray[np.bool_] | None


class TokenMatcher(Protocol):
    """The state of a sequence in its grammar (``text/grammar/matcher.py``); the engine thread owns it.

    ``pending`` are the tokens that must come next. ``stopped``: nothing may follow. ``failed``: a limit was reached.
    """

    pending: tuple[int, ...]

    @property
    def failed(self) -> bool: ...

    @property
    def stopped(self) -> bool: ...

    def accept(self, token: int) -> bool:
        """Append a token; False if the grammar does not allow it."""
        ...

    def num_allowed(self, tokens: SequenceOf[int]) -> int:
        """How many of ``tokens``, from the first, may follow."""
        ...

    def rows(self, drafts: SequenceOf[int], end_ids: Set[int]) -> list[ConstrainedRow | None]:
        """What may follow after each number of ``drafts``, from none to all; None where a draft ends the answer."""
        ...


class TokenGrammar(Protocol):
    """A compiled grammar (``text/grammar/compiler.py``)."""

    def matcher(self) -> TokenMatcher:
        """A matcher at the start of the grammar."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    ``processors`` are names and values of logits processors (``model/logits/registry.py``). ``num_logprobs`` asks for
    log probabilities: of the chosen token, and of this number of most likely tokens. ``num_prompt_logprobs`` asks for
    those of each prompt token but the first, ``embedding`` for the mean of the prompt's last hidden states. The output
    follows ``grammar``.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    processors: tuple[tuple[str, Any], ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    embedding: bool = False
    grammar: TokenGrammar | None = None

    @property
    def needs_every_row(self) -> bool:
        """Whether each row of the prompt has a result, so that no prefix can be reused."""
        return self.embedding or self.num_prompt_logprobs is not None

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
    With ``max_tokens`` 0 the sequence ends when its prompt is computed. ``hidden_sum`` [hidden] is the sum of the last
    hidden states of the computed rows, if the sequence asks for an embedding. ``matcher`` is the state in its grammar.
    ``owner`` is the client that the sequence counts for: slots are shared fairly among owners.
    """

    id: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    params: SamplingParams
    adapters: tuple[LoRARequest, ...] = ()
    eos_ids: frozenset[int] = frozenset()
    cache_namespace: bytes = b""
    owner: str = ""
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    slot: int | None = None
    hidden_sum: Doubles | None = None
    seed: int = field(init=False)
    matcher: TokenMatcher | None = field(init=False)

    def __post_init__(self) -> None:
        assert self.prompt_ids and (self.max_tokens > 0 or (self.max_tokens == 0 and self.params.needs_every_row))
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed
        self.matcher = None if self.params.grammar is None else self.params.grammar.matcher()

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

    The last rows may be ``drafts``: proposed tokens behind the last known token, or, with ``forced``, the only ones
    that the sequence's grammar allows. With ``every_row`` each row of the prompt has a result: a log probability, or a
    part of the embedding.
    """

    sequence: Sequence
    slot: int
    start: int
    length: int
    drafts: tuple[int, ...] = ()
    every_row: bool = False
    forced: bool = False

    @property
    def end(self) -> int:
        """The position behind the last row that is no draft."""
        return self.start + self.length - len(self.drafts)

    @property
    def samples(self) -> bool:
        """Whether the segment reaches the last known token. Its row, and the row of each draft, then yield a token."""
        return self.end == self.sequence.num_tokens and self.sequence.max_tokens > 0

    @property
    def num_sampled(self) -> int:
        """Rows that yield a token, the last ones of the segment."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def num_scored(self) -> int:
        """Rows with the log probability of the prompt token behind them, the first ones of the segment."""
        if not self.every_row or self.sequence.params.num_prompt_logprobs is None:
            return 0
        return min(self.end, len(self.sequence.prompt_ids) - 1) - self.start

    @property
    def num_logits(self) -> int:
        """Rows whose logits are needed."""
        return self.num_sampled + (self.num_scored if self.every_row else 0)

    @property
    def ids(self) -> list[int]:
        """The token of each row."""
        return [*self.sequence.ids(self.start, self.end), *self.drafts]


class SampledToken(NamedTuple):
    """A sampled token; if its sequence asks for log probabilities, with its own and those of the most likely tokens.

    They are the model's, before processors, temperature and filters. ``top_logprobs`` are (id, log probability) pairs,
    most likely first. ``rank`` is that of a prompt token; 1 is the most likely.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class SampleRow(NamedTuple):
    """A row to sample from: output token ``number`` of a sequence; ``given`` is the draft before it, if any.

    A row of a prompt that asks for log probabilities is not sampled from: its token is ``known``, the next of the
    prompt.
    """

    sequence: Sequence
    number: int
    given: int | None = None
    known: int | None = None


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
    """The rows of one step, segment after segment. ``kv_ops`` are applied before the forward pass, in order.

    After the forward pass ``hidden_sums`` are the sums of the last hidden states, [hidden] by sequence id, of the
    segments whose sequences ask for an embedding.
    """

    segments: tuple[Segment, ...]
    kv_ops: tuple[KVOperation, ...] = ()
    hidden_sums: Mapping[int, Doubles] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.segments

    @property
    def num_rows(self) -> int:
        """Rows of the flat forward pass."""
        return sum(segment.length for segment in self.segments)

    @property
    def draws(self) -> list[SampleRow]:
        """The token of each row of the logits: to sample, or known."""
        draws: list[SampleRow] = []
        for segment in self.segments:
            sequence = segment.sequence
            if segment.every_row:
                following = sequence.prompt_ids[segment.start + 1 : segment.start + 1 + segment.num_scored]
                draws += (SampleRow(sequence, 0, known=token_id) for token_id in following)
            if segment.samples:
                number = len(sequence.output_ids)
                for place, given in enumerate((None, *segment.drafts)):
                    draws.append(SampleRow(sequence, number + place, given))
        return draws


@dataclass(frozen=True)
class StepOutput:
    """A token of a sequence, its end, or both; a step may yield several. ``failed`` is the reason of a failure.

    ``prompt`` are prompt tokens of the step with their log probabilities, ``embedding`` [hidden] is the mean of the
    prompt's last hidden states: for a sequence that asks for them.
    """

    sequence_id: int
    token: SampledToken | None
    finish_reason: FinishReason | None = None
    failed: str | None = None
    prompt: tuple[SampledToken, ...] = ()
    embedding: Doubles | None = None

    @property
    def last(self) -> bool:
        """Whether it is the sequence's last output."""
        return self.finish_reason is not None or self.failed is not None
