"""SmolLM2 by the clients of the Responses API, Anthropic's and Ollama's: structured output, tools called in turns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import ollama
import pytest
from anthropic import Anthropic, beta_tool
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from tests.serving import ServerProcess, running_server

MODEL = "smollm2"
WEATHER = "What is the weather in Paris?"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")

    continent: Literal["Africa", "Asia", "Europe"]
    capital: bool


@pytest.fixture(scope="module")
def server(smollm2: object) -> Iterator[ServerProcess]:
    with running_server("--base-model", "smollm2") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    url = f"{server.url}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True) as made:
        yield made


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True) as made:
        yield made


@pytest.fixture(scope="module")
def local(server: ServerProcess) -> Iterator[ollama.Client]:
    with ollama.Client(server.url) as made:
        yield made


def test_each_client_parses_an_answer_by_a_schema(client: OpenAI, claude: Anthropic, local: ollama.Client) -> None:
    question = "Describe Paris."
    response = client.responses.parse(model=MODEL, input=question, text_format=City, max_output_tokens=80)
    assert isinstance(response.output_parsed, City)
    with client.responses.stream(model=MODEL, input=question, text_format=City, max_output_tokens=80) as events:
        events.until_done()
        assert isinstance(events.get_final_response().output_parsed, City)
    messages: Any = [{"role": "user", "content": question}]
    message = claude.messages.parse(model=MODEL, max_tokens=80, messages=messages, output_format=City)
    assert isinstance(message.parsed_output, City)
    answer = local.chat(MODEL, messages, format=City.model_json_schema(), options={"num_predict": 80})
    City.model_validate_json(answer.message.content or "")


def test_a_function_is_called_and_its_output_answered(client: OpenAI) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
    asked: list[Any] = [{"role": "user", "content": WEATHER}]
    with client.responses.stream(
        model=MODEL,
        input=asked,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
    ) as events:
        events.until_done()
        response = events.get_final_response()
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert list(json.loads(call.arguments)) == ["city"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 20 degrees"}
    items = [*asked, *(item.to_dict() for item in response.output), output]
    last = client.responses.create(model=MODEL, input=items, tools=[tool], tool_choice="none", max_output_tokens=40)
    assert last.output_text


def test_anthropics_tool_runner_calls_a_tool_and_goes_on(claude: Anthropic) -> None:
    called = []

    @beta_tool
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather in a city."""
        called.append(city)
        return "sunny, 20 degrees"

    runner = claude.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=200,
        max_iterations=2,
        tools=[get_weather],
        tool_choice={"type": "any"},
        messages=[{"role": "user", "content": WEATHER}],
    )
    assert [message.stop_reason for message in runner] == ["tool_use", "tool_use"]
    assert set(called) <= {"Paris", "Rome"} and called


def test_ollamas_client_replays_calls_and_results(local: ollama.Client) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    messages: list[Any] = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_name": "get_weather", "content": "sunny, 20 degrees"},
    ]
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
    lines = list(local.chat(MODEL, messages, tools=[tool], options={"num_predict": 30}, stream=True))
    assert lines[-1].done and lines[-1].prompt_eval_count
    assert any(line.message.content or line.message.tool_calls for line in lines)
