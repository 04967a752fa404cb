"""Connections that send nothing, or too slowly, or are too many, against uvicorn's server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fastapi import FastAPI

from server.api.app import create_app
from server.cli import http_protocol
from server.cli.http_protocol import ContractH11Protocol
from tests.fakes import BASE, FakeEngine, Script, server_state

pytestmark = pytest.mark.usefixtures("short_times")


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.2)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """None: they are pytest's."""
        yield


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with serving(create_app(server_state(FakeEngine()))) as port:
        yield port


@contextlib.asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[int]:
    """An app on a port of the loopback interface."""
    config = uvicorn.Config(app, http=ContractH11Protocol, ws="none", lifespan="off", log_config=None)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield bound.getsockname()[1]
        server.should_exit = True
        await task


async def until_closed(reader: asyncio.StreamReader, seconds: float = 2.0) -> bytes:
    async with asyncio.timeout(seconds):
        return await reader.read()


async def seconds_until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> float:
    """How long the server takes data that comes byte by byte."""
    loop = asyncio.get_running_loop()
    since, rest = loop.time(), asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
            if rest.done():
                break
    await asyncio.gather(rest, return_exceptions=True)
    writer.close()
    return loop.time() - since


async def test_a_silent_connection_is_closed(port: int) -> None:
    """Such connections were kept for ever."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await until_closed(reader) == b""
    writer.close()


@pytest.mark.parametrize("requests_before", [0, 1])
async def test_headers_that_come_byte_by_byte_end_the_connection(port: int, requests_before: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(requests_before):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b'"ok"' in await reader.readuntil(b"}")
    data = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100
    assert await seconds_until_closed(reader, writer, data) < 1.5


async def test_the_body_of_a_refused_request_does_not_keep_its_connection(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n")
    assert b"415" in await reader.readline()
    assert await seconds_until_closed(reader, writer, b"x" * 200) < 1.5


async def test_connections_above_the_limit_get_a_503_and_one_log_line(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the limit of open files there were 18,000 tracebacks."""
    monkeypatch.setattr(http_protocol, "max_connections", lambda: 2)
    monkeypatch.setattr(http_protocol, "_refused", http_protocol._RefusedConnections())
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 5.0)
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    await asyncio.sleep(0.05)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head, _, body = (await until_closed(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503") and b"retry-after" in head
            assert json.loads(body)["error"]["code"] == "server_overloaded"
            writer.close()
    assert len([record for record in caplog.records if "connections refused" in record.message]) == 1
    for _, writer in opened:
        writer.close()
    await asyncio.sleep(0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert b"200" in await reader.readline()
    writer.close()


async def test_a_client_that_does_not_read_is_cut_off_and_ends_its_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request was kept until the client ended, with its lease and all of the answer."""
    monkeypatch.setattr(http_protocol, "WRITE_SECONDS", 0.2)
    engine = FakeEngine([Script("x" * 20_000, then="hang")])
    body = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 30_000}
    async with serving(create_app(server_state(engine))) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            content = json.dumps(body).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            async with asyncio.timeout(10):
                while not engine.num_hanging:
                    await asyncio.sleep(0.01)
                while engine.num_open:
                    await asyncio.sleep(0.01)


def test_there_are_fewer_connections_than_open_files_allow() -> None:
    assert 1 <= http_protocol.max_connections() <= http_protocol.MOST_CONNECTIONS
