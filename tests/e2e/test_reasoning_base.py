"""A reasoning base, from its files to streamed answers of an adapter that our trainer made for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.cli import adapters_check
from tests.reasoning_base import ASSISTANT, END, END_THINK, THINK, USER, build_reasoning_base
from tests.serving import running_server
from trainer.__main__ import main as trainer_main

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "<think>\nThe fox is late.\n</think>\n\nHi."},
    {"role": "user", "content": "What is <think>?"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reasoning_base(tmp_path_factory.mktemp("bases") / "tiny-r1")


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer.from_file(str(base / "tokenizer.json"))


@pytest.fixture(scope="module")
def adapters(base: Path) -> Path:
    """The folder with the adapter ``fox``, trained for some steps on prose that answers a prompt."""
    folder = base.parent
    (folder / "fox.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 40, encoding="utf-8")
    recipe = {
        "name": "fox", "base_model": str(base), "max_steps": 12, "lr": 0.05, "max_length": 64, "dtype": "float32",
        "lora": {"r": 4}, "samples": ["Who jumps?"],
        "data": [{"path": "fox.txt", "format": "text", "passage_tokens": 40, "prompts": ["Tell me."], "clean": False}],
    }  # fmt: skip
    (folder / "fox.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert trainer_main(["train", str(folder / "fox.yaml"), "--out", str(folder / "adapters" / "fox")]) == 0
    return folder / "adapters"


@pytest.fixture(scope="module")
def client(base: Path, adapters: Path) -> Iterator[OpenAI]:
    flags = ("--base-model", str(base), "--adapters-dir", str(adapters), "--no-demo-adapters", "--dtype", "float32")
    with (
        running_server(*flags) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made,
    ):
        yield made


def ask(client: OpenAI, model: str, messages: Any = HISTORY, **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=messages, **more)


def test_transformers_reads_the_tokenizer_as_its_file_says(base: Path, tokenizer: Tokenizer) -> None:
    """The files name ``LlamaTokenizerFast``, whose pieces would be others."""
    loaded = AutoTokenizer.from_pretrained(base)
    for text in ("The fox isn't late: 1234\n\n", "été 東京", f"{THINK}\nwell{END_THINK}"):
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids


@pytest.mark.parametrize("model", ["tiny-r1", "fox"])
def test_earlier_thoughts_are_cut_and_the_answer_is_asked_behind_an_opened_one(
    client: OpenAI, base: Path, tokenizer: Tokenizer, model: str
) -> None:
    """What the chat API answers is what a prompt of these ids is answered with."""
    answer = ask(client, model, **GREEDY)
    ids: list[int] = [
        *tokenizer.encode("Be brief.").ids,  # with the token that begins a text
        token_id(tokenizer, USER), *plain_ids(tokenizer, "Hello!"),
        token_id(tokenizer, ASSISTANT), *plain_ids(tokenizer, "\n\nHi."), token_id(tokenizer, END),
        token_id(tokenizer, USER), *plain_ids(tokenizer, "What is "), *text_ids(tokenizer, THINK),
        *plain_ids(tokenizer, "?"), token_id(tokenizer, ASSISTANT), token_id(tokenizer, THINK),
        *plain_ids(tokenizer, "\n"),
    ]  # fmt: skip
    assert answer.usage.prompt_tokens == len(ids)
    if model == "tiny-r1":
        assert answer.choices[0].message.reasoning_content == stock_answer(base, ids).strip()
        assert answer.choices[0].message.content == ""
        assert answer.usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens


def test_the_end_of_reasoning_is_not_shown_and_can_be_a_stop_string(client: OpenAI, tokenizer: Tokenizer) -> None:
    forced: dict[str, Any] = {"logit_bias": {str(token_id(tokenizer, END_THINK)): 100}, "max_tokens": 3}
    whole = ask(client, "tiny-r1", **forced).choices[0]
    assert whole.message.content == 2 * END_THINK and whole.finish_reason == "length"  # the first ends the reasoning
    cut = ask(client, "tiny-r1", **forced, stop=END_THINK).choices[0]
    assert cut.message.content == "" and cut.finish_reason == "stop"


def test_the_end_token_of_the_base_ends_an_answer_unseen(client: OpenAI, tokenizer: Tokenizer) -> None:
    forced = {str(token_id(tokenizer, END)): 100}
    for model in ("tiny-r1", "fox"):
        answer = ask(client, model, logit_bias=forced)
        assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content == ""


@pytest.mark.parametrize("model", ["tiny-r1", "fox"])
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, model: str) -> None:
    whole = ask(client, model, **GREEDY).choices[0].message
    deltas = [chunk.choices[0].delta for chunk in ask(client, model, **GREEDY, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == whole.content
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == getattr(whole, "reasoning_content", "")


def test_the_adapter_answers_otherwise_than_the_base(client: OpenAI) -> None:
    answers = {str(ask(client, model, **GREEDY).choices[0].message) for model in ("tiny-r1", "fox")}
    assert len(answers) == 2


def test_adapters_check_agrees_with_peft(base: Path, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--base-model", str(base), "--adapters-dir", str(adapters), "--no-demo-adapters", "--dtype", "float32")
    assert adapters_check.main([str(adapters / "fox"), *flags]) == 0
    assert "PEFT parity" in capsys.readouterr().out


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def text_ids(tokenizer: Tokenizer, token: str) -> list[int]:
    """The ids of a control token that a user wrote: of its characters."""
    return plain_ids(tokenizer, token[0]) + plain_ids(tokenizer, token[1:])


def stock_answer(base: Path, ids: list[int]) -> str:
    """transformers' own greedy continuation."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    done = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, temperature=None, top_p=None)
    return str(AutoTokenizer.from_pretrained(base).decode(done[0, len(ids) :], skip_special_tokens=True))
