"""200 connections ask everything at once, leave when they like and send nonsense, while adapters come, change and go.

``QUICKCHANGE_SOAK_MINUTES`` is how long; ``make soak`` takes 20.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx

from server.api.auth.keys import digest_of
from tests.full.soak_client import Connected, Received, probe
from tests.full.soak_jobs import CANARY, JOBS, MALFORMED, Job, essence, is_complete, is_same
from tests.serving import ROOT, ServerProcess, running_server, vary

MINUTES = float(os.environ.get("QUICKCHANGE_SOAK_MINUTES", "5"))
NUM_CONNECTIONS = 200
DEMOS = ("tolstoy", "dostoevsky", "shakespeare")
CONTENTS = tuple(f"content-{number}" for number in range(6))
MOVING = tuple(f"moving-{number}" for number in range(4))
KEYS = tuple(f"{CANARY}-key-{number}-0123456789abcdef" for number in range(2))
WRONG_KEY = f"{CANARY}-wrong-0123456789abcdef"
MAX_PROBE_SECONDS = 0.1
MAX_MEMORY = 1.2
"""Of what the process had after the first minute under load."""
SETTLE_SECONDS = 60.0
NUM_SPARE_THREADS = 6
"""Threads by which asyncio's pool may still grow."""


@dataclass
class Findings:
    """What the clients counted, and what was wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


Golden = dict[tuple[str, str], Any]
"""What a version, by the digits that a header shows, answers to a job; without a header, no digits."""


class Client:
    """One connection after another: whole answers, answers that are left, and bodies that are refused."""

    def __init__(self, port: int, golden: Golden, found: Findings, seed: int) -> None:
        self._connected, self._golden, self._found = Connected(port), golden, found
        self._rng = random.Random(seed)
        self._headers = {"authorization": f"Bearer {KEYS[seed % len(KEYS)]}", "x-note": CANARY}

    async def run(self, until: float) -> None:
        ways = {self._ask: 70, self._leave: 20, self._send_malformed: 8, self._send_wrong_key: 2}
        while time.monotonic() < until:
            way = self._rng.choices(list(ways), list(ways.values()))[0]
            try:
                await way()
            except (OSError, EOFError, ValueError) as error:
                self._found.wrong.append(f"{way.__name__}: {error!r}")
                self._connected.leave()
        self._connected.leave()
        await asyncio.sleep(0)

    async def _ask(self) -> None:
        job, model = self._rng.choice(JOBS), self._rng.choice(CONTENTS + MOVING)
        await self._connected.send(job.path, job.body(model), self._headers)
        if self._rng.random() < 0.05:
            await asyncio.sleep(self._rng.uniform(1, 5))  # a slow reader
        received = await self._connected.receive()
        self._found.counts[f"{received.status}"] += 1
        if received.status == 200:
            self._compare(job, received)
        else:
            self._check_error(job.name, received, (404, 429, 503) if model in MOVING else (429, 503))

    def _compare(self, job: Job, received: Received) -> None:
        digest = digest_in(received)
        if not is_complete(received.content_type, received.content):
            self._found.wrong.append(f"{job.name}: the stream has no end: {received.content[-300:]!r}")
            return
        got, wanted = essence(received.content_type, received.content), self._golden.get((digest, job.name))
        if not is_same(got, wanted):
            self._found.wrong.append(f"{job.name} of {digest}: {str(got)[:700]}, not {str(wanted)[:700]}")

    async def _leave(self) -> None:
        """Go away in the middle of the body, before the answer, somewhere in the queue, or in the middle of it."""
        job, model = self._rng.choice(JOBS), self._rng.choice(CONTENTS + MOVING)
        place = self._rng.choice(("in the body", "at once", "later", "in the answer"))
        part = 0.5 if place == "in the body" else 1.0
        await self._connected.send(job.path, job.body(model), self._headers, part=part)
        if place == "later":
            await asyncio.sleep(self._rng.uniform(0, 1.0))
        elif place == "in the answer":
            await self._connected.receive_beginning()
        self._connected.leave()
        self._found.counts[f"left {place}"] += 1

    async def _send_malformed(self) -> None:
        name = self._rng.choice(list(MALFORMED))
        path, body, statuses = MALFORMED[name]
        await self._connected.send(path, body, self._headers)
        received = await self._connected.receive()
        self._found.counts["malformed"] += 1
        self._check_error(name, received, (*statuses, 429, 503))

    async def _send_wrong_key(self) -> None:
        job = self._rng.choice(JOBS)
        await self._connected.send(job.path, job.body("micro"), {"authorization": f"Bearer {WRONG_KEY}"})
        received = await self._connected.receive()
        self._found.counts["wrong key"] += 1
        self._check_error("wrong key", received, (401, 429))

    def _check_error(self, name: str, received: Received, statuses: Sequence[int]) -> None:
        is_stated = received.status in statuses and "error" in json.loads(received.content)
        if not is_stated or (received.status in (429, 503) and "retry-after" not in received.headers):
            self._found.wrong.append(f"{name}: {received.status} {received.content[:500]!r}")
        if CANARY.encode() in received.content:
            self._found.wrong.append(f"{name}: an error repeats what was sent: {received.content[:500]!r}")


def digest_in(received: Received) -> str:
    return received.headers.get("x-quickchange-adapter", "").partition("@")[2]


async def golden_answers(port: int) -> Golden:
    """Every job of every content, one after another."""
    golden: Golden = {}
    connected = Connected(port)
    for model in CONTENTS:
        for job in JOBS:
            await connected.send(job.path, job.body(model), {"authorization": f"Bearer {KEYS[0]}"})
            received = await connected.receive()
            assert received.status == 200, (job.name, received)
            assert is_complete(received.content_type, received.content), (job.name, received)
            key = digest_in(received), job.name
            said = essence(received.content_type, received.content)
            assert is_same(golden.setdefault(key, said), said), (key, str(said)[:500], str(golden[key])[:500])
    connected.leave()
    await asyncio.sleep(0)
    return golden


async def load(port: int, golden: Golden, found: Findings, seconds: float) -> None:
    until = time.monotonic() + seconds
    await asyncio.gather(*(Client(port, golden, found, seed).run(until) for seed in range(NUM_CONNECTIONS)))


@contextmanager
def moving_adapters(contents: Path, folder: Path) -> Iterator[None]:
    """A thread that gives the moving names other contents, or none."""
    over = threading.Event()

    def move() -> None:
        rng = random.Random(0)
        while not over.wait(1.0):
            target = folder / rng.choice(MOVING)
            shutil.rmtree(target, ignore_errors=True)
            if rng.random() < 0.7:
                shutil.copytree(contents / rng.choice(CONTENTS), contents / "next")
                (contents / "next").rename(target)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for name in MOVING:
            shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def probes(port: int, times: list[float]) -> Iterator[None]:
    """Ask the probes all the while; ``times`` are filled at the end."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=probe, args=(port, there))
    process.start()
    try:
        yield
        here.send("stop")
        times += here.recv()
    finally:
        process.kill()
        process.join()


@contextmanager
def trace_collector(bodies: list[bytes]) -> Iterator[str]:
    """The URL of an OpenTelemetry collector that only keeps what it is sent."""

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def soaked_server(root: Path, collector: str) -> Iterator[ServerProcess]:
    keys, folder = root / "keys.toml", root / "adapters"
    entries = (f'[client{number}]\nsha256 = "{digest_of(key).hex()}"\n' for number, key in enumerate(KEYS))
    keys.write_text("".join(entries).replace("[client0]", '[client0]\nscopes = ["admin"]'))
    keys.chmod(0o600)
    for number, name in enumerate(CONTENTS):
        demo = ROOT / "adapters" / DEMOS[number % len(DEMOS)]
        vary(demo, root / "contents" / name, factor=0.8 + number / 10, rank=(8, 12, 16)[number % 3], seed=number)
        shutil.copytree(root / "contents" / name, folder / name)
    with running_server(
        "--adapters-dir", str(folder), "--no-demo-adapters", "--api-keys", str(keys), "--scan-interval", "0.2",
        "--state-dir", str(root / "state"), "--keep-versions", "2", "--log-level", "debug",
        "--otlp-endpoint", collector,
    ) as server:  # fmt: skip
        server.key = KEYS[0]
        yield server


def check_rest(server: ServerProcess) -> None:
    """Nothing runs, waits or is leased."""
    for gauge in ("sequences_queued", "sequences_running", "kv_slots_used"):
        server.until(gauge, lambda gauge=gauge: server.metric(f"quickchange_{gauge}") == 0)
    server.until("moved adapters are gone", lambda: set(server.models()) == {"micro", *CONTENTS})
    with httpx.Client(base_url=server.url, headers=server.headers) as client:
        leases = {name: client.get(f"/v1/models/{name}").json()["leases"] for name in CONTENTS}
    assert set(leases.values()) == {0}, leases


def test_nothing_is_lost_leaked_or_wrong_under_load(tmp_path: Path) -> None:
    found = Findings()
    times: list[float] = []
    traces: list[bytes] = []
    with trace_collector(traces) as collector, soaked_server(tmp_path, collector) as server:
        port = int(server.url.rpartition(":")[2])
        golden = asyncio.run(golden_answers(port))
        assert len(set(map(str, golden.values()))) > len(golden) / 2, "contents that answer the same prove nothing"
        asyncio.run(load(port, golden, found, min(60.0, 12.0 * MINUTES)))
        check_rest(server)
        before, series = server.usage(), server.series()
        asyncio.run(golden_answers(port))  # starts the worker processes again that a limit has ended
        num_files = server.usage().files
        with probes(port, times), moving_adapters(tmp_path / "contents", tmp_path / "adapters"):
            asyncio.run(load(port, golden, found, 60.0 * MINUTES))
        check_rest(server)
        full = server.usage()
        time.sleep(SETTLE_SECONDS)
        after, metrics = server.usage(), server.get("/metrics").text
        asyncio.run(golden_answers(port))
        num_files_after = server.usage().files
        p99 = quantiles(times, n=100)[98]
        print(f"\n{dict(sorted(found.counts.items()))}\nprobes: {len(times)}, p99 {1000 * p99:.0f} ms, "
              f"longest {1000 * max(times):.0f} ms\nbefore: {before}\nfull: {full}\nafter: {after}")  # fmt: skip
        leaks = [line for line in (*server.log, *metrics.splitlines()) if CANARY in line]
        leaks += [str(body) for body in traces if CANARY.encode() in body]
        tracebacks = [line for line in server.log if "Traceback" in line or " ERROR " in line]
        new = {each for each in server.series() - series if "http_errors" not in each}
    assert not found.wrong, "\n".join(sorted(found.wrong)[:50])
    assert b"gen_ai.usage.output_tokens" in b"".join(traces)
    assert not leaks, leaks[:5]
    assert not tracebacks, tracebacks[:5]
    assert found.counts["200"] > 10 * 60 * MINUTES
    assert not new, new
    assert num_files_after <= num_files
    assert after.threads <= before.threads + NUM_SPARE_THREADS
    assert after.rss < MAX_MEMORY * before.rss
    assert p99 < MAX_PROBE_SECONDS
