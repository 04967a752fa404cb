"""A generation as server-sent events (HTML standard, section 9.2), in the order that OpenAI's clients rely on.

An opening chunk for each choice; deltas; a final chunk for each choice; with ``include_usage`` one chunk of usage;
``[DONE]``; nothing after it. What goes wrong after the 200 is one error event, and the end.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.disconnect import ClientGone, unless_gone
from server.api.errors import reply_to
from server.api.generation import Delta, Generation
from server.api.shapes import Envelope, Json, Shape, to_json

PING_SECONDS = 15.0
DONE = "data: [DONE]\n\n"
PING = ": ping\n\n"

_log = logging.getLogger("quickchange.api")


class EventStream(StreamingResponse):
    """A streamed answer. ``on_end`` is called once, however it ends: finished, failed, or the client gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], *, headers: Mapping[str, str], on_end: Callable[[], None]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client is gone."""
        try:
            await unless_gone(self.stream_response(send), receive)
        except (ClientGone, OSError):
            _log.debug("client gone in mid-stream")
        finally:
            self._on_end()


async def events_of(generation: Generation, shape: Shape, envelope: Envelope) -> AsyncIterator[str]:
    """All events of one generation."""
    try:
        for index in range(generation.num_choices):
            if (opening := shape.opening(index)) is not None:
                yield _event(_chunk(generation, shape, envelope, [opening]))
        async for delta in generation.deltas(patience=PING_SECONDS):
            if delta is None:
                yield PING
                continue
            for choice in _choices(shape, delta):
                yield _event(_chunk(generation, shape, envelope, [choice]))
        if generation.request.include_usage:
            usage = generation.usage.as_json()
            yield _event(envelope.around(shape.chunk_object, [], usage=usage))
        yield DONE
    except Exception as error:  # noqa: BLE001 - the 200 is out: an event is all the answer there can be
        _log.exception("request_id=%s failed in mid-stream", generation.request_id)
        yield _event(reply_to(error, request_id=generation.request_id).body)


def _choices(shape: Shape, delta: Delta) -> Iterator[Json]:
    if delta.text:
        yield shape.delta(delta.index, delta.text)
    if delta.finish_reason is not None:
        yield shape.final(delta.index, delta.finish_reason)


def _chunk(generation: Generation, shape: Shape, envelope: Envelope, choices: list[Json]) -> Json:
    if generation.request.include_usage:
        return envelope.around(shape.chunk_object, choices, usage=None)
    return envelope.around(shape.chunk_object, choices)


def _event(payload: Json) -> str:
    return f"data: {to_json(payload)}\n\n"
