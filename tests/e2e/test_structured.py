"""Structured output of the embedded base, by OpenAI's client; ``tests/full`` asks for 200 schemas."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.constrained_answers import check_answers

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


def ask(client: OpenAI, model: str = "micro", **more: Any) -> Any:
    completions: Any = client.chat.completions
    messages = [{"role": "user", "content": "Who is Ada?"}]
    return completions.create(**{"model": model, "messages": messages, "temperature": 0, "max_tokens": 100, **more})


def test_documents_of_random_schemas_are_valid(client: OpenAI) -> None:
    check_answers(client, "micro", range(10))


@pytest.mark.parametrize("model", ["micro", "shakespeare"])
def test_a_document_streams_as_it_is_whole_and_has_log_probabilities(client: OpenAI, model: str) -> None:
    """A base and an adapter that never saw JSON; neither streaming nor log probabilities change the text."""
    whole = ask(client, model, response_format=FORMAT).choices[0].message.content
    assert set(json.loads(whole)) == {"name", "age"}
    chunks = list(ask(client, model, response_format=FORMAT, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    scored = ask(client, model, response_format=FORMAT, logprobs=True, top_logprobs=1).choices[0]
    assert scored.message.content == whole
    assert "".join(token.token for token in scored.logprobs.content) == whole


def test_constrained_and_free_answers_of_a_batch_are_those_of_each_alone(client: OpenAI) -> None:
    asks: list[dict[str, Any]] = [
        {},
        {"response_format": FORMAT},
        {"model": "helpdesk"},
        {"extra_body": {"guided_choice": ["x", "y"]}},
    ]
    alone = [ask(client, **asked).choices[0].message.content for asked in asks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda asked: ask(client, **asked).choices[0].message.content, asks * 4))
    assert together == alone * 4


def test_a_schema_that_cannot_be_followed_is_a_400_before_the_stream(client: OpenAI) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match="Invalid schema for response_format 'bad'") as refused:
        ask(client, response_format=bad, stream=True)
    assert (refused.value.code, refused.value.param) == ("invalid_json_schema", "response_format")
