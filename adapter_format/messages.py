"""Conversations as chat templates expect them, and the tokens that end a turn: the same in training and serving."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

Message = Mapping[str, Any]


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> Sequence[Message]:
    """``messages`` behind ``system_prompt``, unless they have a system turn of their own."""
    if system_prompt is None or any(message["role"] in ("system", "developer") for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def plain_messages(messages: Sequence[Message], chat_template: object) -> list[dict[str, Any]]:
    """Messages as templates expect them: a known role, content as one string, tool arguments as objects.

    ``chat_template`` is a tokenizer's, one text or several named ones: where none names ``developer``, it is a system
    turn.
    """
    knows_developer = "developer" in str(chat_template)
    return [_plain_message(message, knows_developer=knows_developer) for message in messages]


def _plain_message(message: Message, *, knows_developer: bool) -> dict[str, Any]:
    plain = dict(message)
    if plain["role"] == "developer" and not knows_developer:
        plain["role"] = "system"
    if isinstance(content := plain.get("content"), list):
        plain["content"] = "\n".join(part["text"] for part in content)
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return plain


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object; OpenAI's clients send a string of JSON."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        with suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a turn: those of a transformers model's generation config, or else of its config, and the
    tokenizer's."""
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None) or model.config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(number for number in (*listed, tokenizer.eos_token_id) if number is not None)
