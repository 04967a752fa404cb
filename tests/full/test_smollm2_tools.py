"""Tools on SmolLM2, whose template has none: they are described to it, and a grammar makes its calls valid."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

from tests.full.smollm2 import user
from tests.random_schemas import longest_document, random_schema
from tests.serving import ROOT, running_server

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
}
QUESTION = user("What is the weather in Paris?")
NUM_SCHEMAS = 25


@pytest.fixture(scope="module")
def client(smollm2: object) -> Iterator[OpenAI]:
    flags = ("--base-model", "smollm2", "--adapters-dir", str(ROOT / "adapters"))
    with (
        running_server(*flags) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made,
    ):
        yield made


def tool(name: str, parameters: dict[str, Any], description: str = "") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def ask(client: OpenAI, messages: list[Any], **fields: Any) -> Any:
    completions: Any = client.chat.completions
    chosen = {"model": "smollm2", "temperature": 0, "max_tokens": 200} | fields
    return completions.create(messages=messages, **chosen).choices[0]


def test_a_named_tool_is_called_with_arguments_of_random_schemas(client: OpenAI) -> None:
    """At temperature 1, whatever the model would rather say."""
    asked = 0
    for seed in range(1000):
        schema = random_schema(random.Random(seed), depth=2)
        if longest_document(schema) > 400:
            continue
        named = {"type": "function", "function": {"name": "record"}}
        choice = ask(client, [QUESTION], tools=[tool("record", schema)], tool_choice=named, temperature=1, seed=seed,
                     max_tokens=500)  # fmt: skip
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, call.function.name) == ("tool_calls", "record")
        jsonschema.validate(json.loads(call.function.arguments), schema)
        asked += 1
        if asked == NUM_SCHEMAS:
            return
    pytest.fail("there were too few schemas")


@pytest.mark.parametrize("model", ["smollm2", "smollm2-helpdesk", "smollm2-shakespeare"])
def test_a_required_call_is_answered_and_its_result_told(client: OpenAI, model: str) -> None:
    """The whole loop: a call, its result, and an answer in words."""
    tools = [tool("get_weather", WEATHER, "Get the current weather in a city.")]
    fields: dict[str, Any] = {"model": model, "tools": tools, "parallel_tool_calls": False}
    message = ask(client, [QUESTION], **fields, tool_choice="required").message
    (call,) = message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), WEATHER)
    assert message.content is None
    turn = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is sunny in Paris, 21 degrees."}
    told = ask(client, [QUESTION, turn, result], model=model, tools=tools, tool_choice="none").message
    assert told.content and not told.tool_calls


def test_the_base_calls_paris_by_name(client: OpenAI) -> None:
    tools = [tool("get_weather", WEATHER, "Get the current weather in a city.")]
    choice = ask(client, [QUESTION], tools=tools, tool_choice="required", parallel_tool_calls=False)
    assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] == "Paris"
