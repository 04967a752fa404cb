"""JSON, server-sent events (HTML standard, section 9.2), and the fields that OpenAI's responses share."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from server.adapters.adapter_cache import Lease

Json = dict[str, Any]

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Envelope:
    """The fields that all chunks of one answer share."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, id_prefix: str, *, model: str, fingerprint: str) -> Envelope:
        """An envelope with a new id and the current time."""
        return cls(id_prefix + uuid.uuid4().hex, int(time.time()), model, fingerprint)

    def wrap(self, object: str, choices: list[Json], **more: Any) -> Json:
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


def fingerprint(computation: str, lease: Lease | None, version: str) -> str:
    """Changes when the base, its computation, an adapter's version or the server does.

    The answer to the same seed may then change as well.
    """
    adapters = () if lease is None else lease.adapters
    parts = [version, computation, *(f"{leased.adapter.version_digest}:{leased.scale}" for leased in adapters)]
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def sse(payload: Json, *, event: str | None = None) -> str:
    """A server-sent event, with a name where the API has names."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {to_json(payload)}\n\n"


def to_json(payload: Json | list[Any]) -> str:
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
