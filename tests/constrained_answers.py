"""Answers to random schemas by a real server: asked for at the same time, and validated by ``jsonschema``."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
from openai import OpenAI

from tests.random_schemas import longest_document, random_schema

NUM_CONNECTIONS = 8


def answer_to(client: OpenAI, model: str, seed: int) -> tuple[dict[str, Any], str]:
    """The random schema of a seed, and an answer by it, greedy or at temperature 1, that had room to end."""
    schema = random_schema(random.Random(seed))
    completions: Any = client.chat.completions
    answer = completions.create(
        model=model,
        messages=[{"role": "user", "content": "Fill the form for Ada, who lives in London."}],
        response_format={"type": "json_schema", "json_schema": {"name": "form", "schema": schema, "strict": True}},
        temperature=seed % 2,
        seed=seed,
        max_tokens=min(longest_document(schema) + 1, 1500),
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop", f"seed {seed}: {choice.message.content}"
    return schema, choice.message.content


def check_answers(client: OpenAI, model: str, seeds: Iterable[int]) -> None:
    """Every answer ends by ``stop`` and is valid."""
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        for schema, content in pool.map(lambda seed: answer_to(client, model, seed), seeds):
            jsonschema.validate(json.loads(content), schema)
