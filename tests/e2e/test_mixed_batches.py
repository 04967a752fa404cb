"""Many clients on many adapters at once get the answers they would get alone, and share steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI

from tests.e2e.conftest import DEMOS
from tests.serving import ServerProcess

QUESTIONS = ("How do I sort a list?", "Tell me about the evening.", "What is the capital of Italy? " * 30)


SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2, "frequency_penalty": 0.5},
    {"temperature": 1.2, "seed": 3, "extra_body": {"top_k": 30, "min_p": 0.02, "repetition_penalty": 1.1}},
    {"temperature": 0, "presence_penalty": 1.0, "logit_bias": {"300": -100}, "extra_body": {"min_tokens": 35}},
)
"""Greedy and with fixed seeds, with filters and penalties: each job has one of them."""

Job = tuple[str, str, dict[str, Any]]


def answer(client: OpenAI, job: Job) -> tuple[str | None, int | None]:
    model, question, settings = job
    completion = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=40, **settings
    )
    return completion.choices[0].message.content, completion.usage.completion_tokens if completion.usage else None


def test_sixteen_clients_on_five_adapters_and_the_base(client: OpenAI, server: ServerProcess) -> None:
    asked = [(model, question) for question in QUESTIONS for model in ("micro", *DEMOS)][:16]
    jobs = [(*each, SETTINGS[number % len(SETTINGS)]) for number, each in enumerate(asked)]
    alone = [answer(client, job) for job in jobs]
    steps = server.metric("quickchange_step_sequences_count")
    sequences = server.metric("quickchange_step_sequences_sum")
    adapters = server.metric("quickchange_step_adapters_sum")
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda job: answer(client, job), jobs))
    assert together == alone
    steps = server.metric("quickchange_step_sequences_count") - steps
    assert (server.metric("quickchange_step_sequences_sum") - sequences) / steps > 4
    assert (server.metric("quickchange_step_adapters_sum") - adapters) / steps > 2


def test_a_long_prompt_does_not_stall_who_is_being_answered(client: OpenAI, server: ServerProcess) -> None:
    """The running stream gets tokens between the chunks of the prompt, and steps stay within their budget of rows."""
    before = server.metric("quickchange_step_rows_bucket", le="512.0")
    total = server.metric("quickchange_step_rows_count")
    stream = client.chat.completions.create(
        model="tolstoy",
        messages=[{"role": "user", "content": "Tell me a story."}],
        temperature=0,
        max_tokens=60,
        stream=True,
    )
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(answer, client, ("micro", "word " * 1800, SETTINGS[0]))
        assert sum(1 for _ in stream) > 3
        long.result()
    within = server.metric("quickchange_step_rows_bucket", le="512.0") - before
    assert within == server.metric("quickchange_step_rows_count") - total
