"""OpenAI's own client, strict about formats, and our terminal, against a real server on loopback."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from server.api.app import create_app
from server.cli.chat import run_chat
from server.sequence import LoRARequest
from tests.fakes import BASE, FakeEngine, Script, adapter, server_state
from tests.loopback import on_loopback
from tests.terminal import Terminal

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([Script("日本 hello 🎉")])


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    """A server over the fake engine, with one adapter."""
    with on_loopback(create_app(server_state(engine, adapter("poet")))) as running:
        yield running


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, _strict_response_validation=True) as made:
        yield made


def test_whole_answers_are_as_the_client_wants_them(client: OpenAI) -> None:
    chat = client.chat.completions.create(model="poet", messages=HELLO, n=2)  # type: ignore[arg-type]
    assert [choice.message.content for choice in chat.choices] == ["日本 hello 🎉"] * 2
    assert chat._request_id
    text = client.completions.create(model=BASE, prompt=["a", "b"])
    assert [choice.text for choice in text.choices] == ["日本 hello 🎉"] * 2


def test_streams_are_as_the_client_wants_them(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="poet",
        messages=HELLO,  # type: ignore[arg-type]
        n=3,
        stream_options={"include_usage": True},
    ) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["日本 hello 🎉"] * 3
    assert final.usage is not None


def test_log_probabilities_are_as_the_client_wants_them(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "poet", "messages": HELLO, "logprobs": True, "top_logprobs": 4}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    with client.chat.completions.stream(**asked) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].logprobs == whole
    assert whole is not None and whole.content is not None
    assert bytes(byte for token in whole.content for byte in token.bytes or ()).decode() == "日本 hello 🎉"
    text = client.completions.create(model=BASE, prompt="a", logprobs=2).choices[0].logprobs
    assert text is not None and text.tokens is not None
    assert text.token_logprobs == [token.logprob for token in whole.content]


def test_a_stream_of_completions_is_as_the_client_wants_it(url: str) -> None:
    """Not strictly: its type has no place for the null ``finish_reason`` that OpenAI itself sends in chunks."""
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        chunks = list(client.completions.create(model=BASE, prompt="a", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "日本 hello 🎉"


def test_models_are_as_the_client_wants_them(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, "poet"]
    assert client.models.retrieve("poet").object == "model"


def test_errors_are_the_clients_classes(client: OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no/body", messages=HELLO)  # type: ignore[arg-type]
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=BASE, messages=HELLO, temperature=3)  # type: ignore[arg-type]
    assert bad.value.param == "temperature"
    engine.scripts = [Script("hello", then="fail")]
    with pytest.raises(openai.APIError, match="failed"):
        list(client.chat.completions.create(model=BASE, messages=HELLO, stream=True))  # type: ignore[arg-type]


def test_a_client_that_hangs_up_frees_the_engine(client: OpenAI, engine: FakeEngine) -> None:
    engine.scripts = [Script("hello", then="hang")]
    with client.chat.completions.with_streaming_response.create(
        model="poet",
        messages=HELLO,  # type: ignore[arg-type]
        stream=True,
    ) as stream:
        next(stream.iter_lines())
    deadline = time.monotonic() + 10
    while engine.num_open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.num_open == 0


def test_one_question_is_answered_on_standard_output_alone(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_chat(url, None, "hello") == 0
    assert tuple(capsys.readouterr()) == ("日本 hello 🎉\n", "")


def test_a_question_may_be_piped_in(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run_chat(url, "poet", None) == 0
    assert capsys.readouterr().out == "日本 hello 🎉\n"


@pytest.mark.parametrize("then", ["fail", "die"])
def test_an_answer_that_breaks_off_is_an_exit_code(
    url: str, engine: FakeEngine, then: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.scripts = [Script("hello", then=then)]
    assert run_chat(url, None, "hello") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_what_cannot_be_asked_is_an_exit_code(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_chat(url, "nobody", "hello") == 1
    assert run_chat("http://127.0.0.1:1", None, "hello") == 1
    assert run_chat("http://127.0.0.1:1", "poet", "hello") == 1
    assert run_chat(url, "poet", "") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 4


def test_a_conversation_keeps_its_history_across_adapters(
    url: str, engine: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["/adapters", "the cat", "/adapter nobody", "/adapter poet", "sat", "/new", "on", "/help", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(lines)))
    assert run_chat(url, None, None) == 0
    captured = capsys.readouterr()
    assert f"* {BASE}\n  poet\n" in captured.out
    assert "there is no model 'nobody'" in captured.err
    poet = (LoRARequest("poet-weights"),)
    assert [each.adapters for each in engine.submitted] == [(), poet, poet]
    first, second, third = (len(each.prompt_ids) for each in engine.submitted)
    assert second > first > third


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(
    url: str, engine: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in mid-answer closes the connection; what was heard stays in the history."""
    heard: list[str] = []

    def interrupt(text: str = "", **how: object) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)
    monkeypatch.setattr("sys.stdin", Terminal("hello\nagain\n"))
    assert run_chat(url, BASE, None) == 0
    assert " [stopped]" in heard
    assert len(engine.submitted) == 2
    assert len(engine.submitted[1].prompt_ids) > len(engine.submitted[0].prompt_ids)
