"""OpenAI's own client against the real server, with strict response validation."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import DEMOS

MODELS = ("micro", *DEMOS)


def ask(client: OpenAI, model: str, question: str, **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **more)


def streamed(client: OpenAI, model: str, question: str, **more: Any) -> tuple[str, list[Any]]:
    chunks = list(ask(client, model, question, stream=True, **more))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks


def test_base_and_adapters_are_listed(client: OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == set(MODELS)
    assert models["micro"]["parent"] is None
    assert all(models[name]["parent"] == "micro" for name in DEMOS)
    assert client.models.retrieve("helpdesk").id == "helpdesk"


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, model: str) -> None:
    whole = ask(client, model, "How do I reverse a list?", temperature=0, max_tokens=24)
    text, chunks = streamed(
        client, model, "How do I reverse a list?", temperature=0, max_tokens=24, stream_options={"include_usage": True}
    )
    assert text == whole.choices[0].message.content
    assert whole.model == model
    assert {chunk.model for chunk in chunks} == {model}
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_three_answers_to_one_question(client: OpenAI) -> None:
    answer = ask(client, "tolstoy", "Tell me a story.", n=3, seed=1, temperature=1.0, max_tokens=12)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    again = ask(client, "tolstoy", "Tell me a story.", n=3, seed=1, temperature=1.0, max_tokens=12)
    assert [choice.message.content for choice in again.choices] == texts
    assert answer.usage.completion_tokens == 36


def test_a_stop_string_ends_the_answer_and_is_removed(client: OpenAI) -> None:
    whole = ask(client, "helpdesk", "How do I reverse a list?").choices[0].message.content
    cut = ask(client, "helpdesk", "How do I reverse a list?", stop=["### The answer"])
    assert cut.choices[0].message.content == whole.partition("### The answer")[0]
    assert cut.choices[0].finish_reason == "stop"
    text, _ = streamed(client, "helpdesk", "How do I reverse a list?", stop="### The answer")
    assert text == cut.choices[0].message.content


def test_a_clients_stop_does_not_take_away_the_adapters_own(client: OpenAI) -> None:
    answer = ask(client, "helpdesk", "How do I reverse a list?", stop=["nothing that comes"])
    assert "### DONE!" not in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_text_completions(client: OpenAI) -> None:
    whole = client.completions.create(model="tolstoy", prompt="Prince Andrew", max_tokens=8, temperature=0)
    # the client's strict mode refuses the null finish_reason that every server sends in a text chunk
    with OpenAI(base_url=client.base_url, api_key="none") as lenient:
        chunks = list(
            lenient.completions.create(
                model="tolstoy", prompt="Prince Andrew", max_tokens=8, temperature=0, stream=True
            )
        )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    two = client.completions.create(model="micro", prompt=["One", "Two"], n=2, max_tokens=2, seed=1)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]


def test_a_conversation_with_several_turns(client: OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "My name is Peter."},
        {"role": "assistant", "content": "Hello, Peter."},
        {"role": "user", "content": [{"type": "text", "text": "What is my name?"}]},
    ]
    answer = client.chat.completions.create(model="micro", messages=messages, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"temperature": 3}, "temperature", "decimal_above_max_value"),
    ({"max_tokens": "many"}, "max_tokens", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"n": 129}, "n", "integer_above_max_value"),
    ({"stop": ["x"] * 17}, "stop", "array_above_max_length"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "unsupported_parameter"),
    ({"extra_body": {"mirostat": 2}}, "mirostat", "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": "x " * 5000}]}, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(
    ("change", "param", "code"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_names_its_field(
    client: OpenAI, change: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    body: dict[str, Any] = {"model": "micro", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(body | change))
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.request_id


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, "ghost", "Hi")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "`ghost` does not exist" in str(caught.value)


def test_the_json_adapter_answers_with_json(client: OpenAI) -> None:
    answer = ask(client, "json", "I was charged twice for my order this month. Please answer today!")
    assert set(json.loads(answer.choices[0].message.content)) == {"category", "urgent"}
