"""Log probabilities go out with exactly the tokens whose text does, in OpenAI's forms, streamed and whole."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from server.api.app import create_app
from server.api.formats.wire import extend_logprobs, to_json_with_encoded_parts
from tests.fakes import BASE, EOS, FakeEngine, Script, ask, encode, events, server_state, small_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 3},
    TEXT: {"prompt": "hello", "logprobs": 3},
}
ANSWER = "日本 hello 🎉 été"
USER = encode("<|user|>")[0]


def app(*scripts: Script) -> FastAPI:
    """A server whose engine plays these scripts."""
    return create_app(server_state(FakeEngine(list(scripts))))


def whole(server: FastAPI, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of an answer that is not streamed."""
    response = ask(server, "POST", path, json={"model": BASE, **ASKED[path], **fields})
    assert response.status_code == 200, response.text
    (ChatCompletion if path == CHAT else Completion).model_validate(response.json(), strict=True)
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def streamed(server: FastAPI, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of every chunk of a stream."""
    response = ask(server, "POST", path, json={"model": BASE, **ASKED[path], "stream": True, **fields})
    chunks = events(response)[:-1]
    for chunk in chunks if path == CHAT else ():
        ChatCompletionChunk.model_validate(chunk, strict=True)
    return [choice for chunk in chunks for choice in chunk["choices"]]


def joined(content: list[dict[str, Any]]) -> bytes:
    """The bytes of a chat's tokens end to end."""
    return b"".join(bytes(token["bytes"] or []) for token in content)


def logprob_of(token_id: int) -> float:
    """As the fake engine has it."""
    return -token_id / 8


def test_a_chats_tokens_are_the_bytes_of_its_content() -> None:
    (choice,) = whole(app(Script(ANSWER)), CHAT)
    content, ids = choice["logprobs"]["content"], encode(ANSWER)
    assert choice["logprobs"]["refusal"] is None
    assert joined(content) == choice["message"]["content"].encode() == ANSWER.encode()
    assert [token["logprob"] for token in content] == [logprob_of(token) for token in ids]
    whole_tokens = [token["token"] for token in content if "\\x" not in token["token"]]
    assert " hello" in "".join(whole_tokens)
    assert all("\\x" not in token["token"] or len(token["token"]) == 4 * len(token["bytes"]) for token in content)
    for token, number in zip(content, ids, strict=True):
        assert [top["logprob"] for top in token["top_logprobs"]] == [-0.25, logprob_of(number), -9999.0]
        assert {name: token["top_logprobs"][1][name] for name in ("token", "bytes")} == {
            name: token[name] for name in ("token", "bytes")
        }


def test_a_completions_tokens_say_where_they_begin() -> None:
    (choice,) = whole(app(Script("the cat sat")), TEXT)
    logprobs, ids = choice["logprobs"], encode("the cat sat")
    assert "".join(logprobs["tokens"]) == choice["text"] == "the cat sat"
    assert logprobs["token_logprobs"] == [logprob_of(token) for token in ids]
    for name, start in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][start:].startswith(name)
    for name, logprob, top in zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[name] == logprob and max(top.values()) == -0.25 and min(top.values()) == -9999.0


@pytest.mark.parametrize(("count", "num_top"), [(0, 1), (1, 2), (2, 2), (5, 5)])
def test_the_chosen_token_is_always_among_a_completions_likeliest(count: int, num_top: int) -> None:
    """So there may be one more than asked for. Here it is the second likeliest."""
    (choice,) = whole(app(Script(" cat")), TEXT, logprobs=count)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [num_top] * len(encode(" cat"))


def test_parts_of_characters_are_called_as_openai_calls_them() -> None:
    ids = encode("日")
    assert len(ids) > 1
    (chat,), (text,) = (whole(app(Script("日")), path) for path in (CHAT, TEXT))
    names = [token["token"] for token in chat["logprobs"]["content"]]
    assert "".join(names) == r"\xe6\x97\xa5"
    assert text["logprobs"]["tokens"] == [f"bytes:{name}" for name in names]
    assert text["logprobs"]["text_offset"] == [0] * len(ids)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stop", [[], ["\nUser:"], ["hello there"], ["el", " 🎉 x"], ["🎉"]])
@pytest.mark.parametrize("then", ["stop", "length"])
def test_chunks_have_the_tokens_of_their_text_and_all_of_them_are_those_of_the_whole(
    path: str, stop: list[str], then: str
) -> None:
    """Whatever is held back, because a stop string might begin there or a character is not whole yet."""
    server = app(Script(ANSWER, then=then))
    (expected,) = whole(server, path, stop=stop)
    chunks = streamed(server, path, stop=stop)
    with_tokens = [chunk for chunk in chunks if chunk["logprobs"] is not None]
    if path == CHAT:
        content = [token for chunk in with_tokens for token in chunk["logprobs"]["content"]]
        assert content == expected["logprobs"]["content"]
        assert joined(content).startswith(expected["message"]["content"].encode())
        texts = [chunk["delta"].get("content") for chunk in chunks]
    else:
        for name, values in expected["logprobs"].items():
            assert [value for chunk in with_tokens for value in chunk["logprobs"][name]] == values
        texts = [chunk["text"] for chunk in chunks]
    assert all(bool(text) == (chunk["logprobs"] is not None) for text, chunk in zip(texts, chunks, strict=True))


def test_tokens_of_a_chunk_are_exactly_those_of_its_text() -> None:
    """Here no token is of two characters' bytes, and none is held back in part."""
    chunks = streamed(app(Script("the cat 日 hello, 🎉")), CHAT, stop=[" hello, you", "\n"])
    with_text = [chunk for chunk in chunks if chunk["delta"].get("content")]
    assert any(len(chunk["logprobs"]["content"]) > 1 for chunk in with_text)
    for chunk in with_text:
        assert joined(chunk["logprobs"]["content"]) == chunk["delta"]["content"].encode()


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_token_held_back_in_part_comes_with_the_first_of_its_text(path: str) -> None:
    """The end of a token may be the beginning of a stop string."""
    ids = [*encode("the"), *encode(" cat")]
    first, *chunks = [chunk for chunk in streamed(app(Script(ids=ids)), path, stop=["e cow"]) if text_of(chunk)]
    assert (text_of(first), first["logprobs"] is None) == ("th", False)
    assert "".join(map(text_of, chunks)) == "e cat"


def text_of(chunk: dict[str, Any]) -> str:
    """The text that a chunk's choice adds."""
    text: str = chunk["text"] if "text" in chunk else chunk["delta"].get("content", "")
    return text


def test_the_end_token_and_stop_strings_are_not_among_the_tokens() -> None:
    (ended,) = whole(app(Script("the cat")), CHAT)
    assert joined(ended["logprobs"]["content"]) == b"the cat"
    assert len(ended["logprobs"]["content"]) == len(encode("the cat"))
    (stopped,) = whole(app(Script("the cat sat on the mat")), CHAT, stop=" sat")
    assert joined(stopped["logprobs"]["content"]) == stopped["message"]["content"].encode() == b"the cat"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_answer_without_tokens_has_an_empty_list(path: str) -> None:
    (choice,) = whole(app(Script(ids=[])), path)
    assert not any(choice["logprobs"].values())
    assert all(chunk["logprobs"] is None for chunk in streamed(app(Script(ids=[])), path))


def test_special_tokens_come_by_name_without_bytes_at_last_with_the_end() -> None:
    ids = [*encode("cat"), USER]
    server = app(Script(ids=[*ids, USER], then="length"))
    (choice,) = whole(server, CHAT)
    assert [token["token"] for token in choice["logprobs"]["content"][-2:]] == ["<|user|>", "<|user|>"]
    assert choice["logprobs"]["content"][-1]["bytes"] is None
    last = streamed(server, CHAT)[-1]
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    assert [token["token"] for token in last["logprobs"]["content"]] == ["<|user|>", "<|user|>"]


def test_the_end_token_can_be_among_the_likeliest() -> None:
    before = EOS + 1  # the fake engine finds the token before likelier
    (choice,) = whole(app(Script(ids=[before])), CHAT)
    name = small_tokenizer().convert_ids_to_tokens(EOS)
    assert choice["logprobs"]["content"][0]["top_logprobs"][0] == {"token": name, "logprob": -0.25, "bytes": None}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_who_does_not_ask_gets_null_and_the_engine_is_not_asked(path: str) -> None:
    engine = FakeEngine([Script("cat")])
    server = create_app(server_state(engine))
    fields = {"logprobs": None, "top_logprobs": None}
    assert whole(server, path, **fields)[0]["logprobs"] is None
    assert all(chunk["logprobs"] is None for chunk in streamed(server, path, **fields))
    whole(server, path)
    assert [submitted.params.num_logprobs for submitted in engine.submitted] == [None, None, 3]


def test_json_with_encoded_parts_is_the_same_json() -> None:
    content = [{"token": "日\u2028", "bytes": [1, 2], "logprob": -0.1}, {}, []]
    logprobs: dict[str, Any] = {"content": [], "refusal": None}
    extend_logprobs(logprobs, {"content": content, "refusal": None})
    payload = {"empty": {}, "choices": [{"logprobs": logprobs, "none": None}], "n": 1.5, "list": []}
    whole = {**payload, "choices": [{"logprobs": {"content": content, "refusal": None}, "none": None}]}
    assert to_json_with_encoded_parts(payload) == json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    with pytest.raises(ValueError, match="JSON"):
        to_json_with_encoded_parts({"choices": [float("nan")]})


def test_a_whole_answer_with_many_log_probabilities_does_not_block_the_event_loop() -> None:
    """All dictionaries and all JSON were made at once when the answer had ended, while no other request was served."""
    num_tokens = 4000
    engine = FakeEngine([Script(ids=encode("the cat sat on the mat ") * (num_tokens // 7), then="length")])
    engine.max_model_len = 2 * num_tokens
    server = create_app(server_state(engine))
    body = {"model": BASE, **ASKED[CHAT], "top_logprobs": 20}

    async def longest_turn() -> tuple[float, float]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://test") as client:
            request = asyncio.ensure_future(client.post(CHAT, json=body))
            began = last = time.perf_counter()
            longest = 0.0
            while not request.done():
                await asyncio.sleep(0)
                now = time.perf_counter()
                last, longest = now, max(longest, now - last)
            assert request.result().status_code == 200
            return longest, last - began

    longest, total = asyncio.run(longest_turn())
    assert longest < total / 8, (longest, total)
