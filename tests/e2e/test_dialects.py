"""The Responses API, Anthropic's and Ollama's, each by its own client, against the server on the embedded base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from anthropic import Anthropic, beta_tool
from openai import OpenAI

from tests.serving import ServerProcess

MODEL = "helpdesk"
QUESTION = "How do I reset my password?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}


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


def test_embeddings_are_those_of_openais_api(client: OpenAI, local: ollama.Client) -> None:
    expected = client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float").data
    found = local.embed(MODEL, ["one", "two"])
    for vector, item in zip(found.embeddings, expected, strict=True):
        assert list(vector) == pytest.approx(item.embedding, abs=1e-5)
    assert local.embeddings(MODEL, "one").embedding == pytest.approx(list(found.embeddings[0]), abs=1e-5)


def test_anthropics_tool_runner_calls_a_tool_and_goes_on(claude: Anthropic) -> None:
    called = []

    @beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        called.append(city)
        return "sunny"

    runner = claude.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=60,
        max_iterations=2,
        tools=[get_weather],
        tool_choice={"type": "any"},
        messages=[{"role": "user", "content": "Weather in Kyiv?"}],
    )
    assert next(iter(runner)).role == "assistant"
