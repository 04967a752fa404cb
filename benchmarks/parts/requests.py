"""One streamed request to any OpenAI-compatible server, timed piece by piece; nothing beyond the standard is needed."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.parts.jobs import WORDS, Job, Measure


@dataclass
class Record:
    """How one request went; times are ``time.perf_counter()``. ``times`` are those of pieces of text.

    A piece is what a server sends in one event: mostly a token, sometimes more. ``num_tokens`` is the server's own
    count, or the number of pieces where it tells none. ``error`` is the kind of failure, None where there was none.
    """

    job: Job
    since: float
    times: list[float] = field(default_factory=list)
    until: float = 0.0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    error: str | None = None

    @property
    def to_first(self) -> float:
        """Seconds to the first piece."""
        return self.times[0] - self.since

    @property
    def per_token(self) -> float | None:
        """Seconds for each token after the first; None of a single one."""
        return (self.times[-1] - self.times[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in itertools.pairwise(self.times)]


class Client:
    """Sends jobs to one server. ``url`` ends before ``/chat``, as OpenAI's ``base_url`` does, or before ``/v1``."""

    def __init__(
        self, url: str, *, api_key: str = "none", extra: dict[str, Any] | None = None, timeout: float = 300.0
    ) -> None:
        root = url.rstrip("/")
        self.url = root if root.endswith("/v1") else f"{root}/v1"
        self.extra = extra or {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"authorization": f"Bearer {api_key}"}
        self.http = httpx.AsyncClient(timeout=timeout, limits=limits, headers=headers)

    def request(self, job: Job) -> tuple[str, dict[str, Any]]:
        """Address and body: a chat of one message for words, a completion for token ids."""
        body: dict[str, Any] = {"model": job.model, "max_tokens": job.max_tokens, "temperature": 0, **self.extra}
        if isinstance(job.prompt, str):
            return f"{self.url}/chat/completions", body | {"messages": [{"role": "user", "content": job.prompt}]}
        return f"{self.url}/completions", body | {"prompt": list(job.prompt)}

    async def send(self, job: Job) -> Record:
        """Send a job and read the answer to its end. Never raises for what a server does: see ``Record.error``."""
        address, body = self.request(job)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        record = Record(job, time.perf_counter())
        try:
            async with self.http.stream("POST", address, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    record.error = f"HTTP {response.status_code}"
                else:
                    await self._read(response, record)
        except httpx.TimeoutException:
            record.error = "timeout"
        except (httpx.HTTPError, ValueError) as error:
            record.error = type(error).__name__
        record.until = time.perf_counter()
        return record

    async def _read(self, response: httpx.Response, record: Record) -> None:
        ended = False
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip()
            if data == line.strip() or not data:
                continue
            if data == "[DONE]":
                ended = True
                continue
            note(json.loads(data), time.perf_counter(), record)
        record.num_tokens = record.num_tokens or len(record.times)
        if record.error is None and not ended:
            record.error = "cut off"
        if record.error is None and not record.times:
            record.error = "empty"

    async def measure(self, model: str) -> Measure:
        """How this server counts words, from two prompts of all ``WORDS``; as one token a word where it tells no usage.

        Raises ``httpx.HTTPError`` where it refuses them.
        """
        counts = []
        for times in (1, 5):
            address, body = self.request(Job(model, " ".join(WORDS * times), 1))
            response = await self.http.post(address, json=body)
            response.raise_for_status()
            if not (usage := response.json().get("usage")):
                return Measure()
            counts.append(usage["prompt_tokens"])
        per_word = (counts[1] - counts[0]) / (4 * len(WORDS))
        return Measure(per_word, counts[0] - len(WORDS) * per_word)

    async def models(self) -> list[str]:
        """The names that the server lists. Raises ``httpx.HTTPError``."""
        response = await self.http.get(f"{self.url}/models")
        response.raise_for_status()
        return [model["id"] for model in response.json()["data"]]


def note(event: dict[str, Any], now: float, record: Record) -> None:
    """Put one event of a stream into a record: text of either endpoint or of a reasoning model, usage, or an error."""
    if event.get("error"):
        record.error = "error in the stream"
    if usage := event.get("usage"):
        record.num_tokens = usage.get("completion_tokens", 0)
        record.num_prompt_tokens = usage.get("prompt_tokens", 0)
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
            record.times.append(now)
