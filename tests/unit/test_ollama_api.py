"""Ollama's API: bodies as chat requests, answers as Ollama's own client reads them."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from server.api.app import create_app
from server.api.formats.ollama import OllamaChatFormat, OllamaGenerateFormat
from server.api.ollama import chat_of, completion_of
from server.api.protocol.ollama import OllamaChatRequest, OllamaGenerateRequest
from server.sequence import FinishReason
from server.text.answer import AnswerPart, Content, ToolCallPart
from tests.answer_deltas import deltas, fake_request, streamed, whole
from tests.fakes import BASE, FakeEngine, Script, adapter, ask, encode, server_state, small_tokenizer
from tests.loopback import on_loopback

HELLO: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
CALL = {"name": "look", "arguments": {"city": "Kyiv"}}


def chat(**fields: Any) -> Any:
    return chat_of(OllamaChatRequest.model_validate({**HELLO, **fields}))


def test_options_are_sampling_parameters_of_a_chat() -> None:
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 7, "stop": ["!"], "num_predict": 9}
    asked = chat(options={**options, "repeat_penalty": 1.2, "num_ctx": 4096, "num_thread": 8})
    assert (asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.seed) == (0.5, 3, 0.9, 0.1, 7)
    assert (asked.stop, asked.max_completion, asked.repetition_penalty) == (["!"], 9, 1.2)


def test_a_stream_is_the_default() -> None:
    assert chat().stream
    assert not chat(stream=False).stream


@pytest.mark.parametrize("unlimited", [-1, -2, 0])
def test_no_limit_of_tokens_is_all_the_room(unlimited: int) -> None:
    assert chat(options={"num_predict": unlimited}).max_completion == 2**31 - 1
    assert chat().max_completion is None


def test_a_result_belongs_to_the_call_of_its_tool() -> None:
    calls = [{"function": CALL}, {"function": {"name": "add", "arguments": {}}}]
    results = [{"role": "tool", "content": "5", "tool_name": "add"}, {"role": "tool", "content": "sunny"}]
    _, turn, *answers = chat(
        messages=[*HELLO["messages"], {"role": "assistant", "tool_calls": calls}, *results]
    ).messages
    ids = {call.function.name: call.id for call in turn.tool_calls}
    assert [answer.tool_call_id for answer in answers] == [ids["add"], ids["look"]]
    assert json.loads(turn.tool_calls[0].function.arguments) == CALL["arguments"]


def test_results_of_a_long_conversation_find_their_calls_quickly() -> None:
    """Each result looked at all the open calls: 5,000 calls and results froze the server for 4 s."""
    number = 5_000
    calls = [{"function": {"name": "add"}} for _ in range(number)]
    results = [{"role": "tool", "content": "x", "tool_name": name} for name in ("other", "add") for _ in range(number)]
    gc.disable()  # it would look at the objects of all tests before
    try:
        since = time.process_time()
        turn, *answers = chat(messages=[{"role": "assistant", "tool_calls": calls}, *results]).messages
        assert time.process_time() - since < 1
    finally:
        gc.enable()
    ids = [answer.tool_call_id for answer in answers]
    assert ids == ["call_unknown"] * number + [call.id for call in turn.tool_calls]


def test_a_raw_prompt_is_a_completion() -> None:
    body = {"model": BASE, "prompt": "Once", "raw": True, "options": {"num_predict": 5}}
    asked = completion_of(OllamaGenerateRequest.model_validate(body))
    assert (asked.prompt, asked.max_completion, asked.stream) == (["Once"], 5, True)


@pytest.mark.parametrize(
    ("url", "more", "name"),
    [
        ("chat", {"options": {"temperature": 3.0}}, "options.temperature"),
        ("chat", {"options": {"mirostat": 2}}, "options.mirostat"),
        ("chat", {"options": {"repeat_penalty": 0.0}}, "options.repeat_penalty"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images"),
        ("chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ("generate", {"prompt": "x", "context": [1, 2]}, "context"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("generate", {"prompt": "x", "images": ["aGk="]}, "images"),
    ],
)
def test_a_wrong_or_unsupported_field_is_named_in_ollamas_error(url: str, more: dict[str, Any], name: str) -> None:
    fields = HELLO if url == "chat" else {"model": BASE}
    response = ask(create_app(server_state(FakeEngine())), "POST", f"/api/{url}", json={**fields, **more})
    assert response.status_code == 400
    assert f"'{name}'" in response.json()["error"]


def test_a_request_without_content_loads_the_model() -> None:
    engine = FakeEngine()
    app = create_app(server_state(engine, adapter("poet")))
    for url, key in (("chat", "message"), ("generate", "response")):
        answer = ask(app, "POST", f"/api/{url}", json={"model": "poet", "keep_alive": "5m"}).json()
        assert (answer["done"], answer["done_reason"], key in answer) == (True, "load", True)
        assert ask(app, "POST", f"/api/{url}", json={"model": "nobody"}).status_code == 404
    assert engine.submitted == []


def lines(format: OllamaChatFormat, parts: list[AnswerPart] | None = None) -> list[dict[str, Any]]:
    answer = deltas(FinishReason.TOOL_CALLS) if parts is None else deltas(FinishReason.LENGTH, parts=parts)
    return [json.loads(line) for line in streamed(format, answer)]


def test_a_stream_has_whole_calls_and_ends_with_counts_and_durations() -> None:
    *written, last = lines(OllamaChatFormat(fake_request(), "fp_1"))
    assert "".join(line["message"].get("thinking", "") for line in written) == "Hm..."
    assert "".join(line["message"]["content"] for line in written) == "Let me see."
    calls = [call["function"] for line in written for call in line["message"].get("tool_calls", ())]
    assert calls == [{"index": 0, **CALL}, {"index": 1, "name": "look", "arguments": {}}]
    assert (last["done"], last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == (True, "stop", 7, 5)
    assert 90_000_000 < last["eval_duration"] < 110_000_000
    assert last["total_duration"] > last["prompt_eval_duration"] > 0


def test_a_whole_answer_has_the_message_of_the_stream() -> None:
    answer = whole(OllamaChatFormat(fake_request(), "fp_1"), deltas(FinishReason.TOOL_CALLS))
    assert (answer["message"]["thinking"], answer["message"]["content"]) == ("Hm...", "Let me see.")
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["look", "look"]


def test_a_call_that_was_cut_off_is_left_out() -> None:
    cut: list[AnswerPart] = [Content("x"), ToolCallPart(0, id="a", name="look"), ToolCallPart(0, arguments='{"ci')]
    written = lines(OllamaChatFormat(fake_request(), "fp_1"), cut)
    assert (len(written), written[-1]["done_reason"]) == (2, "length")


def test_a_ping_is_a_line_without_content() -> None:
    for format in (OllamaChatFormat(fake_request(), "fp_1"), OllamaGenerateFormat(fake_request(), "fp_1")):
        ping = json.loads(format.ping)
        assert not ping["done"] and (ping.get("response") or ping.get("message", {}).get("content", "")) == ""


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([Script("日本 hello 🎉")])


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with on_loopback(create_app(server_state(engine, adapter("poet")))) as running:
        yield running


@pytest.fixture
def client(url: str) -> Iterator[ollama.Client]:
    with ollama.Client(url) as made:
        yield made


def test_chats_are_as_the_client_wants_them(client: ollama.Client) -> None:
    whole_answer = client.chat("poet", HELLO["messages"])
    assert (whole_answer.message.content, whole_answer.done_reason) == ("日本 hello 🎉", "stop")
    chunks = list(client.chat("poet", HELLO["messages"], stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == "日本 hello 🎉"
    assert chunks[-1].done and chunks[-1].eval_count == whole_answer.eval_count


def test_generated_text_is_as_the_client_wants_it(client: ollama.Client, engine: FakeEngine) -> None:
    assert client.generate("poet", "hello", system="Rhyme.").response == "日本 hello 🎉"
    assert "".join(chunk.response or "" for chunk in client.generate("poet", "hello", stream=True)) == "日本 hello 🎉"
    assert client.generate(BASE, "hello", raw=True).response == "日本 hello 🎉"
    assert "Rhyme." in small_tokenizer().decode(list(engine.submitted[0].prompt_ids))
    assert list(engine.submitted[2].prompt_ids[-1:]) == encode("hello")[-1:]


def test_log_probabilities_are_as_the_client_wants_them(client: ollama.Client) -> None:
    answer = client.chat(BASE, HELLO["messages"], logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None and len(answer.logprobs[0].top_logprobs or ()) == 2


def test_models_are_as_the_client_wants_them(client: ollama.Client, url: str) -> None:
    assert [model.model for model in client.list().models] == [BASE, "poet"]
    assert all(len(model.digest or "") == 64 for model in client.list().models)
    details = client.list().models[0].details
    assert details is not None and (details.parameter_size, details.quantization_level) == ("11.0M", "F32")
    assert client.list().models[0].size == 44_000_000
    shown = client.show("poet")
    assert shown.capabilities == ["completion", "tools"]
    assert (shown.modelinfo or {})["quickchange.context_length"] == 256
    assert [model.model for model in client.ps().models] == [BASE]
    client.chat("poet", HELLO["messages"])
    assert [model.model for model in client.ps().models] == [BASE, "poet"]
    assert httpx.get(f"{url}/api/version").json()["version"]


def test_errors_are_the_clients_class(client: ollama.Client, engine: FakeEngine) -> None:
    with pytest.raises(ollama.ResponseError, match="nobody") as missing:
        client.chat("nobody", HELLO["messages"])
    assert missing.value.status_code == 404
    engine.scripts = [Script("hello", then="fail")]
    with pytest.raises(ollama.ResponseError, match="failed"):
        list(client.chat(BASE, HELLO["messages"], stream=True))


@pytest.mark.parametrize(
    ("path", "text"), [("/api/embed", {"input": "hello"}), ("/api/embeddings", {"prompt": "hello"})]
)
def test_embeddings_name_the_version_of_their_adapter(path: str, text: dict[str, str]) -> None:
    """They did not, unlike every other answer."""
    state = server_state(FakeEngine(), adapter("poet"))
    headers = ask(create_app(state), "POST", path, json={"model": "poet", **text}).headers
    assert headers["x-quickchange-adapter"].partition("@")[0] == "poet"


def test_a_body_of_too_many_fields_is_refused_before_it_is_validated() -> None:
    """The limits of bodies did not hold for Ollama's endpoints."""
    body = {"model": BASE, "messages": [{"role": "user", "content": "a"}] * 20_000}
    answer = ask(create_app(server_state(FakeEngine())), "POST", "/api/chat", json=body)
    assert answer.status_code == 413 and "fields" in answer.json()["error"]
