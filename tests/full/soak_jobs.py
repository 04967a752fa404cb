"""What the clients of the soak ask, and what of an answer does not depend on when it was asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

CANARY = "canary7c1f9e"
"""In everything that a client can send; no log line, metric or error may have it."""
VOLATILE = frozenset(
    {
        "id",
        "call_id",
        "item_id",
        "created",
        "created_at",
        "completed_at",
        "system_fingerprint",
        "model",
        "usage",
        "role",
    }
    | {"total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "prompt_eval_cached_count"}
)
"""Fields of answers with times, random ids, the model's name or the state of the cache of prefixes."""
MAX_ROUNDING = 0.02
"""Of a log probability, or of a number of an embedding."""
QUESTION = f"Write about a house by the river. {CANARY}"
SEEDED = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
GREEDY = {"temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12, "description": CANARY},
        "kind": {"enum": ["a", "b", CANARY]},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "counts"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "description": CANARY, "parameters": SCHEMA}}
RESPONSES_TOOL = {"type": "function", "name": "look_up", "parameters": SCHEMA}
MESSAGES_TOOL = {"name": "look_up", "input_schema": SCHEMA}


@dataclass(frozen=True)
class Job:
    """A request without its model."""

    name: str
    path: str
    fields: Mapping[str, Any]

    def body(self, model: str) -> bytes:
        return json.dumps({"model": model, **self.fields}).encode()


def _chat(**fields: Any) -> Json:
    return {"messages": [{"role": "user", "content": QUESTION}], **fields}


def _history() -> list[Json]:
    call = {"name": "look_up", "arguments": json.dumps({"name": CANARY})}
    return [
        {"role": "system", "content": f"Be brief. {CANARY}"},
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "call_1", "content": CANARY},
        {"role": "user", "content": "And?"},
    ]


_OF_SCHEMA = {"type": "json_schema", "json_schema": {"name": "of", "schema": SCHEMA}}
_CHAT = {
    "greedy": _chat(**GREEDY, max_tokens=24),
    "seeded": _chat(**SEEDED, max_tokens=40),
    "long": _chat(**GREEDY, max_tokens=200),
    "several": _chat(**SEEDED, max_tokens=16, n=3),
    "logprobs": _chat(**GREEDY, max_tokens=12, logprobs=True, top_logprobs=3),
    "schema": _chat(**GREEDY, max_tokens=150, response_format=_OF_SCHEMA),
    "tool": _chat(**GREEDY, max_tokens=150, tools=[TOOL], tool_choice="required"),
    "history": _chat(**GREEDY, max_tokens=16) | {"messages": _history(), "tools": [TOOL]},
    "unknown field": _chat(**GREEDY, max_tokens=8) | {f"{CANARY}_field": CANARY},
}
_COMPLETIONS = {
    "text": {"prompt": QUESTION, **SEEDED, "max_tokens": 24},
    "echo": {"prompt": QUESTION, **GREEDY, "max_tokens": 8, "echo": True, "logprobs": 2},
    "two prompts": {"prompt": [QUESTION, "Once upon"], **GREEDY, "max_tokens": 12, "n": 2},
}
_RESPONSES = {
    "text": {"input": QUESTION, **GREEDY, "max_output_tokens": 24, "store": False},
    "tool": {
        "input": QUESTION, **GREEDY, "max_output_tokens": 150, "tools": [RESPONSES_TOOL], "tool_choice": "required"
    },
}  # fmt: skip
_MESSAGES = {
    "text": _chat(**GREEDY, max_tokens=24, system=CANARY),
    "tool": _chat(**GREEDY, max_tokens=150, tools=[MESSAGES_TOOL], tool_choice={"type": "any"}),
}
_OLLAMA = {"text": _chat(options={**GREEDY, "num_predict": 24})}
_OLLAMA_GENERATE = {"text": {"prompt": QUESTION, "options": {**SEEDED, "num_predict": 24}}}
_STREAMED = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _COMPLETIONS,
    "/v1/responses": _RESPONSES,
    "/v1/messages": _MESSAGES,
    "/api/chat": _OLLAMA,
    "/api/generate": _OLLAMA_GENERATE,
}
_WHOLE = {
    "/v1/embeddings": {"texts": {"input": [QUESTION, "a river"]}},
    "/tokenize": {"text": {"prompt": QUESTION}, "chat": _chat()},
    "/api/embed": {"texts": {"input": [QUESTION]}},
}
JOBS = tuple(
    Job(f"{path} {name}{' streamed' if stream else ''}", path, {**fields, "stream": stream})
    for path, bodies in _STREAMED.items()
    for name, fields in bodies.items()
    for stream in (False, True)
) + tuple(Job(f"{path} {name}", path, fields) for path, bodies in _WHOLE.items() for name, fields in bodies.items())

MALFORMED: Mapping[str, tuple[str, bytes, tuple[int, ...]]] = {
    "no JSON": ("/v1/chat/completions", f'{{"model": "{CANARY}'.encode(), (400,)),
    "no object": ("/v1/responses", f'["{CANARY}"]'.encode(), (400,)),
    "no UTF-8": ("/v1/completions", b'{"prompt": "\xff' + CANARY.encode() + b'"}', (400,)),
    "nested": ("/v1/chat/completions", b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", (400,)),
    "wrong type": (
        "/v1/chat/completions",
        json.dumps({"model": "micro", "messages": [{"role": "user", "content": {CANARY: 1}}]}).encode(),
        (400,),
    ),
    "wrong role": (
        "/v1/messages",
        json.dumps({"model": "micro", "max_tokens": 1, "messages": [{"role": CANARY, "content": CANARY}]}).encode(),
        (400,),
    ),
    "wrong schema": (
        "/v1/chat/completions",
        json.dumps(
            {
                "model": "micro",
                **_chat(
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": "of", "schema": {"type": CANARY, "format": CANARY, "title": CANARY}},
                    }
                ),
            }
        ).encode(),
        (400,),
    ),
    "no regular expression": (
        "/v1/completions",
        json.dumps({"model": "micro", "prompt": "a", "structured_outputs": {"regex": f"({CANARY}"}}).encode(),
        (400,),
    ),
    "too long": (
        "/v1/completions", json.dumps({"model": "micro", "prompt": f"{CANARY} " * 40_000}).encode(), (400, 413)
    ),
    "wrong arguments": (
        "/v1/chat/completions",
        json.dumps(
            {
                "model": "micro",
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": CANARY}]}
                ],
            }
        ).encode(),
        (400,),
    ),
    "embeddings": ("/v1/embeddings", json.dumps({"model": "micro", "input": {CANARY: 1}}).encode(), (400,)),
    "ollama": ("/api/chat", json.dumps({"model": "micro", "messages": CANARY}).encode(), (400,)),
}  # fmt: skip
"""Bodies that are refused, and how. Errors tell places in a schema by names of properties: they have no canary."""


def essence(content_type: str, content: bytes) -> Any:
    """What must be equal: of a stream its texts and calls, joined, and its ends."""
    if content_type.startswith("text/event-stream"):
        lines = (line.removeprefix("data: ") for line in content.decode().splitlines() if line.startswith("data: "))
        return _joined(json.loads(line) for line in lines if line != "[DONE]")
    if content_type.startswith("application/x-ndjson"):
        return _joined(json.loads(line) for line in content.decode().splitlines())
    return _stable(json.loads(content))


def is_same(first: Any, second: Any) -> bool:
    """Whether answers are equal, but for the last digits of floats, which depend on the rest of the batch."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(is_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(is_same(*pair) for pair in zip(first, second, strict=True))
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) < MAX_ROUNDING
    return bool(first == second)


def is_complete(content_type: str, content: bytes) -> bool:
    """Whether a stream came to its end, without an error."""
    text = content.decode()
    if content_type.startswith("text/event-stream"):
        ends = ("data: [DONE]", '"type":"message_stop"', '"type":"response.completed"', '"type":"response.incomplete"')
        return any(end in text for end in ends) and '"error":{' not in text
    return not content_type.startswith("application/x-ndjson") or '"done":true' in text


def _joined(events: Iterable[Json]) -> Json:
    """The strings of each place of the events, joined; numbers and objects of a place in their order."""
    places: dict[str, list[Any]] = {}
    for event in events:
        kind = event.get("type", "")
        if kind in ("response.created", "response.in_progress", "ping"):
            continue
        number = {choice["index"]: choice for choice in event.get("choices", ())}
        for index, choice in number.items():
            _collect(f"choice {index}", choice, places)
        if "choices" not in event:
            _collect(kind, event, places)
    return {place: _merged(values) for place, values in places.items()}


def _collect(place: str, value: Any, places: dict[str, list[Any]]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in VOLATILE and key != "sequence_number":
                _collect(f"{place}.{key}", item, places)
    elif isinstance(value, list):
        for item in value:
            _collect(place, item, places)
    elif value is not None:
        places.setdefault(place, []).append(value)


def _merged(values: list[Any]) -> Any:
    """Strings are deltas, which the server cuts as it likes; numbers that repeat are labels of the deltas."""
    if all(isinstance(value, str) for value in values):
        return "".join(values)
    if all(isinstance(value, bool | int) for value in values):
        return sorted(set(values))
    return values


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value
