"""Clients stream from twelve adapters while another process does to their folders whatever can be done to a folder.

Every answer must be, word for word, that of exactly the version which its header names.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
import pytest

from server.adapters.versions import Pin, VersionStore
from tests.full.fault_injection import (
    GRACE,
    KEEP,
    KEY,
    NAMES,
    NUM_CONTENTS,
    SETTLE,
    WEIGHTS,
    Note,
    inject_faults,
    may_be_missing,
)
from tests.serving import ROOT, ServerProcess, Usage, running_server, vary

STEADY = "steady"
DEMOS = ("tolstoy", "dostoevsky", "shakespeare")
PROMPTS = {"Write about a house by the river.": 24, "Once upon a time,": 32, "Tell me about Peter and his brother.": 40}
"""What is asked, and how many tokens may be answered."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "Once upon a time,": {"temperature": 0.8, "top_p": 0.9, "seed": 5},
    "Tell me about Peter and his brother.": {"temperature": 1, "seed": 6, "frequency_penalty": 0.3, "min_tokens": 20},
}
"""How prompts are answered that are not answered greedily; always by the same seed."""
STORY, STEADY_TOKENS = "Tell me a story.", 150
TOPICS = ("horses", "war", "the moon", "Petersburg", "old age", "money", "love", "a journey", "bread", "winter")
NUM_CLIENTS = 8
MAX_RSS_GROWTH = 60_000_000
POOL = 6
"""Threads that asyncio's own pool may still grow by."""
MAX_STALL = 2.0
"""Seconds: generous, because the machine may be busy with other things."""


def make_contents(folder: Path) -> None:
    """Contents that answer differently: other deltas, ranks, system prompts and stop strings."""
    rng = random.Random(0)
    for number in range(NUM_CONTENTS):
        defaults: dict[str, Any] = {"system_prompt": f"Speak of {rng.choice(TOPICS)}."} if number % 3 else {}
        defaults |= {"stop": [rng.choice(["\n", ",", " the"])]} if number % 5 == 0 else {}
        factor, rank = rng.uniform(0.8, 1.8), rng.choice((8, 12, 16))
        demo = ROOT / "adapters" / DEMOS[number % len(DEMOS)]
        vary(demo, folder / f"content-{number}", factor=factor, rank=rank, seed=number, **defaults)


@dataclass
class Answer:
    """One streamed answer: ``adapter`` is the header, ``broken`` says how the stream ended if not as it should.

    ``gaps`` are the seconds between its pieces of text; times are of ``time.time``.
    """

    model: str
    prompt: str
    asked: float
    status: int = 0
    adapter: str = ""
    text: str = ""
    finish: str | None = None
    broken: str | None = None
    gaps: list[float] = field(default_factory=list)
    ended: float = 0.0

    @property
    def said(self) -> tuple[str, str | None]:
        """What is compared."""
        return self.text, self.finish


def ask(client: httpx.Client, model: str, prompt: str, max_tokens: int) -> Answer:
    """Stream an answer, greedily or by a fixed seed."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "stream": True}
    body |= SETTINGS.get(prompt, {})
    answer = Answer(model, prompt, time.time())
    try:
        with client.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": max_tokens}) as response:
            answer.status, answer.adapter = response.status_code, response.headers.get("x-quickchange-adapter", "")
            if response.status_code == 200:
                _read(answer, response.iter_lines())
            else:
                answer.text = response.read().decode()
    except httpx.HTTPError as error:
        answer.broken = repr(error)
    answer.ended = time.time()
    return answer


def _read(answer: Answer, lines: Iterator[str]) -> None:
    answer.broken, since = "it ended without [DONE]", 0.0
    for line in lines:
        if line == "data: [DONE]":
            answer.broken = None
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                answer.broken = line
                return
            choice, now = event["choices"][0], time.perf_counter()
            answer.finish = choice["finish_reason"]
            if text := choice["delta"].get("content"):
                answer.text += text
                answer.gaps += [now - since] if since else []
                since = now


Golden = Mapping[tuple[str, str], tuple[str, str | None]]
"""What a version, by the digits that a header shows, says to a prompt."""


@dataclass(frozen=True)
class Quiet:
    """A server on which nothing ever changes, with every content under a name of its own."""

    server: ServerProcess
    names: Mapping[str, str]
    golden: Golden

    @classmethod
    def of(cls, server: ServerProcess) -> Quiet:
        """Ask it everything, in three different companies: an answer that depends on the company is a near-tie."""
        server.until("all contents are hashed", lambda: all(_digests(server).values()))
        digests = {name: digest[:12] for name, digest in _digests(server).items()}
        jobs = [(name, prompt) for name in digests for prompt in PROMPTS]
        rounds = []
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for seed, company in enumerate((1, 5, NUM_CLIENTS)):
                random.Random(seed).shuffle(jobs)
                with ThreadPoolExecutor(company) as pool:
                    answers = list(pool.map(lambda job: ask(client, job[0], job[1], PROMPTS[job[1]]), jobs))
                assert all(answer.status == 200 and not answer.broken for answer in answers)
                rounds.append({(digests[answer.model], answer.prompt): answer.said for answer in answers})
        assert rounds[0] == rounds[1] == rounds[2], "near-ties: choose other prompts or contents"
        said = {name: tuple(rounds[0][digest, prompt] for prompt in PROMPTS) for name, digest in digests.items()}
        assert len(set(said.values())) == NUM_CONTENTS, "contents that say the same prove nothing"
        return cls(server, {digest: name for name, digest in digests.items()}, rounds[0])

    def composed(self, label: str, prompt: str) -> tuple[str, str | None] | None:
        """What the versions of a composition's label say together; None where both are the same content."""
        parts = [part.partition("@")[2].split(":") for part in label.split("+")]
        names = [self.names[digest] for digest, *_ in parts]
        if len(set(names)) < len(names):
            return None
        model = "+".join(f"{name}:{part[1]}" for name, part in zip(names, parts, strict=True))
        with httpx.Client(base_url=self.server.url, timeout=120) as client:
            answer = ask(client, model, prompt, PROMPTS[prompt])
        assert answer.status == 200, answer
        return answer.said


def _digests(server: ServerProcess) -> dict[str, str]:
    """The current digest of every adapter, empty where it is still to be hashed."""
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    return {one["id"]: one["digest"] or "" for one in listed if one["parent"]}


class Clients:
    """Threads that ask until they are stopped; ``answers`` are of all of them."""

    def __init__(self, url: str, choose: Callable[[random.Random, Sequence[Answer]], str]) -> None:
        self.answers: list[Answer] = []
        self.steady: list[Answer] = []
        self._url, self._choose, self._over = url, choose, threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(seed,)) for seed in range(NUM_CLIENTS)]
        self._threads.append(threading.Thread(target=self._stream_steadily))

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def gaps(self) -> list[float]:
        """Between the tokens of the one that streams from the adapter that nobody touches."""
        return [gap for answer in self.steady for gap in answer.gaps]

    def _stream(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._over.is_set():
                prompt = rng.choice(list(PROMPTS))
                self.answers.append(ask(client, self._choose(rng, self.answers), prompt, PROMPTS[prompt]))

    def _stream_steadily(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._over.is_set():
                self.steady.append(ask(client, STEADY, STORY, STEADY_TOKENS))


def any_model(rng: random.Random, answers: Sequence[Answer]) -> str:
    """A name, now and then a version that was seen, or two names together."""
    draw = rng.random()
    seen = [answer.adapter for answer in answers[-50:] if answer.adapter]
    if draw < 0.1 and seen:
        return rng.choice(seen)
    if draw < 0.2:
        return "{}:0.7+{}:0.3".format(*rng.sample(NAMES, 2))
    return rng.choice(NAMES)


@contextmanager
def storm_server(root: Path) -> Iterator[ServerProcess]:
    """A server with room for the steady adapter and three of the largest contents."""
    folder, state = root / "adapters", root / "state"
    steady = vary(ROOT / "adapters" / "tolstoy", folder / STEADY, rank=8)
    VersionStore(state, keep=KEEP).set_pin(STEADY, Pin(resident=True))
    sizes = [path.stat().st_size for path in (root / "contents").glob(f"*/{WEIGHTS}")]
    memory = (steady / WEIGHTS).stat().st_size + 3 * max(sizes)
    with running_server(
        "--adapters-dir", str(folder), "--no-demo-adapters", "--state-dir", str(state), "--keep-versions", str(KEEP),
        "--adapter-memory", str(memory), "--scan-interval", str(SETTLE), "--removal-grace", str(GRACE),
        "--admin-key", KEY,
    ) as server:  # fmt: skip
        yield server


def check_answers(answers: Sequence[Answer], quiet: Quiet, notes: Sequence[Note]) -> Counter[str]:
    """Every answer is right, or a 404 of a name whose folder was away; how many there were of each kind."""
    kinds: Counter[str] = Counter()
    composed: dict[tuple[str, str], Any] = {}
    for answer in answers:
        assert answer.broken is None, answer
        plain, label = "+" not in answer.model, answer.adapter
        if answer.status == 404:
            named = "@" in answer.model
            parts = [part.partition(":")[0] for part in answer.model.split("+")]
            assert named or any(may_be_missing(part, answer.asked, answer.ended, notes) for part in parts), answer
            kinds["missing version" if named else "missing name"] += 1
            continue
        assert answer.status == 200, answer
        if plain:
            name, _, digest = label.partition("@")
            assert name == answer.model.partition("@")[0] and digest in quiet.names, answer
            assert answer.said == quiet.golden[digest, answer.prompt], answer
            kinds["of a version" if "@" in answer.model else "of a name"] += 1
            continue
        if (label, answer.prompt) not in composed:
            composed[label, answer.prompt] = quiet.composed(label, answer.prompt)
        expected = composed[label, answer.prompt]
        assert expected in (None, answer.said), answer
        kinds["composed"] += expected is not None
    return kinds


def stalls(clients: Clients) -> str:
    """The gaps between the tokens of the adapter that nobody touches, in milliseconds."""
    p50, p99 = (1000 * quantiles(clients.gaps, n=100)[at] for at in (49, 98))
    return f"{len(clients.gaps)} gaps, p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {1000 * max(clients.gaps):.0f} ms"


def in_trouble(server: ServerProcess, root: Path, **how: float) -> Any:
    """Let the other process do its worst; memory stays within its budget and labels are of known names all the while.

    What it noted is returned.
    """
    arguments = (root / "adapters", root / "contents", root / "state", server.url, root / "notes.json")
    process = multiprocessing.get_context("spawn").Process(target=inject_faults, args=arguments, kwargs=how)
    process.start()
    try:
        while process.is_alive():
            memory = server.metric("quickchange_adapter_memory_bytes")
            assert memory <= server.metric("quickchange_adapter_memory_limit_bytes")
            labels = {label for one in server.series() for label in re.findall(r'adapter="([^"]*)"', one)}
            assert labels <= {*NAMES, STEADY, "base", "_composition"}
            time.sleep(1)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == 0
    return json.loads((root / "notes.json").read_text())


@pytest.mark.parametrize(("seconds", "seed"), [(120, 1)])
def test_every_answer_is_that_of_the_version_it_names(tmp_path: Path, seconds: float, seed: int) -> None:
    folder, contents = tmp_path / "adapters", tmp_path / "contents"
    make_contents(contents)
    with (
        running_server("--adapters-dir", str(contents), "--no-demo-adapters") as reference,
        storm_server(tmp_path) as server,
    ):
        quiet = Quiet.of(reference)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            expected = ask(client, STEADY, STORY, STEADY_TOKENS)
        series, memory = server.series(), server.metric("quickchange_adapter_memory_bytes")
        for number, name in enumerate(NAMES[:3]):
            shutil.copytree(contents / f"content-{number}", folder / name)
        server.until("three adapters are listed", lambda: len(server.models()) == 5)
        with Clients(server.url, lambda rng, answers: rng.choice(NAMES[:3])) as calm:
            time.sleep(seconds / 6)
        time.sleep(1)  # until the server has seen that its clients are gone
        usage = server.usage()
        with Clients(server.url, any_model) as clients:
            told = in_trouble(server, tmp_path, seconds=seconds, seed=seed)
        kinds = check_answers(clients.answers, quiet, told["notes"])
        assert {answer.said for answer in (*calm.steady, *clients.steady)} == {expected.said}
        after = come_to_rest(server, quiet, told["holds"])
        print(f"\n{told['done']}\n{dict(kinds)}\nquiet: {stalls(calm)}\nstorm: {stalls(clients)}")
        print(f"before: {usage}\nafter:  {after}")
        assert after.rss - usage.rss < MAX_RSS_GROWTH
        assert after.threads <= usage.threads + POOL and after.files <= usage.files
        assert max(clients.gaps) < MAX_STALL

        for name in NAMES:
            shutil.rmtree(folder / name, ignore_errors=True)
        server.until("the adapters are gone", lambda: server.models() == ["micro", STEADY])
        assert {one for one in server.series() if "http_errors" not in one} == series
        assert server.metric("quickchange_adapter_memory_bytes") == memory


def come_to_rest(server: ServerProcess, quiet: Quiet, holds: Mapping[str, str]) -> Usage:
    """When all is quiet, the list is what the folder holds, nothing is leased, and what is left is what is used."""
    digests = {name: digest for digest, name in quiet.names.items()}
    wanted = {name: digests[content] for name, content in holds.items()}

    def listed() -> dict[str, str]:
        return {name: digest[:12] for name, digest in _digests(server).items() if name != STEADY}

    server.until("the list is what the folder holds", lambda: listed() == wanted)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for name, prompt in itertools.product(wanted, PROMPTS):
            assert ask(client, name, prompt, PROMPTS[prompt]).said == quiet.golden[wanted[name], prompt]
        leases = [client.get(f"/v1/models/{name}").json()["leases"] for name in (*wanted, STEADY)]
    assert set(leases) == {0}
    for gauge in ("sequences_queued", "sequences_running", "kv_slots_used"):
        assert server.metric(f"quickchange_{gauge}") == 0
    time.sleep(1)
    return server.usage()
