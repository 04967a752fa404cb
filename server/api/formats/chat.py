"""``/v1/chat/completions``: chunks of a stream in the order that OpenAI's clients rely on, and whole answers.

The order: an opening chunk with the role for each choice; deltas; a final chunk for each choice; with
``include_usage`` one chunk of usage; ``[DONE]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from server.api.active_request import ActiveRequest, ChoiceDelta, Usage
from server.api.errors import Reply
from server.api.formats.interface import Tokens, WholeAnswer, WholeToolCall
from server.api.formats.token_ids import ChunkTokenIds, prompt_record, record_of
from server.api.formats.wire import DONE, PING, Envelope, Json, sse
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.sequence import FinishReason
from server.text.answer import AnswerPart, Content, Reasoning, ToolCallPart


class ChatFormat:
    """Chat completions; with log probabilities where the request asks for them."""

    media_type = "text/event-stream"
    ping = PING

    def __init__(self, request: ActiveRequest, fingerprint: str) -> None:
        body = request.body
        self._envelope = Envelope.new("chatcmpl-", model=body.model, fingerprint=fingerprint)
        self._num_choices = len(request.choices)
        self._request, self._body = request, body
        self._token_texts = None if body.num_logprobs is None else request.token_texts
        self._token_ids = ChunkTokenIds(request) if body.return_token_ids else None

    def opening(self) -> Iterator[str]:
        for index in range(self._num_choices):
            prompt = {} if self._token_ids is None or index else {"prompt_token_ids": self._token_ids.prompt(index)}
            yield self._event(_choice(index, {"role": "assistant", "content": ""}), **prompt)

    def events(self, delta: ChoiceDelta) -> Iterator[str]:
        tokens: Tokens = ()
        for part in delta.parts:
            if isinstance(part, Content) and not part.text:
                tokens = part.tokens  # tokens without text, which come at the end
                continue
            logprobs = self.logprobs(part.tokens) if isinstance(part, Content) and part.tokens else None
            yield self._event(_choice(delta.index, _delta(part), logprobs))
        if delta.finish_reason is not None:
            logprobs = self.logprobs(tokens) if tokens else None
            yield self._event(_choice(delta.index, {}, logprobs, delta.finish_reason))

    def empty_delta(self, index: int) -> str:
        return self._event(_choice(index, {}))

    def closing(self, usage: Usage) -> Iterator[str]:
        if self._body.include_usage:
            yield sse(self._envelope.wrap("chat.completion.chunk", [], usage=usage.as_json()))
        yield DONE

    def error(self, reply: Reply) -> Iterable[str]:
        return [sse(reply.body), DONE]

    def logprobs(self, tokens: Tokens) -> Json | None:
        return None if self._token_texts is None else chat_logprobs(tokens, self._token_texts)

    def body(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        choices = [
            {
                "index": answer.index,
                "message": _message(answer),
                "logprobs": answer.logprobs,
                "finish_reason": _value(answer.finish_reason),
                **({} if self._token_ids is None else {"token_ids": record_of(self._request, answer.index).ids}),
            }
            for answer in answers
        ]
        return self._envelope.wrap("chat.completion", choices, usage=usage.as_json(), **self._of_prompt())

    def _of_prompt(self) -> Json:
        """vLLM's fields of the prompt, where they are asked for."""
        fields: Json = {}
        if self._body.prompt_logprobs is not None and self._request.token_texts is not None:
            tokens = prompt_record(self._request, 0).prompt
            fields["prompt_logprobs"] = prompt_logprobs(tokens, self._body.prompt_logprobs, self._request.token_texts)
        if self._token_ids is not None:
            fields["prompt_token_ids"] = self._token_ids.prompt(0)
        return fields

    def _event(self, choice: Json, **fields: Any) -> str:
        if self._body.include_usage:
            fields["usage"] = self._request.usage.as_json() if self._body.continuous_usage else None
        if self._token_ids is not None:
            choice |= self._token_ids.of_chunk(choice["index"])
        return sse(self._envelope.wrap("chat.completion.chunk", [choice], **fields))


def _choice(index: int, delta: Json, logprobs: Json | None = None, reason: FinishReason | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": _value(reason)}


def _delta(part: AnswerPart) -> Json:
    if isinstance(part, Content):
        return {"content": part.text}
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text, "reasoning": part.text}
    return {"tool_calls": [_call_delta(part)]}


def _call_delta(part: ToolCallPart) -> Json:
    """The first delta of a call names it; clients concatenate every string but ``type`` of later ones."""
    if part.id is None:
        return {"index": part.number, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.number, "id": part.id, "type": "function", "function": function}


def _message(answer: WholeAnswer) -> Json:
    message: Json = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = message["reasoning"] = answer.reasoning
    if answer.tool_calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [_call(call) for call in answer.tool_calls]
    return message


def _call(call: WholeToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _value(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
