"""OpenAI's response formats, chat and completion, streamed and whole: the choices, and the envelope around them."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator
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

    def message(self, answer: TextDelta, logprobs: Json | None) -> Json:
        """A choice that is not streamed: all of its text, and what ``logprobs`` returned for its tokens."""

    def logprobs(self, tokens: Tokens) -> Json | None:
        """Log probabilities of tokens; None where they are not asked for."""


class ChatFormat:
    """``/v1/chat/completions``; with log probabilities where there are ``token_texts``."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, token_texts: TokenTexts | None = None) -> None:
        self._token_texts = token_texts

    def first_chunk(self, index: int) -> Json | None:
        """The role, which clients want first."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, delta: TextDelta) -> Json:
        return self._chunk(delta.index, {"content": delta.text}, delta.tokens)

    def last_chunk(self, end: TextDelta) -> Json:
        return self._chunk(end.index, {}, end.tokens, end.finish_reason)

    def message(self, answer: TextDelta, logprobs: Json | None) -> Json:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": _value(answer.finish_reason),
        }

    def _chunk(self, index: int, delta: Json, tokens: Tokens = (), reason: FinishReason | None = None) -> Json:
        logprobs = self.logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": _value(reason)}

    def logprobs(self, tokens: Tokens) -> Json | None:
        return None if self._token_texts is None else chat_logprobs(tokens, self._token_texts)


class CompletionFormat:
    """``/v1/completions``, whose chunks look like its whole answers."""

    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, token_texts: TokenTexts | None = None) -> None:
        self._token_texts = token_texts

    def first_chunk(self, index: int) -> Json | None:
        """Nothing: the first chunk has text."""
        return None

    def chunk(self, delta: TextDelta) -> Json:
        return self._choice(delta, self.logprobs(delta.tokens) if delta.tokens else None)

    def last_chunk(self, end: TextDelta) -> Json:
        return self._choice(end, self.logprobs(end.tokens) if end.tokens else None, end.finish_reason)

    def message(self, answer: TextDelta, logprobs: Json | None) -> Json:
        return self._choice(answer, logprobs, answer.finish_reason)

    def _choice(self, delta: TextDelta, logprobs: Json | None, reason: FinishReason | None = None) -> Json:
        return {"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": _value(reason)}

    def logprobs(self, tokens: Tokens) -> Json | None:
        return None if self._token_texts is None else completion_logprobs(tokens, self._token_texts)


@dataclass(frozen=True)
class Envelope:
    """The fields that all chunks of one answer share."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, format: ResponseFormat, *, model: str, fingerprint: str) -> Envelope:
        """An envelope with a new id and the current time."""
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
    """Compact JSON in ASCII: some readers of streams take Unicode's separators for the end of a line."""
    return json.dumps(payload, allow_nan=False, separators=(",", ":"))


def extend_logprobs(logprobs: Json | None, more: Json | None) -> None:
    """Append the lists of ``more``, each item as JSON, to those of ``logprobs``, for ``to_json_with_encoded_parts``.

    Encoded at once, because a long answer's dictionaries would make every garbage collection slow.
    """
    if logprobs is None or more is None:
        return
    for name, items in more.items():
        if isinstance(items, list):
            logprobs[name].extend(_encode(item).encode() for item in items)


def to_json_with_encoded_parts(payload: Json) -> bytes:
    """UTF-8 of a payload in which ``bytes`` are JSON already; takes time, so call it in a worker thread."""
    return b"".join(_json_pieces(payload))


def _json_pieces(value: object) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        for place, (key, item) in enumerate(value.items()):
            yield f"{',' if place else '{'}{_encode(key)}:".encode()
            yield from _json_pieces(item)
        yield b"}" if value else b"{}"
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield b"," if place else b"["
            yield from _json_pieces(item)
        yield b"]" if value else b"[]"
    else:
        yield _encode(value).encode()


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _value(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
