"""Ollama's ``/api/chat`` and ``/api/generate``: whole answers, and streams of JSON lines that end with durations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

from server.api.active_request import ActiveRequest, ChoiceDelta, Usage
from server.api.envelopes import ollama_error
from server.api.errors import Reply
from server.api.formats.calls import call_arguments
from server.api.formats.interface import Tokens, WholeAnswer, WholeToolCall
from server.api.formats.wire import Json, to_json
from server.api.logprobs import chat_logprobs
from server.sequence import FinishReason
from server.text.answer import AnswerPart, Content, Reasoning, ToolCallPart

NANOSECONDS = 1_000_000_000


class OllamaChatFormat:
    """Answers of ``/api/chat``. A call is written whole, because its arguments are an object."""

    media_type = "application/x-ndjson"

    def __init__(self, request: ActiveRequest, fingerprint: str) -> None:
        self._request = request
        self._model, self._fingerprint = request.body.model, fingerprint
        self._call: WholeToolCall | None = None
        self._num_calls = 0
        self._reason: FinishReason | None = None
        self.ping = self._line(self._content())  # every line has to be JSON

    def opening(self) -> Iterable[str]:
        """Nothing: the first line has content."""
        return ()

    def events(self, delta: ChoiceDelta) -> Iterator[str]:
        for part in delta.parts:
            if isinstance(part, ToolCallPart):
                yield from self._add_to_call(part)
            else:
                yield from self._end_call()
                yield self._line(self._written(part))
        if delta.finish_reason is not None:
            yield from self._end_call()
            self._reason = delta.finish_reason

    def closing(self, usage: Usage) -> Iterator[str]:
        yield self._line(self._content(), self._end(self._reason, usage))

    def empty_delta(self, index: int) -> str:
        return self.ping

    def error(self, reply: Reply) -> Iterator[str]:
        yield to_json(ollama_error(reply.body)) + "\n"

    def logprobs(self, tokens: Tokens) -> Json | None:
        texts = self._request.token_texts
        return None if texts is None else chat_logprobs(tokens, texts)

    def body(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        (answer,) = answers
        calls = [shown for call in answer.tool_calls if (shown := self._shown_call(call)) is not None]
        content = self._content(answer.content, thinking=answer.reasoning, calls=calls)
        if answer.logprobs is not None:
            content["logprobs"] = answer.logprobs["content"]
        return self._wrap(content, self._end(answer.finish_reason, usage))

    def _content(self, text: str = "", *, thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        """The part of a line or an answer that is not the same in chat and generate."""
        message: Json = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = list(calls)
        return {"message": message}

    def _written(self, part: AnswerPart) -> Json:
        if isinstance(part, Reasoning):
            return self._content(thinking=part.text)
        assert isinstance(part, Content)
        logprobs = self.logprobs(part.tokens)
        tokens = {} if logprobs is None else {"logprobs": logprobs["content"]}
        return self._content(part.text) | tokens

    def _add_to_call(self, part: ToolCallPart) -> Iterator[str]:
        if part.id is not None and part.name is not None:
            yield from self._end_call()
            self._call = WholeToolCall(part.id, part.name)
        assert self._call is not None, "the first part of a call has its id and name"
        self._call.arguments += part.arguments

    def _end_call(self) -> Iterator[str]:
        if self._call is None:
            return
        shown, self._call = self._shown_call(self._call), None
        if shown is not None:
            yield self._line(self._content(calls=[shown]))

    def _shown_call(self, call: WholeToolCall) -> Json | None:
        """A call; None if it was cut off."""
        arguments = call_arguments(call.arguments)
        if arguments is None:
            return None
        self._num_calls += 1
        return {"id": call.id, "function": {"index": self._num_calls - 1, "name": call.name, "arguments": arguments}}

    def _end(self, reason: FinishReason | None, usage: Usage) -> Json:
        """Reason, counts, and durations in nanoseconds; the adapter's load is part of the prompt's time."""
        arrived, choice = self._request.log.arrived, self._request.choices[0]
        return {
            "done_reason": "length" if reason is FinishReason.LENGTH else "stop",
            "total_duration": int((time.perf_counter() - arrived) * NANOSECONDS),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": max(0, int((choice.first_token_at - arrived) * NANOSECONDS)),
            "eval_count": usage.completion_tokens,
            "eval_duration": int((choice.last_token_at - choice.first_token_at) * NANOSECONDS),
        }

    def _line(self, content: Json, end: Json | None = None) -> str:
        return to_json(self._wrap(content, end)) + "\n"

    def _wrap(self, content: Json, end: Json | None) -> Json:
        last = {"done": False} if end is None else {"done": True, **end, "system_fingerprint": self._fingerprint}
        return {"model": self._model, "created_at": timestamp(time.time()), **content, **last}


class OllamaGenerateFormat(OllamaChatFormat):
    """Answers of ``/api/generate``."""

    def _content(self, text: str = "", *, thinking: str = "", calls: Sequence[Json] = ()) -> Json:
        return {"response": text} | ({"thinking": thinking} if thinking else {})


def timestamp(seconds: float) -> str:
    """A Unix time as in RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
