"""Anthropic's ``/v1/messages``: the events of a stream, whole messages, and models.

The order of events: ``message_start``; for each block of the content ``content_block_start``, its text or arguments as
deltas, ``content_block_stop``; ``message_delta`` with the reason of the end; ``message_stop``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from server.api.active_request import ActiveRequest, ChoiceDelta, Usage
from server.api.envelopes import anthropic_error
from server.api.errors import Reply
from server.api.formats.calls import call_arguments
from server.api.formats.interface import Tokens, WholeAnswer
from server.api.formats.wire import Json, sse
from server.api.protocol.anthropic import MessagesRequest
from server.sequence import FinishReason
from server.text.answer import AnswerPart, Content, Reasoning, ToolCallPart

ANTHROPIC_VERSION = "anthropic-version"
"""The header that every request of Anthropic's clients has."""
_SIGNATURE = "unsigned"
_REASONS = {FinishReason.LENGTH: "max_tokens", FinishReason.TOOL_CALLS: "tool_use"}
_Key = tuple[str, int]


class MessagesFormat:
    """Messages of Anthropic's API."""

    media_type = "text/event-stream"
    ping = sse({"type": "ping"}, event="ping")

    def __init__(self, body: MessagesRequest, request: ActiveRequest, fingerprint: str) -> None:
        self._request = request
        self._stop_sequences = body.stop_sequences
        self._envelope = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": request.body.model,
            "system_fingerprint": fingerprint,
        }
        self._index = 0
        self._block: _Key | None = None
        self._end = _end(None, None, ())

    def opening(self) -> Iterator[str]:
        message = self._message([], _end(None, None, ()), self._request.usage)
        yield _event("message_start", message=message)

    def events(self, delta: ChoiceDelta) -> Iterator[str]:
        for part in delta.parts:
            if isinstance(part, Content) and not part.text:
                continue  # tokens without text, at the end
            yield from self._write(part)
        if delta.finish_reason is not None:
            self._end = _end(delta.finish_reason, delta.stop, self._stop_sequences)
            yield from self._close()

    def closing(self, usage: Usage) -> Iterator[str]:
        yield _event("message_delta", delta=self._end, usage=_usage(usage))
        yield _event("message_stop")

    def empty_delta(self, index: int) -> str:
        return self.ping

    def error(self, reply: Reply) -> Iterator[str]:
        request_id = self._request.log.request_id
        yield sse(anthropic_error(reply.body, status=reply.status, request_id=request_id), event="error")

    def logprobs(self, tokens: Tokens) -> Json | None:
        """None: Anthropic's API has no log probabilities."""
        return None

    def body(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        (answer,) = answers
        content: list[Json] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": _SIGNATURE})
        if answer.content:
            content.append({"type": "text", "text": answer.content})
        for call in answer.tool_calls:
            arguments = call_arguments(call.arguments)
            if arguments is not None:
                content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
        return self._message(content, _end(answer.finish_reason, answer.stop, self._stop_sequences), usage)

    def _message(self, content: list[Json], end: Json, usage: Usage) -> Json:
        return {**self._envelope, "content": content, **end, "usage": _usage(usage)}

    def _write(self, part: AnswerPart) -> Iterator[str]:
        """The events of a part, and those of the block that it ends or begins."""
        if self._block != _key(part):
            yield from self._close()
            self._block = _key(part)
            yield _event("content_block_start", index=self._index, content_block=_first(part))
        delta = _delta(part)
        if delta is not None:
            yield _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> Iterator[str]:
        """The end of the block that is being written, if any."""
        if self._block is None:
            return
        if self._block[0] == "thinking":
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            yield _event("content_block_delta", index=self._index, delta=delta)
        yield _event("content_block_stop", index=self._index)
        self._index += 1
        self._block = None


def _event(kind: str, **content: object) -> str:
    return sse({"type": kind, **content}, event=kind)


def _key(part: AnswerPart) -> _Key:
    """The kind of a part's block, and the number of the call."""
    if isinstance(part, ToolCallPart):
        return "tool_use", part.number
    return ("thinking" if isinstance(part, Reasoning) else "text"), 0


def _first(part: AnswerPart) -> Json:
    """A block as it begins."""
    if isinstance(part, ToolCallPart):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
    if isinstance(part, Reasoning):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(part: AnswerPart) -> Json | None:
    if isinstance(part, ToolCallPart):
        return {"type": "input_json_delta", "partial_json": part.arguments} if part.arguments else None
    if isinstance(part, Reasoning):
        return {"type": "thinking_delta", "thinking": part.text}
    return {"type": "text_delta", "text": part.text}


def _end(reason: FinishReason | None, stop: str | None, stop_sequences: Sequence[str]) -> Json:
    """Why a message ended; a stop string of the adapter's is the end of a turn."""
    if reason is FinishReason.STOP and stop in stop_sequences:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    stop_reason = None if reason is None else _REASONS.get(reason, "end_turn")
    return {"stop_reason": stop_reason, "stop_sequence": None}


def _usage(usage: Usage) -> Json:
    """Anthropic counts the tokens of a cached prefix apart from the other tokens of the input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def anthropic_models(models: Sequence[Json]) -> Json:
    """OpenAI's list of models as Anthropic's."""
    data = [anthropic_model(model) for model in models]
    return {"data": data, "has_more": False, "first_id": models[0]["id"], "last_id": models[-1]["id"]}


def anthropic_model(model: Json) -> Json:
    """OpenAI's model as Anthropic's."""
    created = datetime.fromtimestamp(model["created"], UTC)
    return {
        "type": "model",
        "id": model["id"],
        "display_name": model["id"],
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": model["context_length"],
    }
