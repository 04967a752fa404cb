"""The response to a request: a whole answer, or a stream of server-sent events (HTML standard, section 9.2).

The order of events is the one that OpenAI's clients rely on: an opening chunk for each choice; deltas; a final chunk
for each choice; with ``include_usage`` one chunk of usage; ``[DONE]``. An error after the 200 is sent as one error
event, which ends the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.active_request import ActiveRequest, TextDelta
from server.api.errors import ClientGone, reply_to
from server.api.response_formats import (
    Envelope,
    Json,
    ResponseFormat,
    extend_logprobs,
    fingerprint,
    to_json,
    to_json_with_encoded_parts,
)
from server.api.state import ServerState

PING_SECONDS = 15.0
DONE = "data: [DONE]\n\n"
PING = ": ping\n\n"

_log = logging.getLogger("quickchange.api")

T = TypeVar("T")


async def cancel_on_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of ``work``. When the client disconnects, ``work`` is cancelled and ``ClientGone`` is raised.

    Call it after the body of the request has been read.
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


async def close_unless_streamed(work: Coroutine[Any, Any, Response], http: Request, stack: ExitStack) -> Response:
    """The response of ``work``, which enters its request into ``stack`` as soon as that exists.

    The stack closes the request on every exit but one: a stream that is handed over closes it itself.
    """
    with stack:
        response = await cancel_on_disconnect(work, http.receive)
        if isinstance(response, EventStream):
            stack.pop_all()
        return response


async def respond(request: ActiveRequest, format: ResponseFormat, state: ServerState) -> Response:
    """The answer, whole or as a stream.

    It waits for the first token, so that an error before it has an HTTP status of its own.
    """
    body, lease = request.body, request.lease
    await request.wait_for_first_output(PING_SECONDS)
    mark = fingerprint(state.base_name, lease, state.version)
    envelope = Envelope.new(format, model=body.model, fingerprint=mark)
    headers = {} if lease is None else {"x-quickchange-adapter": lease.label}
    if body.stream:
        return EventStream(request, format, envelope, headers)
    answer = await _collect(request, format, envelope)
    if body.num_logprobs is None:
        return JSONResponse(answer, headers=headers)
    content = await asyncio.to_thread(to_json_with_encoded_parts, answer)
    return Response(content, headers=headers, media_type="application/json")


async def _collect(request: ActiveRequest, format: ResponseFormat, envelope: Envelope) -> Json:
    """The whole answer, whose log probabilities are encoded delta by delta, so that the event loop is never blocked."""
    texts: list[list[str]] = [[] for _ in request.choices]
    logprobs = [format.logprobs(()) for _ in request.choices]
    async for delta in request.deltas():
        if delta is None:
            continue
        texts[delta.index].append(delta.text)
        extend_logprobs(logprobs[delta.index], format.logprobs(delta.tokens))
    answers = [
        TextDelta(choice.index, "".join(text), (), choice.finish_reason)
        for choice, text in zip(request.choices, texts, strict=True)
    ]
    choices = [format.message(answer, logprobs[answer.index]) for answer in answers]
    return envelope.wrap(format.object, choices, usage=request.usage.as_json())


class EventStream(StreamingResponse):
    """A streamed response. It closes the request when it ends: finished, failed, or client disconnected."""

    media_type = "text/event-stream"

    def __init__(
        self, request: ActiveRequest, format: ResponseFormat, envelope: Envelope, headers: dict[str, str]
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(_events(request, format, envelope), headers=headers)
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client disconnects."""
        try:
            await cancel_on_disconnect(self.stream_response(send), receive)
        except (ClientGone, OSError):
            _log.debug("request_id=%s client disconnected in mid-stream", self._request.log.request_id)
        finally:
            self._request.close()


async def _events(request: ActiveRequest, format: ResponseFormat, envelope: Envelope) -> AsyncIterator[str]:
    usage: dict[str, Json | None] = {"usage": None} if request.body.include_usage else {}
    try:
        for choice in request.choices:
            first = format.first_chunk(choice.index)
            if first is not None:
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
    except Exception as error:  # noqa: BLE001 - the 200 has been sent: only an error event can tell the client
        request.mark_failed()
        _log.exception("request_id=%s failed in mid-stream", request.log.request_id)
        yield _event(reply_to(error, request_id=request.log.request_id).body)


def _chunks(format: ResponseFormat, delta: TextDelta) -> Iterator[Json]:
    if delta.text:
        yield format.chunk(delta)
    if delta.finish_reason is not None:
        tokens = () if delta.text else delta.tokens  # tokens without text
        yield format.last_chunk(replace(delta, text="", tokens=tokens))


def _event(payload: Json) -> str:
    return f"data: {to_json(payload)}\n\n"
