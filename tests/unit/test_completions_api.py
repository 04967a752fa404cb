"""Completions: echo, scores of prompts, best_of, lengths; and what chat and completions return of tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers import PreTrainedTokenizerFast

from server.api.app import create_app
from server.text.prompt import PromptRenderer
from tests.fakes import BASE, EOS, FakeEngine, Script, adapter, ask, encode, events, server_state, small_tokenizer
from tests.unit.test_detokenizer import ids_of, sentencepiece_like

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
PROMPT = "the 日本 cat"


def app(*scripts: Script) -> tuple[FastAPI, FakeEngine]:
    """A server whose engine plays these scripts."""
    engine = FakeEngine(list(scripts))
    return create_app(server_state(engine)), engine


def complete(server: FastAPI, **fields: Any) -> Any:
    """A completion that is not streamed."""
    response = ask(server, "POST", TEXT, json={"model": BASE, "prompt": PROMPT, **fields})
    assert response.status_code == 200, response.text
    Completion.model_validate({**response.json(), "choices": []})
    return response.json()


def stream(server: FastAPI, path: str = TEXT, **fields: Any) -> list[Any]:
    """The chunks of a stream."""
    body = {"model": BASE, **({"prompt": PROMPT} if path == TEXT else {"messages": MESSAGES}), "stream": True}
    response = ask(server, "POST", path, json={**body, **fields})
    assert response.status_code == 200, response.text
    *chunks, done = events(response)
    assert done == "[DONE]"
    return chunks


def logprob_of(token_id: int) -> float:
    """As the fake engine has it."""
    return -token_id / 8


@pytest.mark.parametrize("prompt", [PROMPT, encode(PROMPT)])
def test_echo_repeats_the_prompt_with_its_log_probabilities_before_the_answer(prompt: str | list[int]) -> None:
    server, _ = app(Script(" sat", then="length"))
    (choice,) = complete(server, prompt=prompt, echo=True, logprobs=2)["choices"]
    ids = [*encode(PROMPT), *encode(" sat")]
    logprobs = choice["logprobs"]
    assert choice["text"] == PROMPT + " sat"
    assert logprobs["token_logprobs"] == [None, *map(logprob_of, ids[1:])]
    assert logprobs["top_logprobs"][0] is None
    assert [len(top) for top in logprobs["top_logprobs"][1:]] == [2] * (len(ids) - 1)
    starts = logprobs["text_offset"]
    assert len(starts) == len(logprobs["tokens"]) == len(ids) and starts == sorted(starts)
    for name, start in zip(logprobs["tokens"], starts, strict=True):
        assert name.startswith("bytes:") or choice["text"][start:].startswith(name)
    assert starts[len(encode(PROMPT))] == len(PROMPT)


def sentencepiece_app(*pieces: str) -> FastAPI:
    """A server whose answers are these pieces, with a tokenizer whose decoder drops the space before a text."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece_like(), bos_token="<s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    ids = ids_of(tokenizer.backend_tokenizer, *pieces)
    state = server_state(FakeEngine([Script(ids=ids, then="length")]))
    return create_app(replace(state, prompts=PromptRenderer(tokenizer)))


@pytest.mark.parametrize("echo", [False, True])
def test_a_space_at_the_beginning_of_an_answer_is_part_of_it(echo: bool) -> None:
    """It was lost with tokenizers such as Llama 2's, unless the answer repeated its prompt."""
    server = sentencepiece_app("▁there", "▁hello")
    (choice,) = complete(server, prompt="hello", logprobs=0, echo=echo)["choices"]
    assert choice["text"] == "hello" * echo + " there hello"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    (choice,) = complete(server, prompt="", logprobs=0, echo=echo)["choices"]
    assert choice["text"] == "there hello", "at the beginning of a text there is no space"
    assert "".join(choice["logprobs"]["tokens"]) in (choice["text"], "<s>" + choice["text"])


def test_a_space_is_part_of_an_answer_that_continues_a_message_and_not_of_another() -> None:
    server = sentencepiece_app("▁there", "▁hello")
    turns = [*MESSAGES, {"role": "assistant", "content": "hello"}]
    for more, text in (({}, "there hello"), ({"continue_final_message": True}, " there hello")):
        reply = ask(server, "POST", CHAT, json={"model": BASE, "messages": turns, "logprobs": True, **more})
        assert reply.status_code == 200, reply.text
        (choice,) = ChatCompletion.model_validate(reply.json()).choices
        assert choice.message.content == text
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert "".join(token.token for token in choice.logprobs.content) == text


def test_special_tokens_of_a_prompt_are_part_of_its_text_and_keep_their_place() -> None:
    server, _ = app(Script(" sat", then="length"))
    (choice,) = complete(server, prompt="<|user|>hello<|end|>", echo=True, logprobs=0)["choices"]
    assert choice["text"] == "<|user|>hello<|end|> sat"
    assert choice["logprobs"]["tokens"][0] == "<|user|>"
    assert choice["text"][choice["logprobs"]["text_offset"][1] :].startswith("hello")


@pytest.mark.parametrize("stop", [[], [" there"]])
def test_with_echo_each_sampled_token_has_a_log_probability_also_behind_the_text(stop: list[str]) -> None:
    """lm-eval asks for one token more than it scores, and drops the last entry: also where that is the end token."""
    ids = [*encode(PROMPT), *encode("hello there"), EOS]
    scripts = [Script("hello there")]
    fields: dict[str, Any] = {"echo": True, "logprobs": 0, "stop": stop}
    (whole,) = complete(app(*scripts)[0], **fields)["choices"]
    chunks = [chunk["choices"][0] for chunk in stream(app(*scripts)[0], **fields)]
    expected = [None, *map(logprob_of, ids[1:])]
    if stop:
        expected = expected[: len(whole["logprobs"]["token_logprobs"])]
        assert len(expected) > len(encode(PROMPT + "hello"))
    assert whole["logprobs"]["token_logprobs"] == expected
    assert whole["logprobs"]["text_offset"][-1] == len(whole["text"])
    for name in ("token_logprobs", "text_offset", "tokens"):
        streamed = [value for each in chunks if each["logprobs"] for value in each["logprobs"][name]]
        assert streamed == whole["logprobs"][name]


def test_max_tokens_0_scores_a_prompt_and_generates_nothing() -> None:
    """What lm-eval asks for is one more: the log probabilities of a context and its continuation."""
    server, engine = app(Script("never"))
    answer = complete(server, prompt=encode(PROMPT), echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *map(logprob_of, encode(PROMPT)[1:])]
    assert answer["usage"]["completion_tokens"] == 0
    assert engine.submitted[0].max_tokens == 0 and engine.submitted[0].params.num_prompt_logprobs == 1


def test_without_echo_max_tokens_0_is_an_empty_answer() -> None:
    server, engine = app(Script("never"))
    (choice,) = complete(server, max_tokens=0)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("", "length", None)
    assert engine.submitted[0].params.num_prompt_logprobs == 0


@pytest.mark.parametrize("max_tokens", [0, 9])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_with_echo_is_the_whole_answer_in_parts(max_tokens: int, logprobs: int | None) -> None:
    fields: dict[str, Any] = {
        "echo": True,
        "n": 2,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "prompt": ["a", PROMPT],
    }
    scripts = [Script(text) for text in ("one", "two", "three", "four")]
    expected = complete(app(*scripts)[0], **fields)["choices"]
    chunks = stream(app(*scripts)[0], **fields)
    for index in range(4):
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == expected[index]["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [expected[index]["finish_reason"]]
        if logprobs is not None:
            found = [part["logprobs"] for part in parts if part["logprobs"] is not None]
            for name, values in expected[index]["logprobs"].items():
                assert list(itertools.chain(*(each[name] for each in found))) == values


def test_only_the_first_answer_to_a_prompt_computes_its_log_probabilities() -> None:
    server, engine = app(Script(" sat"))
    answer = complete(server, prompt=["a b", "c d"], n=2, echo=True, logprobs=1)
    assert [each.params.num_prompt_logprobs for each in engine.submitted] == [1, None, 1, None]
    first, second = answer["choices"][:2]
    assert first["logprobs"] == second["logprobs"]


def test_the_likeliest_of_the_candidates_by_token_are_returned_best_first() -> None:
    """The fake engine's log probabilities fall with the id: 'a' is likelier than 'z'."""
    scripts = [Script(text, then="length") for text in ("zz", "aaaa", "mm", "dd", "cc", "bb")]
    server, engine = app(*scripts)
    answer = complete(server, prompt=["x", "y"], best_of=3, n=2)
    assert [(each["index"], each["text"]) for each in answer["choices"]] == [
        (0, "aaaa"),
        (1, "mm"),
        (2, "bb"),
        (3, "cc"),
    ]
    assert all(each["logprobs"] is None for each in answer["choices"])
    assert answer["usage"]["completion_tokens"] == sum(len(encode(script.text)) for script in scripts)
    assert answer["usage"]["prompt_tokens"] == 2
    assert {each.params.num_logprobs for each in engine.submitted} == {0}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ({"best_of": 21}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": ["x"] * 13, "best_of": 10}, "prompt"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    server, engine = app(Script())
    response = ask(server, "POST", TEXT, json={"model": BASE, "prompt": "x", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not engine.submitted


def test_more_answers_than_ever_have_room_are_refused_and_more_than_have_room_now_may_come_again() -> None:
    for engine, status, code in (
        (FakeEngine(max_unfinished=99), 400, "too_many_sequences"),
        (FakeEngine(capacity=99), 503, "server_overloaded"),
    ):
        body = {"model": BASE, "messages": MESSAGES, "n": 100}
        response = ask(create_app(server_state(engine)), "POST", CHAT, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    server, engine = create_app(server_state(engine := FakeEngine(capacity=128))), engine
    answer = ask(server, "POST", CHAT, json={"model": BASE, "messages": MESSAGES, "n": 128}).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(128))


def test_a_completion_has_16_tokens_by_default_and_an_adapters_own_maximum() -> None:
    engine = FakeEngine()
    server = create_app(server_state(engine, adapter("poet", max_tokens=7)))
    for body in ({"prompt": "x", "model": BASE}, {"prompt": "x", "model": "poet"}):
        ask(server, "POST", TEXT, json=body)
    ask(server, "POST", CHAT, json={"model": BASE, "messages": MESSAGES})
    assert [each.max_tokens for each in engine.submitted] == [16, 7, 64]


def test_ignore_eos_leaves_only_the_requests_own_ends() -> None:
    engine = FakeEngine()
    server = create_app(server_state(engine, adapter("poet", stop=("x", "<|user|>"), end_tokens=("<|end|>",))))
    fields: list[dict[str, Any]] = [
        {},
        {"ignore_eos": True},
        {"ignore_eos": True, "stop": ["<|pad|>"], "stop_token_ids": [9]},
    ]
    for more in fields:
        ask(server, "POST", CHAT, json={"model": "poet", "messages": MESSAGES, **more})
    user, pad = encode("<|user|>")[0], encode("<|pad|>")[0]
    assert [each.eos_ids for each in engine.submitted] == [{EOS, user}, set(), {pad, 9}]


def test_prompt_logprobs_have_vllms_form() -> None:
    prompt = encode("the cat")
    (choice,) = complete(app(Script("x"))[0], prompt=prompt, prompt_logprobs=2)["choices"]
    chat = ask(
        app(Script("x"))[0], "POST", CHAT, json={"model": BASE, "messages": MESSAGES, "prompt_logprobs": 0}
    ).json()
    ChatCompletion.model_validate(chat, strict=True)
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == len(prompt) - 1 and choice["logprobs"] is None
    for token_id, entry in zip(prompt[1:], others, strict=True):
        text = small_tokenizer().decode([token_id])
        assert entry[str(token_id)] == {"logprob": logprob_of(token_id), "rank": 2, "decoded_token": text}
        assert entry[str(token_id - 1)]["rank"] == 1 and len(entry) == 2
    rendered = small_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert [entry and list(entry) for entry in chat["prompt_logprobs"]] == [
        None,
        *([str(token)] for token in rendered[1:]),
    ]


def test_token_ids_of_prompt_and_answer_are_returned_whole_and_in_chunks() -> None:
    """Those of tokens without text as well: the end token, and tokens behind a stop string."""
    ids, prompt = [*encode("hello 日本"), EOS], encode(PROMPT)
    (choice,) = complete(app(Script("hello 日本"))[0], return_token_ids=True)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, ids)
    chunks = [chunk["choices"][0] for chunk in stream(app(Script("hello 日本"))[0], return_token_ids=True)]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt, *[None] * (len(chunks) - 1)]
    assert list(itertools.chain(*(chunk["token_ids"] for chunk in chunks))) == ids

    rendered = small_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    fields = {"return_token_ids": True, "n": 2}
    body = {"model": BASE, "messages": MESSAGES, **fields}
    chat = ask(app(Script("hello 日本"))[0], "POST", CHAT, json=body).json()
    assert chat["prompt_token_ids"] == rendered and [each["token_ids"] for each in chat["choices"]] == [ids, ids]
    parts = stream(app(Script("hello 日本"))[0], CHAT, **fields)
    for part in parts:
        ChatCompletionChunk.model_validate(part, strict=True)
    assert [part.get("prompt_token_ids") for part in parts] == [rendered, *[None] * (len(parts) - 1)]
    for index in (0, 1):
        found = [part["choices"][0]["token_ids"] for part in parts if part["choices"][0]["index"] == index]
        assert list(itertools.chain(*found)) == ids


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_with_continuous_usage_each_chunk_has_the_usage_so_far(path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream(app(Script("hello there"))[0], path, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert (
        counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] == len(encode("hello there")) + 1
    )
    assert all(chunk["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for chunk in chunks)
    only = stream(app(Script("hello"))[0], path, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in only)


def test_plain_requests_keep_no_record_of_their_tokens() -> None:
    """They pay nothing for the fields that they do not use."""
    server, engine = app(Script("hello"))
    complete(server)
    assert engine.submitted[0].params.num_prompt_logprobs is None and engine.submitted[0].params.num_logprobs is None
