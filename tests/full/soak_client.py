"""A client of the soak, which leaves its connection whenever it likes, and a process that asks the probes."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class Received:
    """An answer; ``headers`` have names in lower case."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")


class Connected:
    """A connection that is opened when it is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, path: str, body: bytes, headers: dict[str, str], *, part: float = 1.0) -> None:
        """Send a request, or the first ``part`` of its body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
        lines += [f"content-length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items())]
        writer = self._streams[1]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body[: int(part * len(body))])
        await writer.drain()

    async def receive(self) -> Received:
        """The whole answer."""
        async with asyncio.timeout(ANSWER_SECONDS):
            status, headers = await self._head()
            if headers.get("transfer-encoding") == "chunked":
                content = b"".join([chunk async for chunk in self._chunks()])
            else:
                content = await self._reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.leave()
        return Received(status, headers, content)

    async def receive_beginning(self) -> None:
        """The head of the answer, and what comes with it."""
        async with asyncio.timeout(ANSWER_SECONDS):
            await self._head()
            await self._reader.read(100)

    def leave(self) -> None:
        """Close the connection, in the middle of whatever it is."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    @property
    def _reader(self) -> asyncio.StreamReader:
        assert self._streams is not None
        return self._streams[0]

    async def _head(self) -> tuple[int, dict[str, str]]:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split()[1]), headers

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)


def probe(port: int, pipe: Connection) -> None:
    """In a process of its own: ask ``/livez`` and ``/readyz`` until the pipe says stop; send the times of all."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    times: list[float] = []
    while not pipe.poll(0.1):
        for path in ("/livez", "/readyz"):
            start = time.perf_counter()
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            times.append(time.perf_counter() - start)
            assert response.status == 200, (path, response.status)
    pipe.send(times)
