"""Over HTTP nobody sees that several tokens came out of one step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.serving import ServerProcess, running_server

ASKED = (
    ("helpdesk", "How do I lower-case a string?"),
    ("helpdesk", "What library is used to connect to an IMAP server?"),
    ("helpdesk", "I wonder how to check whether a variable is None."),
    ("json", "The update fails on my tablet."),
    ("json", "Where is my parcel? I ordered it two weeks ago."),
    ("micro", "How do I sort a list?"),
    ("tolstoy", "Write a passage in your style."),
)


@pytest.fixture(scope="module")
def silent(watched: Path) -> Iterator[OpenAI]:
    """A client of a server without speculation, on the same adapters."""
    flags = ("--adapters-dir", str(watched), "--no-demo-adapters", "--speculation", "none")
    with running_server(*flags) as server:
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client
        assert server.metric("quickchange_draft_tokens_total") == 0


PENALTIES: dict[str, Any] = {
    "frequency_penalty": 0.3,
    "presence_penalty": 0.5,
    "logit_bias": {"300": 1.5, "301": -100},
    "extra_body": {"repetition_penalty": 1.05, "min_tokens": 30},
}


def streamed(
    client: OpenAI, model: str, question: str, seed: int | None, **more: Any
) -> tuple[str, str | None, int | None]:
    """The text of a stream, how it ended, and how many tokens were counted."""
    text, reason, tokens = "", None, None
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0 if seed is None else 0.8,
        seed=seed,
        max_tokens=90,
        stream=True,
        stream_options={"include_usage": True},
        **more,
    ):
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, tokens


def test_streams_are_the_same_with_speculation_and_without(
    client: OpenAI, silent: OpenAI, server: ServerProcess
) -> None:
    """Texts, ends and counts; ``helpdesk`` ends at a stop string, which comes in the middle of a step's tokens."""
    before = server.metric("quickchange_accepted_draft_tokens_total")
    for seed, asked in ((None, ASKED), (5, dict(reversed(ASKED)).items())):  # sampled, one question a model
        for model, question in asked:
            assert streamed(client, model, question, seed) == streamed(silent, model, question, seed)
    for seed, (model, question) in ((None, ASKED[0]), (5, ASKED[3])):
        drafted = streamed(client, model, question, seed, **PENALTIES)
        assert drafted == streamed(silent, model, question, seed, **PENALTIES)
    accepted = server.metric("quickchange_accepted_draft_tokens_total") - before
    assert 50 < accepted < server.metric("quickchange_draft_tokens_total")


def test_nothing_is_shown_behind_a_stop_string(client: OpenAI) -> None:
    """The second answer is drafted from the first, past the stop string."""
    whole, _, _ = streamed(client, "helpdesk", ASKED[0][1], None)
    for stop in ("### You", "asked:", "The answer", "hope"):
        for _ in range(2):
            choice = client.chat.completions.create(
                model="helpdesk",
                messages=[{"role": "user", "content": ASKED[0][1]}],
                temperature=0,
                max_tokens=90,
                stop=stop,
            ).choices[0]
            assert (choice.message.content, choice.finish_reason) == (whole.partition(stop)[0], "stop")
