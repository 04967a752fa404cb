"""``/v1/responses``: the events of a stream in OpenAI's order, and whole responses.

The order: ``response.created``, ``response.in_progress``; for each item of the output ``output_item.added``, its text
or arguments as deltas, ``output_item.done``; ``response.completed``, ``response.incomplete`` or ``response.failed``.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from server.api.active_request import ActiveRequest, ChoiceDelta, Usage
from server.api.errors import Reply
from server.api.formats.interface import Tokens, WholeAnswer
from server.api.formats.wire import PING, Json, sse
from server.api.logprobs import chat_logprobs
from server.api.protocol.responses import ResponsesRequest
from server.sequence import FinishReason, SamplingParams
from server.text.answer import AnswerPart, Content, ToolCallPart

# Kinds of items that have content, and the type of its only part, which also names the events of its text.
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


@dataclass
class _OpenItem:
    """An item that is being written: its first fields, and its text or its arguments so far."""

    fields: Json
    call_number: int | None = None
    texts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, part: AnswerPart) -> _OpenItem:
        """The item that begins with a part."""
        if isinstance(part, ToolCallPart):
            assert part.id is not None and part.name is not None, "the first part of a call has its id and name"
            return cls(_new_call(part.id, part.name), part.number)
        return cls(_new_item("message" if isinstance(part, Content) else "reasoning"))

    @property
    def kind(self) -> str:
        return str(self.fields["type"])

    def takes(self, part: AnswerPart) -> bool:
        """Whether a part belongs to this item."""
        if isinstance(part, ToolCallPart):
            return part.number == self.call_number
        return self.kind == ("message" if isinstance(part, Content) else "reasoning")


class ResponsesFormat:
    """Responses; with log probabilities where ``include`` asks for them."""

    media_type = "text/event-stream"
    ping = PING

    def __init__(self, body: ResponsesRequest, request: ActiveRequest, fingerprint: str) -> None:
        self._envelope = {
            "id": _new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": request.body.model,
            **_settings(body, request.choices[0].params),
            "system_fingerprint": fingerprint,
        }
        self._token_texts = request.token_texts
        self._numbers = itertools.count()
        self._output: list[Json] = []
        self._item: _OpenItem | None = None
        self._status = "completed"

    def opening(self) -> Iterator[str]:
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response("in_progress", []))

    def events(self, delta: ChoiceDelta) -> Iterator[str]:
        self._status = _status(delta.finish_reason)
        for part in delta.parts:
            if isinstance(part, Content) and not part.text:
                continue  # tokens without text, at the end
            yield from self._write(part)
        if delta.finish_reason is not None:
            yield from self._close(self._status)

    def empty_delta(self, index: int) -> str:
        return self.ping

    def closing(self, usage: Usage) -> Iterator[str]:
        if not self._output:  # clients expect at least a message
            self._item = _OpenItem(_new_item("message"))
            yield from self._opened(self._item)
            yield from self._close(self._status)
        response = self._response(self._status, self._output, _usage(usage))
        yield self._event(f"response.{self._status}", response=response)

    def error(self, reply: Reply) -> Iterator[str]:
        error = reply.body["error"]
        yield self._event("error", code=error["code"], message=error["message"], param=error["param"])
        response = self._response("failed", self._output)
        response["error"] = {"code": "server_error", "message": error["message"]}
        yield self._event("response.failed", response=response)

    def logprobs(self, tokens: Tokens) -> Json | None:
        return None if self._token_texts is None else chat_logprobs(tokens, self._token_texts)

    def body(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        (answer,) = answers
        status = _status(answer.finish_reason)
        output = []
        if answer.reasoning:
            output.append(_finished(_new_item("reasoning"), answer.reasoning))
        if answer.content or not answer.tool_calls:
            logprobs = [] if answer.logprobs is None else answer.logprobs["content"]
            output.append(_finished(_new_item("message"), answer.content, logprobs=logprobs))
        output += [_finished(_new_call(call.id, call.name), call.arguments) for call in answer.tool_calls]
        output[-1]["status"] = status
        return self._response(status, output, _usage(usage))

    def _write(self, part: AnswerPart) -> Iterator[str]:
        """The events of a part, and those of the item that it ends or begins."""
        if self._item is None or not self._item.takes(part):
            yield from self._close()
            self._item = _OpenItem.of(part)
            yield from self._opened(self._item)
        text = part.arguments if isinstance(part, ToolCallPart) else part.text
        self._item.texts.append(text)
        if isinstance(part, ToolCallPart):
            if text:
                yield self._item_event("response.function_call_arguments.delta", self._item, delta=text)
        elif isinstance(part, Content):
            logprobs = self.logprobs(part.tokens)
            tokens = [] if logprobs is None else logprobs["content"]
            yield self._text_event("response.output_text.delta", self._item, delta=text, logprobs=tokens)
        else:
            yield self._text_event("response.reasoning_text.delta", self._item, delta=text)

    def _opened(self, item: _OpenItem) -> Iterator[str]:
        empty: Json = {"content": []} if item.kind in _PARTS else {"arguments": ""}
        added = item.fields | empty | {"status": "in_progress"}
        yield self._event("response.output_item.added", output_index=len(self._output), item=added)
        if item.kind in _PARTS:
            yield self._text_event("response.content_part.added", item, part=_part(item.kind, ""))

    def _close(self, status: str = "completed") -> Iterator[str]:
        """The end of the item that is being written, if any; log probabilities are in the deltas alone.

        Only the last item of a response can be incomplete.
        """
        if self._item is None:
            return
        item, text = self._item, "".join(self._item.texts)
        if item.kind in _PARTS:
            more: Json = {"logprobs": []} if item.kind == "message" else {}
            yield self._text_event(f"response.{_PARTS[item.kind]}.done", item, text=text, **more)
            yield self._text_event("response.content_part.done", item, part=_part(item.kind, text))
        else:
            name = item.fields["name"]
            yield self._item_event("response.function_call_arguments.done", item, name=name, arguments=text)
        finished = _finished(item.fields, text, status)
        yield self._event("response.output_item.done", output_index=len(self._output), item=finished)
        self._output.append(finished)
        self._item = None

    def _text_event(self, event: str, item: _OpenItem, **content: object) -> str:
        return self._item_event(event, item, content_index=0, **content)

    def _item_event(self, event: str, item: _OpenItem, **content: object) -> str:
        return self._event(event, item_id=item.fields["id"], output_index=len(self._output), **content)

    def _event(self, event: str, **content: object) -> str:
        return sse({"type": event, "sequence_number": next(self._numbers), **content}, event=event)

    def _response(self, status: str, output: list[Json], usage: Json | None = None) -> Json:
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._envelope | {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": incomplete,
            "output": output,
            "usage": usage,
        }


def _settings(body: ResponsesRequest, params: SamplingParams) -> Json:
    """The fields of the request that a response repeats, and what they are where the request has none."""
    return {
        "background": False,
        "frequency_penalty": body.frequency_penalty or 0,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": body.presence_penalty or 0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"} if body.text is None else body.text.format or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def _new_item(kind: str) -> Json:
    if kind == "message":
        return {"id": _new_id("msg_"), "type": "message", "role": "assistant"}
    return {"id": _new_id("rs_"), "type": "reasoning", "summary": []}


def _new_call(call_id: str, name: str) -> Json:
    return {"id": _new_id("fc_"), "type": "function_call", "call_id": call_id, "name": name}


def _finished(fields: Json, text: str, status: str = "completed", logprobs: Sequence[object] = ()) -> Json:
    """A whole item."""
    kind = fields["type"]
    content = {"content": [_part(kind, text, logprobs)]} if kind in _PARTS else {"arguments": text}
    return fields | content | {"status": status}


def _part(kind: str, text: str, logprobs: Sequence[object] = ()) -> Json:
    part: Json = {"type": _PARTS[kind], "text": text}
    return part | {"annotations": [], "logprobs": list(logprobs)} if kind == "message" else part


def _status(reason: FinishReason | None) -> str:
    return "incomplete" if reason is FinishReason.LENGTH else "completed"


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
