"""OpenAI's forms of an answer, chat and completion, streamed and whole: choices of each kind, and the envelope."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from server.adapters.leases import Lease
from server.api.active_request import TextDelta
from server.sequence import FinishReason

Json = dict[str, Any]


class ResponseFormat(Protocol):
    """How one endpoint writes its choices."""

    id_prefix: str
    object: str
    chunk_object: str

    def first_chunk(self, index: int) -> Json | None:
        """The choice with which a stream opens, if there is one."""

    def chunk(self, delta: TextDelta) -> Json:
        """More text of a stream's choice."""

    def last_chunk(self, index: int, reason: FinishReason) -> Json:
        """The end of a stream's choice."""

    def message(self, answer: TextDelta) -> Json:
        """A choice that is not streamed: all of its text."""


class ChatFormat:
    """``/v1/chat/completions``."""

    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first_chunk(self, index: int) -> Json | None:
        """The role, which clients want first."""
        return _chunk_choice(index, {"role": "assistant", "content": ""})

    def chunk(self, delta: TextDelta) -> Json:
        return _chunk_choice(delta.index, {"content": delta.text})

    def last_chunk(self, index: int, reason: FinishReason) -> Json:
        return _chunk_choice(index, {}, reason)

    def message(self, answer: TextDelta) -> Json:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            "index": answer.index,
            "message": message,
            "logprobs": None,
            "finish_reason": _value(answer.finish_reason),
        }


class CompletionFormat:
    """``/v1/completions``, whose chunks look like its whole answers."""

    id_prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def first_chunk(self, index: int) -> Json | None:
        """Nothing: the first chunk has text."""
        return None

    def chunk(self, delta: TextDelta) -> Json:
        return _text_choice(delta.index, delta.text, None)

    def last_chunk(self, index: int, reason: FinishReason) -> Json:
        return _text_choice(index, "", reason)

    def message(self, answer: TextDelta) -> Json:
        return _text_choice(answer.index, answer.text, answer.finish_reason)


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
    held = () if lease is None else lease.adapters
    parts = [version, base_name, *(f"{one.adapter.version_digest}:{one.scale}" for one in held)]
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def to_json(payload: Json) -> str:
    """Compact JSON, in ASCII: some readers take Unicode's separators for the end of a line. NaN is an error."""
    return json.dumps(payload, allow_nan=False, separators=(",", ":"))


def _chunk_choice(index: int, delta: Json, reason: FinishReason | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": _value(reason)}


def _text_choice(index: int, text: str, reason: FinishReason | None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": _value(reason)}


def _value(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
