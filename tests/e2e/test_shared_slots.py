"""One key asks for much: another one's request starts at once, and the first is told when its share is full."""

from __future__ import annotations

import asyncio
import json

import httpx

from tests.serving import ServerProcess, running_server

LONG = 1500
"""Tokens of each answer of the first key: all of them together take many times as long as the test."""


async def _stream(client: httpx.AsyncClient, key: str, tokens: int) -> list[str]:
    body = {"model": "micro", "messages": [{"role": "user", "content": "Tell me a story."}], "stream": True}
    body |= {"max_tokens": tokens, "min_tokens": tokens}
    headers = {"authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        return [line.removeprefix("data: ") async for line in response.aiter_lines() if line]


async def _check(server: ServerProcess) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        first = [asyncio.create_task(_stream(client, "first-key", LONG)) for _ in range(12)]
        while server.metric("quickchange_sequences_queued") < 8:
            await asyncio.sleep(0.02)
        body = {"model": "micro", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        headers = {"authorization": "Bearer first-key"}
        refused = await client.post("/v1/chat/completions", json=body, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        events = await _stream(client, "second-key", 4)
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert not any(task.done() for task in first), "it waited for an answer of the first key"
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)


def test_a_request_of_another_key_does_not_wait_for_those_of_the_first() -> None:
    """One request behind another key's hundred waited for 15 s; a full queue was a 503 for everybody."""
    with running_server("--max-num-seqs", "4", "--max-queued-seqs", "12") as server:
        asyncio.run(_check(server))
        server.until("all slots are free", lambda: server.metric("quickchange_kv_slots_used") == 0)
        for gauge in ("queued", "running", "paused"):
            assert server.metric(f"quickchange_sequences_{gauge}") == 0
