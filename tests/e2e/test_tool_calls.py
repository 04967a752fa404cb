"""Tools on the real server, by OpenAI's client: calls that follow their schemas, streams, and results."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI

from tests.random_schemas import longest_document, random_schema
from tests.serving import ROOT

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SUM = {"type": "object", "properties": {"expression": {"type": "string", "maxLength": 20}}, "required": ["expression"]}
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]


def tool(name: str, parameters: dict[str, Any], description: str = "") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    tool("get_weather", WEATHER, "Get the current weather in a city."),
    tool("calculate", SUM, "Work out an arithmetic expression."),
]
CALCULATE = {"type": "function", "function": {"name": "calculate"}}


def ask(client: OpenAI, **fields: Any) -> Any:
    defaults: dict[str, Any] = {
        "model": "micro",
        "messages": QUESTION,
        "tools": TOOLS,
        "temperature": 0,
        "max_tokens": 60,
    }
    return client.chat.completions.create(**{**defaults, **fields}).choices[0]


def made(choice: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]


def test_the_model_calls_a_tool_by_itself(client: OpenAI) -> None:
    choice = ask(client)
    assert made(choice) == [("get_weather", {"city": "Paris"})]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None


def test_none_shows_no_tools_and_calls_none(client: OpenAI) -> None:
    choice = ask(client, tool_choice="none")
    assert made(choice) == [] and choice.message.content and choice.finish_reason == "stop"
    assert choice.message.content == ask(client, tools=openai.omit).message.content


@pytest.mark.parametrize("model", ["micro", "helpdesk", "tolstoy"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_by_any_model(client: OpenAI, model: str, stream: bool) -> None:
    fields: dict[str, Any] = {"model": model, "tools": TOOLS, "tool_choice": CALCULATE, "max_tokens": 120}
    choice = streamed(client, **fields) if stream else ask(client, **fields)
    assert [name for name, _ in made(choice)] == ["calculate"] and choice.finish_reason == "tool_calls"


def streamed(client: OpenAI, **fields: Any) -> Any:
    with client.chat.completions.stream(messages=QUESTION, temperature=0, **fields) as events:  # type: ignore[arg-type]
        return events.get_final_completion().choices[0]


def test_a_stream_has_a_calls_name_first_and_then_its_arguments(client: OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="micro",
        messages=QUESTION,
        tools=TOOLS,
        tool_choice="required",
        temperature=0,
        stream=True,  # type: ignore[call-overload]
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    first, *others = deltas
    assert (first.index, first.type, first.function.name, first.function.arguments) == (
        0,
        "function",
        "get_weather",
        "",
    )
    assert first.id.startswith("call_") and len(first.id) == 29
    assert len(others) > 1 and all(call.id is None and call.function.name is None for call in others)
    assert json.loads("".join(call.function.arguments for call in others)) == {"city": "Paris"}


def test_allowed_tools_are_the_only_ones_called(client: OpenAI) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CALCULATE]}}
    assert {name for name, _ in made(ask(client, tool_choice=choice, max_tokens=200))} == {"calculate"}


def test_results_go_back_to_the_model(client: OpenAI) -> None:
    call = ask(client).message.tool_calls[0]
    turn = {
        "role": "assistant",
        "tool_calls": [{"id": call.id, "type": "function", "function": call.function.model_dump()}],
    }
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
    choice = ask(client, messages=[*QUESTION, turn, result])
    assert choice.finish_reason == "stop" and "Paris" in choice.message.content


def schemas(count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Schemas whose documents fit into an answer, at one token a character or less."""
    for seed in range(10 * count):
        schema = random_schema(random.Random(seed), depth=2)
        if count and longest_document(schema) < 300:
            count -= 1
            yield seed, schema


def test_required_calls_follow_random_schemas(client: OpenAI) -> None:
    for seed, schema in schemas(16):
        tools = [tool("first", schema), tool("second", WEATHER)]
        choice = ask(client, tools=tools, tool_choice={"type": "function", "function": {"name": "first"}},
                     temperature=1, seed=seed, max_tokens=500)  # fmt: skip
        ((name, arguments),) = made(choice)
        assert (name, choice.finish_reason) == ("first", "tool_calls")
        jsonschema.validate(arguments, schema)


def test_parallel_calls_are_several_and_one_where_they_are_off(client: OpenAI) -> None:
    """A bias makes the model begin another call wherever it may: at most 16 are allowed."""
    begin = json.loads((ROOT / "micro_base" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in begin}
    tools = [tool(name, {"type": "object", "properties": {"n": {"enum": [1, 2]}}}) for name in ("first", "second")]
    fields: dict[str, Any] = {"tools": tools, "logit_bias": {str(ids["<tool_call>"]): 100}, "max_tokens": 900}
    for mode in ("required", "auto"):
        choice = ask(client, **fields, tool_choice=mode, parallel_tool_calls=True)
        assert len(made(choice)) == 16 and choice.finish_reason == "tool_calls"
        assert len({call.id for call in choice.message.tool_calls}) == 16
        assert len(made(ask(client, **fields, tool_choice=mode, parallel_tool_calls=False))) == 1
    assert len(made(ask(client, **fields, tool_choice="required"))) == 1, "the default where a call has to be"
    assert len(made(ask(client, **fields, tool_choice="auto"))) == 16


def test_a_schema_that_cannot_be_followed_is_refused_by_its_place(client: OpenAI) -> None:
    strict = tool("f", {"type": "object", "properties": {"a": {"not": {"type": "string"}}}})
    strict["function"]["strict"] = True
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[strict], tool_choice="required")
    assert caught.value.param == "tools[0].function.parameters"
    assert "'f'" in caught.value.message and "properties.a.not" in caught.value.message


def test_stop_strings_do_not_cut_a_call_that_has_to_be_made(client: OpenAI) -> None:
    assert made(ask(client, tool_choice="required", stop=["Paris", '"'])) == [("get_weather", {"city": "Paris"})]
