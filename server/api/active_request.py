"""A request whose sequences are in the engine: one queue receives their outputs, which become text until it closes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from server.adapters.adapter_cache import Lease
from server.api.errors import ClientGone
from server.api.protocol import GenerationRequest
from server.api.request_log import EndedChoice, EndedRequest, RequestLog
from server.engine.async_engine import SubmittedSequence
from server.metrics import BASE
from server.sequence import FinishReason, SampledToken, SamplingParams, StepOutput
from server.text.answer import AnswerParser, AnswerPart, Reasoning, ToolCallPart
from server.text.detokenizer import Detokenizer, TextPiece
from server.text.prompt_text import PromptText
from server.text.repetition import is_loop
from server.text.token_texts import TokenTexts


@dataclass(frozen=True)
class ChoiceDelta:
    """What a step added to a choice: final parts of the answer and, at its end, the reason.

    ``stop`` is the stop string that ended it, if one did.
    """

    index: int
    parts: tuple[AnswerPart, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts of a request. A prompt counts once, whatever its number of answers.

    ``cached_tokens`` are the prompt tokens that no sequence of the request had to compute.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def as_json(self) -> dict[str, object]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass(eq=False)
class TokenRecord:
    """The tokens of a choice, for requests that ask for more than its text.

    ``prompt`` are the tokens behind the prompt's first one, with log probabilities; ``answer`` are all tokens that were
    sampled, also those that are not in the text: the end token, and those of a stop string.
    """

    prompt: list[SampledToken] = field(default_factory=list)
    answer: list[SampledToken] = field(default_factory=list)

    def add(self, output: StepOutput) -> None:
        self.prompt += output.prompt
        if output.token is not None:
            self.answer.append(output.token)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.answer]

    @property
    def mean_logprob(self) -> float:
        """Of the answer, whose tokens have log probabilities."""
        return sum(token.logprob or 0.0 for token in self.answer) / max(1, len(self.answer))


@dataclass(eq=False)
class Choice:
    """One answer: its sequence and sampling, detokenizer and parser, token count and times (``time.perf_counter``)."""

    index: int
    sequence: SubmittedSequence
    params: SamplingParams
    detokenizer: Detokenizer
    eos_ids: frozenset[int]
    parser: AnswerParser
    record: TokenRecord | None = None
    num_tokens: int = 0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    finish_reason: FinishReason | None = None
    has_tool_call: bool = False
    num_reasoning_tokens: int = 0

    def take(self, output: StepOutput) -> ChoiceDelta:
        """Convert a step's output to parts. A stop string ends the sequence; its later outputs are ignored."""
        if self.record is not None:
            self.record.add(output)
        piece = self._text(output)
        reason = FinishReason.STOP if self.detokenizer.stop is not None else output.finish_reason
        parts = self.parser.push(piece)
        if reason is not None:
            parts += self.parser.finish()
            self.sequence.close()
        for part in parts:
            self._note(part)
        if reason is FinishReason.STOP and self.has_tool_call:
            reason = FinishReason.TOOL_CALLS
        self.finish_reason = reason
        return ChoiceDelta(self.index, tuple(parts), reason, self.detokenizer.stop)

    def _note(self, part: AnswerPart) -> None:
        if isinstance(part, ToolCallPart):
            self.has_tool_call = True
        elif isinstance(part, Reasoning):
            self.num_reasoning_tokens += len(part.tokens)

    def _text(self, output: StepOutput) -> TextPiece:
        """The text that is final after the output; an end token has none."""
        piece = TextPiece("")
        if output.token is not None:
            self._count_token()
            is_eos = output.finish_reason is FinishReason.STOP and output.token.id in self.eos_ids
            if not is_eos:
                piece = self.detokenizer.push(output.token)
        if output.finish_reason is None:
            return piece
        rest = self.detokenizer.finish()
        return TextPiece(piece.text + rest.text, piece.tokens + rest.tokens)

    def ended(self, finish: str) -> EndedChoice:
        """The choice for the log, with its finish label there."""
        complete = self.finish_reason is not None
        loops = complete and is_loop(self.sequence.output_ids)
        return EndedChoice(finish, self.num_tokens, self.first_token_at, self.last_token_at, complete, loops)

    def _count_token(self) -> None:
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.num_tokens += 1


@dataclass(eq=False)
class ActiveRequest:
    """``choices`` are its answers. As a context manager it is closed at the end of the block.

    ``token_texts`` has the text of tokens where log probabilities are asked for. ``prompt_ids`` are the prompts, and
    ``prompt_texts`` their texts if the answers repeat them.
    ``close`` ends the running sequences, writes the log line and releases the lease.
    """

    body: GenerationRequest
    lease: Lease | None
    log: RequestLog
    num_prompt_tokens: int
    token_texts: TokenTexts | None = None
    prompt_ids: Sequence[Sequence[int]] = ()
    prompt_texts: Sequence[PromptText] = ()
    choices: list[Choice] = field(default_factory=list)
    _outputs: asyncio.Queue[tuple[int, StepOutput | Exception]] = field(default_factory=asyncio.Queue)
    _first: tuple[int, StepOutput | Exception] | None = None
    _failed: bool = False
    _closed: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ClientGone):
            self.mark_failed()
        self.close()

    def sink(self, index: int) -> Callable[[StepOutput | Exception], None]:
        """The function that the engine calls with the outputs of choice ``index``."""
        return lambda output: self._outputs.put_nowait((index, output))

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        cached = [choice.sequence.num_cached for choice in self.choices]
        number = self.body.num_candidates
        num_cached = sum(min(cached[first : first + number]) for first in range(0, len(cached), number))
        num_tokens = sum(choice.num_tokens for choice in self.choices)
        num_reasoning = sum(choice.num_reasoning_tokens for choice in self.choices)
        return Usage(self.num_prompt_tokens, num_tokens, num_cached, num_reasoning)

    async def wait_for_first_output(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds. An error that arrives as the first output is raised as in ``deltas``."""
        self._first = await self._next(timeout)
        if self._first is not None and isinstance(self._first[1], Exception):
            raise self._first[1]

    async def deltas(self, *, timeout: float | None = None) -> AsyncIterator[ChoiceDelta | None]:
        """Deltas of all choices as they arrive; None whenever nothing arrived for ``timeout`` seconds.

        Raises ``GenerationFailed`` or ``EngineUnavailable``, which end the whole request.
        """
        while any(choice.finish_reason is None for choice in self.choices):
            item = await self._next(timeout)
            if item is None:
                yield None
                continue
            index, output = item
            choice = self.choices[index]
            if choice.finish_reason is not None:
                continue  # ended by a stop string: later outputs and errors of its sequence do not matter
            if isinstance(output, Exception):
                raise output
            yield choice.take(output)

    async def _next(self, timeout: float | None) -> tuple[int, StepOutput | Exception] | None:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            async with asyncio.timeout(timeout):
                return await self._outputs.get()
        except TimeoutError:
            return None

    def mark_failed(self) -> None:
        """Count choices without an answer as ``failed`` instead of ``cancelled``."""
        self._failed = True

    def close(self) -> None:
        """End the sequences, write the log line, release the lease. May be called more than once.

        The log comes before the release: the last release of a deleted adapter removes its metric series.
        """
        if self._closed:
            return
        self._closed = True
        for choice in self.choices:
            choice.sequence.close()
        try:
            self.log.write(self._ended())
        finally:
            if self.lease is not None:
                self.lease.release()

    def _ended(self) -> EndedRequest:
        lease, usage = self.lease, self.usage
        return EndedRequest(
            adapter=BASE if lease is None else lease.label,
            metrics_label=BASE if lease is None else lease.metrics_label,
            choices=[choice.ended(self._finish_label(choice)) for choice in self.choices],
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
        )

    def _finish_label(self, choice: Choice) -> str:
        if self._failed and (choice.finish_reason is None or not self.body.stream):
            return "failed"  # without a stream, a failure loses the answers that had ended as well
        return "cancelled" if choice.finish_reason is None else choice.finish_reason.value
