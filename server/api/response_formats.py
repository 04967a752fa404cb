"""OpenAI's forms of an answer, chat and completion, streamed and whole: choices of each kind, and the envelope."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from server.adapters.adapter_cache import Lease
from server.api.active_request import TextDelta
from server.api.logprobs import chat_logprobs, completion_logprobs
from server.sequence import FinishReason
from server.text.detokenizer import TokenStart
from server.text.token_texts import TokenTexts

Json = dict[str, Any]
Tokens = tuple[TokenStart, ...]


class ResponseFormat(Protocol):
    """How one endpoint writes its choices."""

    id_prefix: str
    object: str
    chunk_object: str

    def first_chunk(self, index: int) -> Json | None:
        """The choice with which a stream opens, if there is one."""

    def chunk(self, delta: TextDelta) -> Json:
        """More text of a stream's choice."""

    def last_chunk(self, end: TextDelta) -> Json:
        """The end of a stream's choice, without text."""

    def message(self, answer: TextDelta) -> Json:
        """A choice that is not streamed: all of its text."""


class ChatFormat:
    """``/v1/chat/completions``; with log probabilities where there are ``token_texts``."""

    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, token_texts: TokenTexts | None = None) -> None:
        self._token_texts = token_texts

    def first_chunk(self, index: int) -> Json | None:
        """The role, which clients want first."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, delta: TextDelta) -> Json:
        return self._chunk(delta.index, {"content": delta.text}, delta.tokens)

    def last_chunk(self, end: TextDelta) -> Json:
        return self._chunk(end.index, {}, end.tokens, end.finish_reason)

    def message(self, answer: TextDelta) -> Json:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": _value(answer.finish_reason),
        }

    def _chunk(self, index: int, delta: Json, tokens: Tokens = (), reason: FinishReason | None = None) -> Json:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": _value(reason)}

    def _logprobs(self, tokens: Tokens) -> Json | None:
        return None if self._token_texts is None else chat_logprobs(tokens, self._token_texts)


class CompletionFormat:
    """``/v1/completions``, whose chunks look like its whole answers."""

    id_prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, token_texts: TokenTexts | None = None) -> None:
        self._token_texts = token_texts

    def first_chunk(self, index: int) -> Json | None:
        """Nothing: the first chunk has text."""
        return None

    def chunk(self, delta: TextDelta) -> Json:
        return self._choice(delta, self._logprobs(delta.tokens) if delta.tokens else None)

    def last_chunk(self, end: TextDelta) -> Json:
        return self._choice(end, self._logprobs(end.tokens) if end.tokens else None, end.finish_reason)

    def message(self, answer: TextDelta) -> Json:
        return self._choice(answer, self._logprobs(answer.tokens), answer.finish_reason)

    def _choice(self, delta: TextDelta, logprobs: Json | None, reason: FinishReason | None = None) -> Json:
        return {"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": _value(reason)}

    def _logprobs(self, tokens: Tokens) -> Json | None:
        return None if self._token_texts is None else completion_logprobs(tokens, self._token_texts)


@dataclass(frozen=True)
class Envelope:
    """What all chunks of one answer share."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, format: ResponseFormat, *, model: str, fingerprint: str) -> Envelope:
        """An envelope with an id of its own, made now."""
        return cls(format.id_prefix + uuid.uuid4().hex, int(time.time()), model, fingerprint)

    def wrap(self, object: str, choices: list[Json], **more: Json | None) -> Json:
        """The envelope with its content."""
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
            **more,
        }


def fingerprint(base_name: str, lease: Lease | None, version: str) -> str:
    """Changes when the base, an adapter's version or the server does, and so the answer to the same seed may."""
    adapters = () if lease is None else lease.adapters
    parts = [version, base_name, *(f"{leased.adapter.version_digest}:{leased.scale}" for leased in adapters)]
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def to_json(payload: Json) -> str:
    """Compact JSON, in ASCII: some readers take Unicode's separators for the end of a line. NaN is an error."""
    return json.dumps(payload, allow_nan=False, separators=(",", ":"))


def _value(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
