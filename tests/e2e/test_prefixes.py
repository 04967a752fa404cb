"""What was computed for an earlier prompt is reused over HTTP, and kept apart by key, salt, scale and version."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.serving import ServerProcess, vary

QUESTIONS = ("How do I sort a list?", "What is the capital of Italy?", "Tell me of the war.")


def system_prompt(name: str) -> str:
    """A prompt of 300 tokens or more that no other test uses."""
    return f"You are {name}. " + "You answer briefly, you are kind, and you never speak of the weather. " * 20


def complete(client: OpenAI, model: str, system: str, question: str, **more: Any) -> tuple[str | None, int, int]:
    """An answer at temperature 0, the tokens of its prompt, and how many of them were reused."""
    messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=16, **more)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    return answer.choices[0].message.content, answer.usage.prompt_tokens, cached


@pytest.mark.parametrize("model", ["micro", "tolstoy"])
def test_a_system_prompt_is_computed_once_and_answers_stay_as_they_are(
    client: OpenAI, server: ServerProcess, model: str
) -> None:
    system = system_prompt(f"{model} alone")
    apart = [complete(client, model, system, question, extra_body={"cache_salt": question}) for question in QUESTIONS]
    assert [cached for _, _, cached in apart] == [0, 0, 0]
    assert min(tokens for _, tokens, _ in apart) > 300
    before = server.metric("quickchange_prefix_cached_tokens_total")
    shared = [complete(client, model, system, question) for question in QUESTIONS]
    assert [text for text, _, _ in shared] == [text for text, _, _ in apart]
    first, *others = [cached for _, _, cached in shared]
    assert first == 0 and min(others) > 300
    assert server.metric("quickchange_prefix_cached_tokens_total") - before == sum(others)
    assert server.metric("quickchange_kv_slots_cached") > 0
    assert 0 < server.metric("quickchange_kv_memory_bytes") < server.metric("quickchange_kv_memory_limit_bytes")


def test_a_stream_says_what_was_reused(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": system_prompt("a stream")}]
    reused = []
    for _ in range(2):
        chunks = client.chat.completions.create(
            model="micro", messages=messages, max_tokens=2, stream=True, stream_options={"include_usage": True}
        )
        *_, last = chunks
        assert last.usage is not None and last.usage.prompt_tokens_details is not None
        reused.append((last.usage.prompt_tokens, last.usage.prompt_tokens_details.cached_tokens))
    assert reused == [(reused[0][0], 0), (reused[0][0], reused[0][0] - 1)]


def test_requests_that_come_at_once_share_what_they_have_in_common(client: OpenAI, server: ServerProcess) -> None:
    system = system_prompt("many at once")
    jobs = [f"{question} ({number})" for number in range(3) for question in QUESTIONS]
    rows, prompts = server.metric("quickchange_step_rows_sum"), 0
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: complete(client, "micro", system, job), jobs))
    prompts = sum(tokens for _, tokens, _ in answers)
    assert server.metric("quickchange_step_rows_sum") - rows < prompts / 2
    assert sum(cached > 300 for _, _, cached in answers) >= len(jobs) - 1


def test_keys_and_salts_do_not_share(client: OpenAI, server: ServerProcess) -> None:
    system, question = system_prompt("one for each"), QUESTIONS[0]
    with OpenAI(base_url=f"{server.url}/v1", api_key="somebody-else", max_retries=0) as other:
        asks: list[tuple[OpenAI, dict[str, Any]]] = [
            (client, {}), (other, {}), (client, {"extra_body": {"cache_salt": "salt"}})
        ]  # fmt: skip
        assert [complete(sender, "micro", system, question, **more)[2] for sender, more in asks] == [0, 0, 0]
        again = [complete(sender, "micro", system, question, **more) for sender, more in asks]
    assert [cached for _, _, cached in again] == [tokens - 1 for _, tokens, _ in again]


def test_an_adapter_that_was_replaced_reuses_nothing_and_scales_neither(
    client: OpenAI, server: ServerProcess, watched: Path, tmp_path: Path
) -> None:
    system, question = system_prompt("replaced"), QUESTIONS[0]
    shutil.copytree(watched / "tolstoy", watched / "changing")
    server.until("it is listed", lambda: "changing" in server.models())
    try:
        assert complete(client, "changing", system, question)[2] == 0
        assert complete(client, "changing", system, question)[2] > 300
        half: dict[str, Any] = {"extra_body": {"lora_scale": 0.5}}
        assert complete(client, "changing", system, question, **half)[2] == 0
        assert complete(client, "changing", system, question, **half)[2] > 300
        label = _label(client)
        vary(watched / "tolstoy", tmp_path / "fresh", factor=1.5, seed=1)
        (watched / "changing").rename(tmp_path / "old")
        (tmp_path / "fresh").rename(watched / "changing")
        server.until("the name has moved", lambda: _label(client) != label)
        first, second = (complete(client, "changing", system, question) for _ in range(2))
        assert (first[2], second[2]) == (0, second[1] - 1)
        assert first[0] == second[0]
    finally:
        shutil.rmtree(watched / "changing")
        server.until("it is gone", lambda: "changing" not in server.models())


def _label(client: OpenAI) -> str:
    try:
        raw = client.chat.completions.with_raw_response.create(
            model="changing", messages=[{"role": "user", "content": "x"}], max_tokens=1
        )
    except openai.NotFoundError:
        return ""
    return raw.headers["x-quickchange-adapter"]
