"""Conversations from JSON lines and from generator functions; every problem is reported with its place."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "weight"}
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Located:
    """A checked conversation and its place, as problems quote it (``chats.jsonl:7``)."""

    place: str
    messages: Messages
    tools: Messages | None


def read_text(path: Path, problems: list[str]) -> str:
    """The file's text without a byte order mark; empty and a problem where it is not UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(
            f"{path.name}:{line}: byte {error.start} is not UTF-8; convert the file, for example with iconv"
        )
        return ""


def read_conversations(path: Path, *, problems: list[str]) -> Iterator[Located]:
    """One conversation per line that is not blank; problems are appended to ``problems``."""
    for number, line in enumerate(read_text(path, problems).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(
                f"{place}: invalid JSON at column {error.colno}: {error.msg}; one object with 'messages' a line"
            )
            continue
        if located := _located(place, record, problems):
            yield located


def generated_conversations(generator: str, *, problems: list[str]) -> Iterator[Located]:
    """The conversations that the function ``package.module:function`` returns."""
    module, _, function = generator.partition(":")
    try:
        generate = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        problems.append(f"{generator}: cannot be imported: {error}")
        return
    for number, record in enumerate(generate(), start=1):
        if located := _located(f"{generator}:{number}", record, problems):
            yield located


def _located(place: str, record: object, problems: list[str]) -> Located | None:
    new_problems = [f"{place}: {problem}" for problem in _problems(record)]
    problems += new_problems
    if new_problems or not isinstance(record, Mapping):
        return None
    return Located(place, record["messages"], record.get("tools") or None)


def _problems(record: object) -> Iterator[str]:
    if not isinstance(record, Mapping):
        yield f"an object with 'messages' is needed, this is {type(record).__name__}"
        return
    if unknown := sorted(set(record) - {"messages", "tools"}):
        yield f"unknown key {unknown[0]!r}; an example has 'messages' and perhaps 'tools'"
    if not isinstance(record.get("tools") or [], list):
        yield "tools must be a list of function descriptions"
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        yield "messages must be a list with at least one turn"
        return
    for number, message in enumerate(messages):
        for problem in _message_problems(message):
            yield f"messages[{number}]: {problem}"
    if not any(isinstance(message, Mapping) and message.get("role") == "assistant" for message in messages):
        yield "no assistant turn, so there is nothing to learn"


def _message_problems(message: object) -> Iterator[str]:
    if not isinstance(message, Mapping):
        yield f"a turn is an object with role and content, this is {type(message).__name__}"
        return
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        yield f"unknown role {role!r}; use one of {', '.join(ROLES)}"
    if unknown := sorted(set(message) - MESSAGE_KEYS):
        yield f"unknown key {unknown[0]!r}; a turn has {', '.join(sorted(MESSAGE_KEYS))}"
    if content is not None and not isinstance(content, str):
        yield f"content must be a string, this is {type(content).__name__}"
    elif not (content or "").strip() and not (role == "assistant" and message.get("tool_calls")):
        yield "content is empty"
    if "weight" in message and (role != "assistant" or message["weight"] not in (0, 1)):
        yield "weight is 0 or 1, on assistant turns only"
