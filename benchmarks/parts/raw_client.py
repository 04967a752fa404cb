"""The cheapest client of a stream that there is: it counts events and parses nothing, so that it takes little CPU."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_MARK = b"\ndata:"


class EventCounter:
    """Counts the lines of a response that begin with ``data:``, wherever its bytes are cut.

    JSON has no bare line feed, and both the header and a chunk's size end in one, so the bytes tell without parsing.
    """

    def __init__(self) -> None:
        self.num_events = 0
        self._end = b""  # what may be the beginning of a mark, or of what the last bytes have to tell

    def feed(self, data: bytes) -> None:
        kept = self._end[-(len(_MARK) - 1) :]
        self.num_events += (kept + data).count(_MARK)
        self._end = (self._end + data)[-1024:]

    @property
    def ended(self) -> bool:
        """Whether the response is whole: the last chunk, of length 0, has come."""
        return self._end.endswith(b"\r\n0\r\n\r\n")

    @property
    def num_tokens(self) -> int | None:
        """The completion's tokens by the server's usage, which is among the last bytes."""
        found = _USAGE.findall(self._end)
        return int(found[-1]) if found else None

    @property
    def done(self) -> bool:
        return b"data: [DONE]" in self._end


class RawConnection(asyncio.Protocol):
    """One kept-alive connection to a server that answers in chunks."""

    def __init__(self) -> None:
        self._counter = EventCounter()
        self._answered: asyncio.Future[EventCounter] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._counter.feed(data)
        if self._counter.ended and self._answered is not None and not self._answered.done():
            self._answered.set_result(self._counter)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionResetError("the server closed the connection in mid-answer"))

    async def send(self, request: bytes) -> EventCounter:
        """Send one request and wait for the end of the answer. Raises ``ConnectionResetError``."""
        assert self._transport is not None
        self._counter = EventCounter()
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def http_request(url: str, body: Mapping[str, Any]) -> bytes:
    """A POST with JSON as it goes over the wire."""
    parts, content = urlsplit(url), json.dumps(body).encode()
    head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


async def closed_loop(url: str, requests: list[bytes], num_clients: int) -> int:
    """Output tokens of all requests, ``num_clients`` at a time. Raises ``RuntimeError`` where one is not completed."""
    parts, waiting, tokens = urlsplit(url), iter(requests), 0
    loop = asyncio.get_running_loop()

    async def client() -> None:
        nonlocal tokens
        _, connection = await loop.create_connection(RawConnection, parts.hostname or "localhost", parts.port or 80)
        for request in waiting:
            answer = await connection.send(request)
            if not answer.done or answer.num_tokens is None:
                raise RuntimeError("a stream ended without usage and [DONE]")
            tokens += answer.num_tokens
        connection.close()

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return tokens
