"""How chat and completions answer alike: admit, then stream or collect; give everything back on every way out."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import Request
from starlette.responses import JSONResponse, Response

from server.api.disconnect import unless_gone
from server.api.generation import Generation
from server.api.shapes import Envelope, Json, Shape, fingerprint
from server.api.sse import PING_SECONDS, EventStream, events_of
from server.sequence import FinishReason


async def answer(http: Request, generation: Generation, shape: Shape) -> Response:
    """The response to a generation not yet started. Raises what ``Generation.start`` does, and ``ClientGone``."""
    with ExitStack() as stack:
        stack.callback(generation.close)
        await unless_gone(generation.start(patience=PING_SECONDS), http.receive)
        envelope, headers = _envelope(generation, shape), _headers(generation)
        if generation.request.stream:
            events = events_of(generation, shape, envelope)
            return EventStream(events, headers=headers, on_end=stack.pop_all().close)
        whole = await unless_gone(_collect(generation, shape, envelope), http.receive)
        return JSONResponse(whole, headers=headers)


async def _collect(generation: Generation, shape: Shape, envelope: Envelope) -> Json:
    texts = [""] * generation.num_choices
    reasons = [FinishReason.STOP] * generation.num_choices
    async for delta in generation.deltas():
        if delta is not None:
            texts[delta.index] += delta.text
            reasons[delta.index] = delta.finish_reason or reasons[delta.index]
    choices = [shape.whole(index, *pair) for index, pair in enumerate(zip(texts, reasons, strict=True))]
    return envelope.around(shape.object, choices, usage=generation.usage.as_json())


def _envelope(generation: Generation, shape: Shape) -> Envelope:
    state = generation.state
    mark = fingerprint(state.base_name, generation.lease, state.version)
    return Envelope.new(shape, model=generation.request.model, fingerprint=mark)


def _headers(generation: Generation) -> dict[str, str]:
    return {} if generation.lease is None else {"x-quickchange-adapter": generation.lease.label}
