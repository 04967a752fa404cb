"""The response to a request, whole or streamed, in a response format; on every exit the request is closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.active_request import ActiveRequest
from server.api.errors import ClientGone, reply_to
from server.api.formats.interface import AnswerCollector, ResponseFormat, WholeAnswer
from server.api.formats.wire import fingerprint, to_json_with_encoded_parts
from server.api.state import PingMode, ServerState
from server.errors import QuickchangeError

PING_SECONDS = 15.0

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


async def respond(
    request: ActiveRequest, new_format: Callable[[ActiveRequest, str], ResponseFormat], state: ServerState
) -> Response:
    """The answer, whole or as a stream, in the format that ``new_format`` returns for the request and a fingerprint.

    It waits for the first token, so that an error before it has an HTTP status of its own.
    """
    lease = request.lease
    await request.wait_for_first_output(PING_SECONDS)
    format = new_format(request, fingerprint(state.computation, lease, state.version))
    headers = {} if lease is None else {"x-quickchange-adapter": lease.label}
    if request.body.stream:
        return EventStream(request, format, headers, state.sse_ping)
    answers = await _collect(request, format)
    if request.token_texts is None:
        return JSONResponse(format.body(answers, request.usage), headers=headers)
    content = await asyncio.to_thread(_encoded, request, format, answers)
    return Response(content, headers=headers, media_type="application/json")


def _encoded(request: ActiveRequest, format: ResponseFormat, answers: Sequence[WholeAnswer]) -> bytes:
    """In a thread: the JSON of answers with log probabilities, which may be many."""
    return to_json_with_encoded_parts(format.body(answers, request.usage))


async def _collect(request: ActiveRequest, format: ResponseFormat) -> list[WholeAnswer]:
    """The whole answers. Log probabilities are encoded delta by delta, so that the event loop is never blocked."""
    collectors = [AnswerCollector(choice.index, format) for choice in request.choices]
    async for delta in request.deltas():
        if delta is not None:
            collectors[delta.index].add(delta)
    return [collector.answer() for collector in collectors]


class EventStream(StreamingResponse):
    """A streamed response. It closes the request when it ends: finished, failed, or client disconnected."""

    def __init__(self, request: ActiveRequest, format: ResponseFormat, headers: dict[str, str], ping: PingMode) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(_events(request, format, ping), headers=headers, media_type=format.media_type)
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client disconnects."""
        try:
            await cancel_on_disconnect(self.stream_response(send), receive)
        except (ClientGone, OSError):
            _log.debug("request_id=%s client disconnected in mid-stream", self._request.log.request_id)
        finally:
            self._request.close()


def _first_open(request: ActiveRequest) -> int:
    """The first choice that has not ended."""
    return next(choice.index for choice in request.choices if choice.finish_reason is None)


async def _events(request: ActiveRequest, format: ResponseFormat, ping: PingMode) -> AsyncIterator[str]:
    try:
        for event in format.opening():
            yield event
        async for delta in request.deltas(timeout=None if ping == "off" else PING_SECONDS):
            if delta is None:
                yield format.empty_delta(_first_open(request)) if ping == "delta" else format.ping
                continue
            for event in format.events(delta):
                yield event
        for event in format.closing(request.usage):
            yield event
    except Exception as error:  # noqa: BLE001 - the 200 has been sent: only an error event can tell the client
        request.mark_failed()
        _log.warning(
            "request_id=%s failed in mid-stream: %s",
            request.log.request_id,
            error,
            exc_info=None if isinstance(error, QuickchangeError) else error,
        )
        for event in format.error(reply_to(error, request_id=request.log.request_id)):
            yield event
