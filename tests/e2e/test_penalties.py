"""Penalties, biases, least lengths and stop tokens through the real server, streamed and whole."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NamedTuple

import httpx
import pytest
from transformers import AutoTokenizer

from base_files.locate import find_base
from tests.serving import ServerProcess

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "micro", "messages": [{"role": "user", "content": "How do I sort a list?"}]},
    TEXT: {"model": "micro", "prompt": "Once upon a time there was"},
}
TOKENIZER = AutoTokenizer.from_pretrained(find_base("micro").path)
EOS = TOKENIZER.eos_token_id
WORD = TOKENIZER(" river")["input_ids"][-1]


class Completion(NamedTuple):
    """An answer, how it ended, and how many tokens it took."""

    text: str
    finish: str
    num_tokens: int


def whole(server: ServerProcess, path: str, **fields: Any) -> Completion:
    """An answer in one piece; greedy, of thirty tokens where the fields do not change that."""
    body = {**ASKED[path], "temperature": 0, "max_tokens": 30, **fields}
    answer = httpx.post(server.url + path, json=body, timeout=60).json()
    choice = answer["choices"][0]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    return Completion(text, choice["finish_reason"], answer["usage"]["completion_tokens"])


def streamed(server: ServerProcess, path: str, **fields: Any) -> Completion:
    """The same answer piece by piece."""
    more = {"stream": True, "stream_options": {"include_usage": True}}
    body = {**ASKED[path], "temperature": 0, "max_tokens": 30, **more, **fields}
    text, finish, num_tokens = "", "", 0
    for line in httpx.post(server.url + path, json=body, timeout=60).text.splitlines():
        event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {"choices": []}
        for choice in event["choices"]:
            text += (choice["delta"].get("content") or "") if path == CHAT else choice["text"]
            finish = choice["finish_reason"] or finish
        num_tokens = (event.get("usage") or {"completion_tokens": num_tokens})["completion_tokens"]
    return Completion(text, finish, num_tokens)


def complete(server: ServerProcess, path: str, **fields: Any) -> Completion:
    """The answer, which is the same streamed and whole."""
    answer = whole(server, path, **fields)
    assert streamed(server, path, **fields) == answer
    return answer


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_bias_of_a_hundred_forces_a_token_and_one_of_minus_a_hundred_forbids_it(
    server: ServerProcess, path: str
) -> None:
    forced = complete(server, path, logit_bias={str(WORD): 100}, max_tokens=4)
    assert (forced.text.strip(), forced.finish) == ("river river river river", "length")
    plain = complete(server, path)
    token = TOKENIZER(plain.text)["input_ids"][0]
    without = complete(server, path, logit_bias={str(token): -100})
    assert token not in TOKENIZER(without.text)["input_ids"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stop_token_ends_the_answer_and_is_not_in_it(server: ServerProcess, path: str) -> None:
    biased = {"logit_bias": {str(WORD): 100}}
    assert complete(server, path, stop_token_ids=[WORD], **biased) == Completion("", "stop", 1)
    assert complete(server, path, stop_token_ids=[], max_tokens=3, **biased).finish == "length"
    plain = complete(server, path)
    ids = TOKENIZER(plain.text)["input_ids"]
    fifth = next(number for number, token in enumerate(ids) if number >= 4 and token not in ids[:number])
    cut = complete(server, path, stop_token_ids=[ids[fifth]])
    assert cut.finish == "stop"
    assert cut.num_tokens == fifth + 1
    assert plain.text.startswith(cut.text) and len(cut.text) < len(plain.text)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_answer_does_not_end_before_its_least_length(server: ServerProcess, path: str) -> None:
    """By the base's end token, by a stop token, or by a stop string."""
    ends = {"logit_bias": {str(EOS): 100}}
    assert complete(server, path, **ends) == Completion("", "stop", 1)
    assert complete(server, path, min_tokens=7, **ends).num_tokens == 8
    word = {"logit_bias": {str(WORD): 100}}
    assert complete(server, path, min_tokens=7, stop_token_ids=[WORD], **word).num_tokens == 8
    assert complete(server, path, stop="river", **word) == Completion(
        complete(server, path, stop="river", **word).text, "stop", 1
    )
    late = complete(server, path, min_tokens=3, stop="river", **word)
    assert (late.text.split(), late.finish, late.num_tokens) == (["river"] * 3, "stop", 4)


@pytest.mark.parametrize(
    ("path", "settings"),
    [(CHAT, {"temperature": 0}), (TEXT, {"temperature": 1.0, "top_p": 0.9, "seed": 6})],  # its answer is no loop
)
def test_a_penalty_changes_what_comes_again(server: ServerProcess, path: str, settings: dict[str, float]) -> None:
    fields = {"max_tokens": 40, "logit_bias": {str(EOS): -100}, **settings}
    plain = whole(server, path, **fields).text
    for penalty in ({"presence_penalty": 2}, {"repetition_penalty": 1.8}, {"frequency_penalty": -2}):
        assert complete(server, path, **fields, **penalty).text != plain
    fields["logit_bias"] = {str(EOS): -100, str(WORD): 12}
    plain = whole(server, path, **fields).text
    assert most_often(complete(server, path, **fields, frequency_penalty=2).text) < most_often(plain)


def most_often(text: str) -> int:
    """How often the token comes that comes most often."""
    return max(Counter(TOKENIZER(text)["input_ids"]).values())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 3),
        ("presence_penalty", "much"),
        ("repetition_penalty", 0),
        ("logit_bias", {"the": 1}),
        ("logit_bias", {"1000000": 1}),
        ("min_tokens", 31),
        ("stop_token_ids", [1000000]),
    ],
)
def test_a_value_out_of_range_is_a_400_that_names_its_field(
    server: ServerProcess, path: str, field: str, value: object, stream: bool
) -> None:
    body = {**ASKED[path], "max_tokens": 30, "stream": stream, field: value}
    response = httpx.post(server.url + path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert f"'{field}'" in response.json()["error"]["message"]
