"""How a request is responded to: whole, or as server-sent events (HTML standard, section 9.2); and clients that leave.

The order of events is the one that OpenAI's clients rely on: an opening chunk for each choice; deltas; a final chunk
for each choice; with ``include_usage`` one chunk of usage; ``[DONE]``; nothing after it. What goes wrong after the 200
is one error event, and the end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.active_request import ActiveRequest, TextDelta
from server.api.errors import ClientGone, reply_to
from server.api.response_formats import Envelope, Json, ResponseFormat, fingerprint, to_json
from server.api.state import ServerState

PING_SECONDS = 15.0
DONE = "data: [DONE]\n\n"
PING = ": ping\n\n"

_log = logging.getLogger("quickchange.api")

T = TypeVar("T")


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of ``work``, which is cancelled as soon as the client disconnects. Raises ``ClientGone`` then.

    Call it when the request's body has been read.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(request: ActiveRequest, format: ResponseFormat, state: ServerState) -> Response:
    """The response to a request, which is closed on every way out.

    A stream begins with the first token, so that what goes wrong before has a status of its own.
    """
    with ExitStack() as stack:
        stack.callback(request.close)
        await request.wait_for_first_output(PING_SECONDS)
        lease = request.lease
        mark = fingerprint(state.base_name, lease, state.version)
        envelope = Envelope.new(format, model=request.body.model, fingerprint=mark)
        headers = {} if lease is None else {"x-quickchange-adapter": lease.label}
        if not request.body.stream:
            return JSONResponse(await _collect(request, format, envelope), headers=headers)
        stack.pop_all()
        return EventStream(request, format, envelope, headers)


async def _collect(request: ActiveRequest, format: ResponseFormat, envelope: Envelope) -> Json:
    deltas: list[list[TextDelta]] = [[] for _ in request.choices]
    async for delta in request.deltas():
        if delta is not None:
            deltas[delta.index].append(delta)
    choices = [format.message(_joined(parts)) for parts in deltas]
    return envelope.wrap(format.object, choices, usage=request.usage.as_json())


def _joined(deltas: list[TextDelta]) -> TextDelta:
    """A choice's deltas, the last of which has the reason of its end, as one."""
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    return replace(deltas[-1], text="".join(delta.text for delta in deltas), tokens=tokens)


class EventStream(StreamingResponse):
    """A streamed response. The request is closed however it ends: finished, failed, or the client gone."""

    media_type = "text/event-stream"

    def __init__(
        self, request: ActiveRequest, format: ResponseFormat, envelope: Envelope, headers: dict[str, str]
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(_events(request, format, envelope), headers=headers)
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client is gone."""
        try:
            await unless_gone(self.stream_response(send), receive)
        except (ClientGone, OSError):
            _log.debug("client gone in mid-stream")
        finally:
            self._request.close()


async def _events(request: ActiveRequest, format: ResponseFormat, envelope: Envelope) -> AsyncIterator[str]:
    usage: dict[str, Json | None] = {"usage": None} if request.body.include_usage else {}
    try:
        for choice in request.choices:
            if (first := format.first_chunk(choice.index)) is not None:
                yield _event(envelope.wrap(format.chunk_object, [first], **usage))
        async for delta in request.deltas(timeout=PING_SECONDS):
            if delta is None:
                yield PING
                continue
            for chunk in _chunks(format, delta):
                yield _event(envelope.wrap(format.chunk_object, [chunk], **usage))
        if request.body.include_usage:
            yield _event(envelope.wrap(format.chunk_object, [], usage=request.usage.as_json()))
        yield DONE
    except Exception as error:  # noqa: BLE001 - the 200 is out: an event is all the answer there can be
        _log.exception("request_id=%s failed in mid-stream", request.log.request_id)
        yield _event(reply_to(error, request_id=request.log.request_id).body)


def _chunks(format: ResponseFormat, delta: TextDelta) -> Iterator[Json]:
    if delta.text:
        yield format.chunk(delta)
    if delta.finish_reason is not None:
        tokens = () if delta.text else delta.tokens  # such as have no text
        yield format.last_chunk(replace(delta, text="", tokens=tokens))


def _event(payload: Json) -> str:
    return f"data: {to_json(payload)}\n\n"
