"""What a response format is given, and what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.api.active_request import ChoiceDelta, Usage
from server.api.errors import Reply
from server.api.formats.wire import Json, extend_logprobs
from server.sequence import FinishReason
from server.text.answer import Content, Reasoning, ToolCallPart
from server.text.detokenizer import TokenStart

Tokens = tuple[TokenStart, ...]


@dataclass
class WholeToolCall:
    """A whole call of a tool; ``arguments`` are JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class WholeAnswer:
    """A whole choice. ``logprobs`` are those of the content, in the format's form; ``stop`` is the stop string."""

    index: int
    logprobs: Json | None = None
    content: str = ""
    reasoning: str = ""
    tool_calls: list[WholeToolCall] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | None = None


class ResponseFormat(Protocol):
    """How one response is written; an object serves one response and may keep state."""

    media_type: str
    """Of a stream."""
    ping: str
    """A part of a stream that clients ignore; it keeps the connection open."""

    def opening(self) -> Iterable[str]:
        """The beginning of a stream, before any output."""

    def events(self, delta: ChoiceDelta) -> Iterable[str]:
        """What a stream gets for more output of a choice."""

    def empty_delta(self, index: int) -> str:
        """A ping as data: a chunk of a choice without content, or ``ping`` where the format has no such chunk."""

    def closing(self, usage: Usage) -> Iterable[str]:
        """The end of a stream whose choices have all ended."""

    def error(self, reply: Reply) -> Iterable[str]:
        """The end of a stream that failed: only an event can tell, because the 200 has been sent."""

    def logprobs(self, tokens: Tokens) -> Json | None:
        """Log probabilities of content's tokens, lists under names; None where they are not asked for."""

    def body(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        """The response that is not streamed."""


class AnswerCollector:
    """The whole answer of one choice out of its deltas."""

    def __init__(self, index: int, format: ResponseFormat) -> None:
        self._format = format
        self._answer = WholeAnswer(index, format.logprobs(()))
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._arguments: list[list[str]] = []

    def add(self, delta: ChoiceDelta) -> None:
        for part in delta.parts:
            if isinstance(part, Content):
                self._content.append(part.text)
                extend_logprobs(self._answer.logprobs, self._format.logprobs(part.tokens))
            elif isinstance(part, Reasoning):
                self._reasoning.append(part.text)
            else:
                self._add_to_call(part)
        self._answer.finish_reason, self._answer.stop = delta.finish_reason, delta.stop

    def answer(self) -> WholeAnswer:
        """The answer, once its last delta is added."""
        self._answer.content = "".join(self._content)
        self._answer.reasoning = "".join(self._reasoning)
        for call, arguments in zip(self._answer.tool_calls, self._arguments, strict=True):
            call.arguments = "".join(arguments)
        return self._answer

    def _add_to_call(self, part: ToolCallPart) -> None:
        calls = self._answer.tool_calls
        if part.number == len(calls):
            assert part.id is not None and part.name is not None, "the first part of a call has its id and name"
            calls.append(WholeToolCall(part.id, part.name))
            self._arguments.append([])
        self._arguments[part.number].append(part.arguments)
