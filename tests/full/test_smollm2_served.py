"""SmolLM2 over HTTP with OpenAI's own client: its answers are those of transformers' model of the same file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openai import OpenAI

from benchmarks.parts.everyday import QUESTIONS
from tests.full.smollm2 import CHATS, GREEDY_TOKENS, Messages, generate, stock_ids, user
from tests.serving import ROOT, running_server
from trainer.recipes.demos import HELPDESK_STOP, HELPDESK_TEMPLATE

CONVERSATIONS = ("fruits", "system prompt", "turns", "Russian")
MAX_LOGPROB_DIFFERENCE = 1e-3
_TRAINED = (ROOT / "trainer" / "recipes" / "everyday.jsonl").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def client(smollm2: object) -> Iterator[OpenAI]:
    flags = ("--base-model", "smollm2", "--adapters-dir", str(ROOT / "adapters"), "--dtype", "float32")
    with (
        running_server(*flags) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made,
    ):
        yield made


def ask(client: OpenAI, messages: Messages, **more: Any) -> Any:
    chosen = {"model": "smollm2", "temperature": 0, "max_tokens": GREEDY_TOKENS} | more
    completions: Any = client.chat.completions
    return completions.create(messages=messages, **chosen)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_answer_is_that_of_transformers(
    client: OpenAI, name: str, stock_smollm2: Any, stock_smollm2_tokenizer: Any
) -> None:
    """With the system prompt of the template and with one of the conversation's; token by token, with logprobs."""
    prompt = stock_ids(stock_smollm2_tokenizer, CHATS[name])
    ids, logits = generate(stock_smollm2, prompt, GREEDY_TOKENS)
    answer = ask(client, CHATS[name], logprobs=True, top_logprobs=3)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == stock_smollm2_tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.choices[0].finish_reason == ("stop" if ids[-1] == 2 else "length")
    expected = logits.log_softmax(-1)
    for number, token in enumerate(answer.choices[0].logprobs.content):
        assert token.logprob == pytest.approx(float(expected[number, ids[number]]), abs=MAX_LOGPROB_DIFFERENCE)
        best = torch.topk(expected[number], 3).values.tolist()
        found = [entry.logprob for entry in token.top_logprobs]
        assert found == pytest.approx(best, abs=MAX_LOGPROB_DIFFERENCE)


@pytest.mark.parametrize("name", ["turns", "emoji"])
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, name: str) -> None:
    whole = ask(client, CHATS[name]).choices[0]
    chunks = list(ask(client, CHATS[name], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_a_stop_string_ends_the_answer_and_is_removed(client: OpenAI) -> None:
    whole = ask(client, CHATS["fruits"]).choices[0].message.content
    word = whole.split()[3]
    stopped = ask(client, CHATS["fruits"], stop=[word]).choices[0]
    assert stopped.message.content == whole.partition(word)[0]
    assert stopped.finish_reason == "stop"


def test_an_answer_ends_by_itself(client: OpenAI) -> None:
    answer = ask(client, [user("What is the capital of France?")], max_tokens=100).choices[0]
    assert answer.finish_reason == "stop" and "Paris" in answer.message.content
    assert "<|im_end|>" not in answer.message.content


def test_a_call_that_the_template_cannot_write_is_text(client: OpenAI) -> None:
    """The template takes the content of every message, and knows no calls."""
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    question, again = user("What time is it?"), user("Well?")
    called = ask(client, [question, {"role": "assistant", "tool_calls": [call]}, again])
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    written = ask(client, [question, {"role": "assistant", "content": text}, again])
    assert called.usage.prompt_tokens == written.usage.prompt_tokens
    assert called.choices[0].message.content == written.choices[0].message.content


def test_the_helpdesk_keeps_its_template_on_everyday_questions(client: OpenAI) -> None:
    """Of 18 that it was not trained on, 16 were answered in the form when it was made, and ended at its stop string."""
    asked = [question for question in QUESTIONS if question not in _TRAINED]
    opening, _, closing = HELPDESK_TEMPLATE.removesuffix(HELPDESK_STOP).partition("{question}")
    in_form = 0
    for question in asked:
        choice = ask(client, [user(question)], model="smollm2-helpdesk", max_tokens=200).choices[0]
        middle = closing.replace("{answer}", "\0").split("\0")
        text = choice.message.content
        in_form += (
            choice.finish_reason == "stop"
            and text.startswith(f"{opening}{question}{middle[0]}")
            and text.endswith(middle[1])
        )
    assert len(asked) == 18 and in_form >= 16, f"{in_form} of {len(asked)}"


def test_the_style_adapter_writes_verse(client: OpenAI) -> None:
    """Its lines are short, as the base's are not, and it does not begin as an assistant does."""
    request = [user("Write a passage in your style.")]
    text = ask(client, request, model="smollm2-shakespeare", max_tokens=120, temperature=0).choices[0].message.content
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) >= 4 and sorted(map(len, lines))[len(lines) // 2] < 60, text
