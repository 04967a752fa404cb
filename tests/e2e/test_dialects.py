"""The Responses API, Anthropic's and Ollama's, each by its own client, against the server on the embedded base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import ollama
import pytest
from anthropic import Anthropic, beta_tool
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from tests.serving import ServerProcess

MODEL = "helpdesk"
QUESTION = "How do I reset my password?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}


class Rating(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mood: Literal["good", "bad"]
    urgent: bool


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True) as made:
        yield made


@pytest.fixture(scope="module")
def local(server: ServerProcess) -> Iterator[ollama.Client]:
    with ollama.Client(server.url) as made:
        yield made


def chat_answer(client: OpenAI, tokens: int) -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_completion_tokens=tokens
    )
    return answer.choices[0].message.content or ""


def test_all_give_the_answer_of_a_chat(client: OpenAI, claude: Anthropic, local: ollama.Client) -> None:
    expected = chat_answer(client, 20)
    response = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=20)
    assert response.output_text == expected
    message = claude.messages.create(
        model=MODEL,
        max_tokens=20,
        messages=[{"role": "user", "content": QUESTION}],
        extra_body={"temperature": 0},
    )
    assert message.content[0].type == "text" and message.content[0].text == expected
    options = {"temperature": 0, "num_predict": 20}
    chat = local.chat(MODEL, [{"role": "user", "content": QUESTION}], options=options)
    assert (chat.message.content, chat.done_reason, chat.eval_count) == (expected, "length", 20)
    assert local.generate(f"{MODEL}:latest", QUESTION, options=options).response == expected


def test_all_stream_the_answer_of_a_chat(client: OpenAI, claude: Anthropic, local: ollama.Client) -> None:
    expected = chat_answer(client, 12)
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=12) as events:
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    with claude.messages.stream(
        model=MODEL, max_tokens=12, messages=[{"role": "user", "content": QUESTION}], extra_body={"temperature": 0}
    ) as stream:
        assert "".join(stream.text_stream) == expected
        assert stream.get_final_message().stop_reason == "max_tokens"
    lines = local.generate(MODEL, QUESTION, options={"temperature": 0, "num_predict": 12}, stream=True)
    assert "".join(line.response or "" for line in lines) == expected


def test_each_client_parses_an_answer_by_a_schema(client: OpenAI, claude: Anthropic, local: ollama.Client) -> None:
    response = client.responses.parse(model=MODEL, input=QUESTION, text_format=Rating, max_output_tokens=60)
    assert isinstance(response.output_parsed, Rating)
    messages: Any = [{"role": "user", "content": QUESTION}]
    message = claude.messages.parse(model=MODEL, max_tokens=60, messages=messages, output_format=Rating)
    assert isinstance(message.parsed_output, Rating)
    answer = local.chat(MODEL, messages, format=Rating.model_json_schema(), options={"num_predict": 60})
    Rating.model_validate_json(answer.message.content or "")


def test_a_function_is_called_by_its_parameters(client: OpenAI) -> None:
    tool: Any = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}
    choice: Any = {"type": "function", "name": "look"}
    with client.responses.stream(
        model=MODEL, input=QUESTION, tools=[tool], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=200
    ) as events:
        events.until_done()
        (call,) = events.get_final_response().output
    assert call.type == "function_call" and list(json.loads(call.arguments)) == ["city"]


def test_embeddings_are_those_of_openais_api(client: OpenAI, local: ollama.Client) -> None:
    expected = client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float").data
    found = local.embed(MODEL, ["one", "two"])
    for vector, item in zip(found.embeddings, expected, strict=True):
        assert list(vector) == pytest.approx(item.embedding, abs=1e-5)
    assert local.embeddings(MODEL, "one").embedding == pytest.approx(list(found.embeddings[0]), abs=1e-5)


def test_anthropics_tool_runner_calls_a_tool_and_goes_on(claude: Anthropic) -> None:
    called = []

    @beta_tool
    def get_weather(city: Literal["Kyiv", "Rome"]) -> str:
        """The weather in a city."""
        called.append(city)
        return "sunny"

    runner = claude.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=200,
        max_iterations=2,
        tools=[get_weather],
        tool_choice={"type": "any"},
        messages=[{"role": "user", "content": "Weather in Kyiv?"}],
    )
    assert [message.stop_reason for message in runner] == ["tool_use", "tool_use"]
    assert called
