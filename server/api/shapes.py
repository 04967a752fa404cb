"""The two forms of an answer, chat and completion, in OpenAI's words: choices of each kind, and the envelope."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from server.adapters.leases import Lease
from server.sequence import FinishReason

Json = dict[str, Any]


class Shape(Protocol):
    """How one endpoint writes its choices."""

    id_prefix: str
    object: str
    chunk_object: str

    def opening(self, index: int) -> Json | None:
        """The choice with which a stream opens, if there is one."""

    def delta(self, index: int, text: str) -> Json:
        """More text of a stream's choice."""

    def final(self, index: int, reason: FinishReason) -> Json:
        """The end of a stream's choice."""

    def whole(self, index: int, text: str, reason: FinishReason) -> Json:
        """A choice that is not streamed."""


class ChatShape:
    """``/v1/chat/completions``."""

    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        """The role, which clients want first."""
        return _chunk_choice(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, text: str) -> Json:
        """More content."""
        return _chunk_choice(index, {"content": text})

    def final(self, index: int, reason: FinishReason) -> Json:
        """An empty delta with the reason."""
        return _chunk_choice(index, {}, reason.value)

    def whole(self, index: int, text: str, reason: FinishReason) -> Json:
        """The message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason.value}


class CompletionShape:
    """``/v1/completions``, whose chunks look like its whole answers."""

    id_prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def opening(self, index: int) -> Json | None:
        """Nothing: the first chunk has text."""
        return None

    def delta(self, index: int, text: str) -> Json:
        """More text."""
        return _text_choice(index, text, None)

    def final(self, index: int, reason: FinishReason) -> Json:
        """No text, and the reason."""
        return _text_choice(index, "", reason.value)

    def whole(self, index: int, text: str, reason: FinishReason) -> Json:
        """All of the text."""
        return _text_choice(index, text, reason.value)


@dataclass(frozen=True)
class Envelope:
    """What all chunks of one answer share."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, shape: Shape, *, model: str, fingerprint: str) -> Envelope:
        """An envelope with an id of its own, made now."""
        return cls(shape.id_prefix + uuid.uuid4().hex, int(time.time()), model, fingerprint)

    def around(self, object: str, choices: list[Json], **more: Json | None) -> Json:
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


def _chunk_choice(index: int, delta: Json, reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _text_choice(index: int, text: str, reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
