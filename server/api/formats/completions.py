"""``/v1/completions``, whose chunks look like its whole answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from server.api.active_request import ActiveRequest, ChoiceDelta, Usage
from server.api.errors import Reply
from server.api.formats.interface import Tokens, WholeAnswer
from server.api.formats.wire import DONE, PING, Envelope, Json, sse
from server.api.logprobs import completion_logprobs
from server.sequence import FinishReason
from server.text.answer import Content


class CompletionFormat:
    """Text completions; with log probabilities where the request asks for them."""

    media_type = "text/event-stream"
    ping = PING

    def __init__(self, request: ActiveRequest, fingerprint: str) -> None:
        self._envelope = Envelope.new("cmpl-", model=request.body.model, fingerprint=fingerprint)
        self._include_usage = request.body.include_usage
        self._token_texts = request.token_texts

    def opening(self) -> Iterable[str]:
        """Nothing: the first chunk has text."""
        return ()

    def events(self, delta: ChoiceDelta) -> Iterator[str]:
        tokens: Tokens = ()
        for part in delta.parts:
            assert isinstance(part, Content), "a completion is all content"
            if part.text:
                yield self._event(self._choice(delta.index, part.text, part.tokens))
            else:
                tokens = part.tokens
        if delta.finish_reason is not None:
            yield self._event(self._choice(delta.index, "", tokens, delta.finish_reason))

    def closing(self, usage: Usage) -> Iterator[str]:
        if self._include_usage:
            yield sse(self._envelope.wrap("text_completion", [], usage=usage.as_json()))
        yield DONE

    def error(self, reply: Reply) -> Iterable[str]:
        return [sse(reply.body)]

    def logprobs(self, tokens: Tokens) -> Json | None:
        return None if self._token_texts is None else completion_logprobs(tokens, self._token_texts)

    def body(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        choices = [_choice(answer.index, answer.content, answer.logprobs, answer.finish_reason) for answer in answers]
        return self._envelope.wrap("text_completion", choices, usage=usage.as_json())

    def _choice(self, index: int, text: str, tokens: Tokens, reason: FinishReason | None = None) -> Json:
        return _choice(index, text, self.logprobs(tokens) if tokens else None, reason)

    def _event(self, choice: Json) -> str:
        usage: dict[str, Json | None] = {"usage": None} if self._include_usage else {}
        return sse(self._envelope.wrap("text_completion", [choice], **usage))


def _choice(index: int, text: str, logprobs: Json | None, reason: FinishReason | None) -> Json:
    finish_reason = None if reason is None else reason.value
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
