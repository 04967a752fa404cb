"""The memory that a burst of large requests takes is given back within a minute."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.serving import running_server

WORDS = "a house by the river and a road through the fields "
NUM_CLIENTS = 64
MAX_GROWTH = 1.2
SETTLE_SECONDS = 60.0
Request = tuple[str, dict[str, Any]]


def chat(content: str, **fields: Any) -> Request:
    return "/v1/chat/completions", {"model": "micro", "messages": [{"role": "user", "content": content}], **fields}


def schema(number: int) -> dict[str, Any]:
    properties = {f"field_{number}_{place}": {"type": "string", "maxLength": 20} for place in range(60)}
    return {
        "type": "json_schema",
        "json_schema": {"name": "of", "schema": {"type": "object", "properties": properties}},
    }


def burst(number: int) -> list[Request]:
    """What is large in each way that a request can be."""
    text = f"{number} {WORDS * 60}"
    return [
        ("/v1/chat/completions", {"model": "micro", "messages": [{"role": "user", "content": "a"}] * 30_000}),
        ("/v1/completions", {"model": "micro", "prompt": WORDS * 40_000}),
        ("/v1/completions", {"model": "micro", "prompt": text, "echo": True, "logprobs": 5, "max_tokens": 1}),
        chat(text, n=16, logprobs=True, top_logprobs=20, max_tokens=40),
        chat(text, max_tokens=100, seed=number),
        chat("a", max_tokens=40, response_format=schema(number)),
        ("/v1/embeddings", {"model": "micro", "input": [f"{number} {place} {WORDS * 20}" for place in range(32)]}),
    ]


def test_the_memory_of_a_burst_is_given_back_within_a_minute() -> None:
    with running_server() as server, httpx.Client(base_url=server.url, timeout=300) as client:

        def send(request: Request) -> int:
            return client.post(request[0], json=request[1]).status_code

        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            assert set(pool.map(send, [chat("Tell me a story.", max_tokens=64)] * 32)) == {200}
            time.sleep(1)
            before = server.usage()
            requests = [request for number in range(NUM_CLIENTS) for request in burst(number)]
            statuses = list(pool.map(send, requests))
        full = server.usage()
        time.sleep(SETTLE_SECONDS)
        after = server.usage()
        print(f"\nbefore {before}\nfull {full}\nafter {after}")
    assert {200, 400} <= set(statuses) <= {200, 400, 413, 429, 503}, set(statuses)
    assert full.rss > MAX_GROWTH * before.rss, "a burst that takes no memory proves nothing"
    assert after.rss < MAX_GROWTH * before.rss
