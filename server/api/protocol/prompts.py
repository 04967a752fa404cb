"""Texts or token ids: the prompts of completions and the inputs of embeddings."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError

from server.api.protocol.model import well_formed

Prompt = str | list[int]


def parse_prompts(value: object) -> list[Prompt]:
    """``str``, ``[str]``, ``[int]`` or ``[[int]]`` as a list of prompts."""
    if isinstance(value, str):
        return [well_formed(value)]
    if isinstance(value, list):
        if not value:
            raise PydanticCustomError("too_short", "it should have at least one item")
        if all(isinstance(item, str) for item in value):
            return [well_formed(item) for item in value]
        if _are_ids(value):
            return [value]
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return value
    raise PydanticCustomError(
        "prompt_type", "it should be a string, an array of strings, an array of token ids, or an array of such arrays"
    )


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in items)
