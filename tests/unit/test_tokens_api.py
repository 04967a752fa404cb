"""Texts and conversations to token ids and back, in vLLM's forms."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.adapters.content.generation_defaults import GenerationDefaults
from server.api.app import create_app
from tests.fakes import BASE, FakeEngine, adapter_with, ask, encode, server_state, small_tokenizer

MESSAGES = [{"role": "user", "content": "hello 日本"}]


def post(path: str, *adapters: Any, **fields: Any) -> httpx.Response:
    """One request."""
    return ask(create_app(server_state(FakeEngine(), *adapters)), "POST", path, json=fields)


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("fields", [{}, {"model": BASE}])
def test_a_text_becomes_ids_and_ids_the_text_again(prefix: str, fields: dict[str, Any]) -> None:
    text = "<|user|>hello 日本<|end|>"
    ids = encode(text)
    found = post(f"{prefix}/tokenize", prompt=text, **fields).json()
    assert found == {"count": len(ids), "max_model_len": 256, "tokens": ids}
    assert post(f"{prefix}/detokenize", tokens=ids, **fields).json() == {"prompt": text}
    assert post("/tokenize", prompt="").json()["tokens"] == []
    assert post("/detokenize", tokens=[]).json() == {"prompt": ""}


def test_names_of_tokens_are_returned_where_they_are_asked_for() -> None:
    found = post("/tokenize", prompt="the cat", return_token_strs=True, add_special_tokens=False).json()
    assert found["token_strs"] == small_tokenizer().convert_ids_to_tokens(encode("the cat"))


def test_a_conversation_becomes_the_prompt_that_a_chat_request_has() -> None:
    engine = FakeEngine()
    server = create_app(server_state(engine))
    body = {"model": BASE, "messages": MESSAGES}
    found = ask(server, "POST", "/tokenize", json=body).json()["tokens"]
    ask(server, "POST", "/v1/chat/completions", json=body)
    assert tuple(found) == engine.submitted[0].prompt_ids


def test_the_model_chooses_added_tokens_and_template_and_its_weights_are_not_loaded() -> None:
    poet = adapter_with("poet", GenerationDefaults(system_prompt="You rhyme."))
    state = server_state(FakeEngine(), poet)
    server = create_app(state)
    ids = ask(server, "POST", "/tokenize", json={"model": "poet", "messages": MESSAGES}).json()["tokens"]
    assert "You rhyme." in small_tokenizer().decode(ids)
    assert "poet-weights" not in state.adapters.cache
    response = ask(server, "POST", "/detokenize", json={"model": "nobody", "tokens": ids})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_other_bodies_are_refused_by_the_name_of_the_field(path: str, fields: dict[str, Any], param: str) -> None:
    response = post(path, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
