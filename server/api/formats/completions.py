"""``/v1/completions``, whose chunks look like its whole answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from server.api.active_request import ActiveRequest, ChoiceDelta, Usage
from server.api.errors import Reply
from server.api.formats.interface import Tokens, WholeAnswer
from server.api.formats.token_ids import ChunkTokenIds, prompt_record, record_of
from server.api.formats.wire import DONE, PING, Envelope, Json, sse
from server.api.logprobs import completion_logprobs, prompt_logprobs
from server.sequence import FinishReason, SampledToken
from server.text.answer import Content
from server.text.detokenizer import TokenStart


@dataclass
class _End:
    """The end of a choice's text so far, without its prompt."""

    num_characters: int = 0
    num_tokens: int = 0

    def advance(self, part: Content) -> None:
        self.num_characters += len(part.text)
        self.num_tokens += len(part.tokens)


class CompletionFormat:
    """Text completions; with log probabilities where the request asks for them.

    With ``echo`` the text of each choice begins with its prompt, and its log probabilities are of all tokens of prompt
    and answer, also of those behind the text, such as the end token: what reads scores counts tokens. Of ``best_of``
    candidates those with the highest mean log probability are returned.
    """

    media_type = "text/event-stream"
    ping = PING

    def __init__(self, request: ActiveRequest, fingerprint: str) -> None:
        self._request, self._body = request, request.body
        self._envelope = Envelope.new("cmpl-", model=request.body.model, fingerprint=fingerprint)
        self._token_texts = None if request.body.num_logprobs is None else request.token_texts
        self._token_ids = ChunkTokenIds(request) if request.body.return_token_ids else None
        self._to_echo = set(range(len(request.choices))) if request.prompt_texts else set()
        self._ends = [_End() for _ in request.choices]

    def opening(self) -> Iterable[str]:
        """Nothing: the first chunk has text."""
        return ()

    def events(self, delta: ChoiceDelta) -> Iterator[str]:
        tokens: Tokens = ()
        if delta.index in self._to_echo and (delta.parts or delta.finish_reason is not None):
            self._to_echo.discard(delta.index)
            yield self._event(self._chunk(delta.index, *self._echo(delta.index)))
        for part in delta.parts:
            assert isinstance(part, Content), "a completion is all content"
            if part.text:
                yield self._event(self._chunk(delta.index, part.text, part.tokens))
            else:
                tokens = part.tokens
            self._ends[delta.index].advance(part)
        if delta.finish_reason is not None:
            tokens = (*tokens, *self._behind_text(delta.index, self._ends[delta.index]))
            yield self._event(self._chunk(delta.index, "", tokens, delta.finish_reason))

    def empty_delta(self, index: int) -> str:
        return self._event(self._chunk(index, "", ()))

    def closing(self, usage: Usage) -> Iterator[str]:
        if self._body.include_usage:
            yield sse(self._envelope.wrap("text_completion", [], usage=usage.as_json()))
        yield DONE

    def error(self, reply: Reply) -> Iterable[str]:
        return [sse(reply.body), DONE]

    def logprobs(self, tokens: Tokens) -> Json | None:
        return None if self._token_texts is None else completion_logprobs(tokens, self._token_texts)

    def body(self, answers: Sequence[WholeAnswer], usage: Usage) -> Json:
        choices = [self._whole(number, answer) for number, answer in enumerate(self._best(answers))]
        return self._envelope.wrap("text_completion", choices, usage=usage.as_json())

    def _best(self, answers: Sequence[WholeAnswer]) -> Iterator[WholeAnswer]:
        """The ``n`` likeliest answers to each prompt, per token; all in their order if there are no more."""
        number = self._body.num_candidates
        for first in range(0, len(answers), number):
            candidates = list(answers[first : first + number])
            if number > self._body.n:
                candidates.sort(key=lambda answer: -record_of(self._request, answer.index).mean_logprob)
            yield from candidates[: self._body.n]

    def _whole(self, number: int, answer: WholeAnswer) -> Json:
        """Choice ``number`` of the response."""
        text, logprobs = answer.content, answer.logprobs
        if self._to_echo:
            echoed, tokens = self._echo(answer.index)
            end = _End(len(text), 0 if logprobs is None else len(logprobs["tokens"]))
            behind = self.logprobs(self._behind_text(answer.index, end))
            text, logprobs = echoed + text, _joined(self.logprobs(tokens), logprobs, behind)
        return {**_choice(number, text, logprobs, answer.finish_reason), **self._more(answer.index)}

    def _more(self, index: int) -> Json:
        """vLLM's fields of a whole choice, where they are asked for."""
        more: Json = {}
        if self._body.prompt_logprobs is not None and self._request.token_texts is not None:
            tokens = prompt_record(self._request, index).prompt
            more["prompt_logprobs"] = prompt_logprobs(tokens, self._body.prompt_logprobs, self._request.token_texts)
        if self._token_ids is not None:
            more["prompt_token_ids"] = self._token_ids.prompt(index)
            more["token_ids"] = record_of(self._request, index).ids
        return more

    def _echo(self, index: int) -> tuple[str, Tokens]:
        """The text and the tokens of a choice's prompt; the first token has no log probability."""
        place = index // self._body.num_candidates
        text, starts = self._request.prompt_texts[place]
        if self._token_texts is None:
            return text, ()
        count = self._body.num_logprobs or 0
        scored = prompt_record(self._request, index).prompt
        tokens = [SampledToken(self._request.prompt_ids[place][0]), *scored]
        shown = [token._replace(top_logprobs=token.top_logprobs[:count]) for token in tokens]
        return text, tuple(map(TokenStart, shown, starts))

    def _behind_text(self, index: int, end: _End) -> Tokens:
        """With ``echo``, the tokens of an answer that are not in its text, which ends there."""
        if not self._request.prompt_texts or self._token_texts is None:
            return ()
        start = len(self._request.prompt_texts[index // self._body.num_candidates].text) + end.num_characters
        return tuple(TokenStart(token, start) for token in record_of(self._request, index).answer[end.num_tokens :])

    def _chunk(self, index: int, text: str, tokens: Tokens, reason: FinishReason | None = None) -> Json:
        choice = _choice(index, text, self.logprobs(tokens) if tokens else None, reason)
        return choice if self._token_ids is None else {**choice, **self._token_ids.of_completion_chunk(index)}

    def _event(self, choice: Json) -> str:
        fields: Json = {}
        if self._body.include_usage:
            fields["usage"] = self._request.usage.as_json() if self._body.continuous_usage else None
        return sse(self._envelope.wrap("text_completion", [choice], **fields))


def _joined(*parts: Json | None) -> Json | None:
    """The log probabilities of a prompt, of the answer behind it, and of the tokens behind that; None without any."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return {name: [item for part in known for item in part[name]] for name in known[0]}


def _choice(index: int, text: str, logprobs: Json | None, reason: FinishReason | None) -> Json:
    finish_reason = None if reason is None else reason.value
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
