"""A compressed body is read like any other, within the same limit, and a damaged one is a 400."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from server.api.app import create_app
from server.api.encoded_bodies import CHUNK_BYTES
from server.api.middleware import MAX_BODY_BYTES
from tests.fakes import BASE, FakeEngine, ask, server_state

ONE = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "hello"}]}).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "GZip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "identity": bytes,
}


def post(content: bytes | AsyncIterator[bytes], encoding: str) -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return ask(create_app(server_state(FakeEngine())), "POST", "/v1/chat/completions", content=content, headers=headers)


async def in_parts(data: bytes, size: int) -> AsyncIterator[bytes]:
    for first in range(0, len(data), size):
        yield data[first : first + size]


@pytest.mark.parametrize("encoding", COMPRESS)
def test_a_compressed_body_is_read(encoding: str) -> None:
    assert post(COMPRESS[encoding](ONE), encoding).status_code == 200
    assert post(in_parts(COMPRESS[encoding](ONE), 7), encoding).status_code == 200


def test_a_body_of_many_chunks_is_read_whole() -> None:
    """The last field is an error that only who reads all of it sees."""
    body = ONE[:-1] + b' , "n": 0' + b" " * (20 * CHUNK_BYTES) + b"}"
    reply = post(gzip.compress(body), "gzip")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")


def test_the_limit_counts_decompressed_bytes() -> None:
    body = ONE + b" " * MAX_BODY_BYTES
    reply = post(gzip.compress(body), "gzip")
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


def test_a_bomb_is_refused_at_the_limit() -> None:
    """A gigabyte of spaces in a megabyte: what is beyond the limit is never decompressed."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece = b" " * 2**20
    bomb = b"".join(compressor.compress(piece) for _ in range(1024)) + compressor.flush()
    since = time.perf_counter()
    reply = post(bomb, "gzip")
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    assert time.perf_counter() - since < 1


GZIPPED = gzip.compress(ONE, mtime=0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(ONE, "damaged, or not compressed", id="not compressed"),
        pytest.param(GZIPPED[:-20], "it ends early", id="cut"),
        pytest.param(GZIPPED[:5], "it ends early", id="cut in its header"),
        pytest.param(GZIPPED[:20] + b"\xff" * 40, "cannot be decompressed", id="damaged"),
        pytest.param(GZIPPED + b"more", "there is more behind its end", id="with a tail"),
        pytest.param(GZIPPED + GZIPPED, "there is more behind its end", id="twice"),
    ],
)
def test_a_damaged_body_says_so(data: bytes, reason: str) -> None:
    reply = post(data, "gzip")
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_encoding", None)
    assert reason in error["message"]


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "nonsense"])
def test_an_encoding_that_is_not_read_is_named(encoding: str) -> None:
    reply = post(ONE, encoding)
    assert (reply.status_code, reply.headers["accept-encoding"]) == (415, "gzip, deflate")
    assert reply.json()["error"]["message"] == "A compressed body must be gzip or deflate."
