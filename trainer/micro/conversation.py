"""The shape of a written conversation, as the chat template takes it."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Message(TypedDict):
    """One turn. ``content`` may be absent only beside ``tool_calls``."""

    role: str
    content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]


class Conversation(TypedDict):
    """Turns in order, ending with an assistant's; ``tools`` are function descriptions as OpenAI's API has them."""

    messages: list[Message]
    tools: NotRequired[list[dict[str, Any]]]


def turns(*contents: str, system: str | None = None) -> Conversation:
    """A conversation of alternating user and assistant turns, an optional system turn before them."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for number, content in enumerate(contents):
        messages.append({"role": "user" if number % 2 == 0 else "assistant", "content": content})
    return {"messages": messages}
