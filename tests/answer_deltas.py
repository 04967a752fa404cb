"""A scripted answer with reasoning, text and calls, whole and as a stream, for the tests of response formats."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

from server.api.active_request import ActiveRequest, ChoiceDelta, Usage
from server.api.formats.interface import AnswerCollector, ResponseFormat
from server.sequence import FinishReason, SamplingParams
from server.text.answer import AnswerPart, Content, Reasoning, ToolCallPart
from tests.fakes import BASE

USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=2, reasoning_tokens=1)
PARTS: Sequence[AnswerPart] = (
    Reasoning("Hm"),
    Reasoning("..."),
    Content("Let me"),
    Content(" see."),
    ToolCallPart(0, id="call_a", name="look"),
    ToolCallPart(0, arguments='{"city":'),
    ToolCallPart(0, arguments='"Kyiv"}'),
    ToolCallPart(1, id="call_b", name="look"),
    ToolCallPart(1, arguments="{}"),
)


def fake_request(params: SamplingParams | None = None) -> ActiveRequest:
    """What a format asks of its request."""
    now = time.perf_counter()
    choice = SimpleNamespace(first_token_at=now - 0.2, last_token_at=now - 0.1, params=params or SamplingParams())
    log = SimpleNamespace(request_id="r", arrived=now - 0.3)
    request = SimpleNamespace(
        body=SimpleNamespace(model=BASE), token_texts=None, log=log, usage=USAGE, choices=[choice]
    )
    return cast(ActiveRequest, request)


def deltas(
    reason: FinishReason | None, *, stop: str | None = None, parts: Sequence[AnswerPart] = PARTS
) -> list[ChoiceDelta]:
    """A delta for each part, and the end."""
    return [*(ChoiceDelta(0, (part,)) for part in parts), ChoiceDelta(0, (), reason, stop)]


def streamed(format: ResponseFormat, answer: Sequence[ChoiceDelta]) -> Iterator[str]:
    """The stream of an answer."""
    yield from format.opening()
    for delta in answer:
        yield from format.events(delta)
    yield from format.closing(USAGE)


def whole(format: ResponseFormat, answer: Sequence[ChoiceDelta]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    collector = AnswerCollector(0, format)
    for delta in answer:
        collector.add(delta)
    return format.body([collector.answer()], USAGE)
