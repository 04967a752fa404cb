"""The logic of the benchmarks that is not timing: what is asked, how events are counted, what figures come to."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from base_files.locate import find_base
from benchmarks import prefix_ttft
from benchmarks.parts.figures import percentile, spread, table
from benchmarks.parts.jobs import WORDS, Job, Measure, Mix, Span, Workload
from benchmarks.parts.load_report import as_table, summary
from benchmarks.parts.loops import Budget, closed_loop, open_loop
from benchmarks.parts.pairs import alternate
from benchmarks.parts.random_adapters import write_adapters
from benchmarks.parts.raw_client import EventCounter
from benchmarks.parts.requests import Client, Record
from benchmarks.parts.step_timers import Stack


def workload(**changes: object) -> Workload:
    return Workload(Mix(["a", "b"]), Span(20, 40), Span(5, 5), **changes)  # type: ignore[arg-type]


def first(jobs: Workload, count: int = 200) -> list[Job]:
    return list(itertools.islice(jobs.jobs(), count))


def test_percentiles_lie_between_samples() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([1.0, 2.0], 75) == 1.75
    assert percentile([5.0], 99) == 5.0
    assert math.isnan(percentile([], 50))
    assert spread([float(number) for number in range(101)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}


def test_a_table_is_as_wide_as_its_cells() -> None:
    lines = table(("name", "ms"), [("a", 1234.5), ("longer", math.nan), ("c", 0.01234)]).splitlines()
    assert lines == ["name        ms", "--------------", "a         1234", "longer       -", "c       0.0123"]


def test_pairs_alternate_who_begins_and_divide_neighbours() -> None:
    order: list[str] = []

    def side(name: str, values: list[float]) -> float:
        order.append(name)
        return values.pop(0)

    left, right = [10.0, 20.0, 30.0], [5.0, 5.0, 10.0]
    pairs = alternate(("x", "y"), (lambda: side("x", left), lambda: side("y", right)), num_pairs=3, unit="u")
    assert "".join(order) == "xyyxxy"
    assert pairs.ratios == [2.0, 4.0, 3.0]
    assert pairs.as_json()["median_ratio"] == 3.0


def test_zipf_gives_the_second_name_half_of_the_first_ones_share() -> None:
    mix, rng = Mix([str(number) for number in range(64)], 1.0), random.Random(0)
    assert mix.share(0) / mix.share(1) == pytest.approx(2)
    assert mix.share(0) / mix.share(63) == pytest.approx(64)
    drawn = Counter(mix.draw(rng) for _ in range(20_000))
    assert math.isclose(drawn["0"] / 20_000, mix.share(0), rel_tol=0.1)
    assert Mix(["a", "b", "c", "d"]).share(3) == pytest.approx(0.25)


@pytest.mark.parametrize("text", ["", "0", "9-3", "many"])
def test_a_length_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"length|invalid literal"):
        Span.parse(text)


def test_the_same_seed_gives_the_same_jobs_and_another_seed_others() -> None:
    assert first(workload(seed=1)) == first(workload(seed=1)) != first(workload(seed=2))


def test_token_ids_are_exactly_as_many_as_asked_and_begin_alike() -> None:
    jobs = first(workload(vocab_size=1000, shared_prefix=20))
    assert {len(job.prompt) for job in jobs} == set(range(20, 41))
    assert len({job.prompt[:20] for job in jobs}) == 1
    assert all(isinstance(job.prompt, tuple) and min(job.prompt) >= 62 and max(job.prompt) < 938 for job in jobs)


def test_words_are_fitted_to_the_servers_count() -> None:
    jobs = first(workload(measure=Measure(per_word=1.25, overhead=10.0)))
    assert {len(str(job.prompt).split()) for job in jobs} == {round((n - 10) / 1.25) for n in range(20, 41)}


def test_arrivals_come_at_the_rate_that_is_asked() -> None:
    assert first(workload(rate=4.0), 4000)[-1].at == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_events_are_counted_wherever_their_bytes_are_cut(size: int) -> None:
    events = [b'data: {"text":"data: no event\\ndata:"}\n\n'] * 5
    events += [b'data: {"usage":{"prompt_tokens":9,"completion_tokens":5}}\n\n', b"data: [DONE]\n\n"]
    body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"
    whole = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body
    counter = EventCounter()
    for at in range(0, len(whole), size):
        assert not counter.ended
        counter.feed(whole[at : at + size])
    assert (counter.num_events, counter.num_tokens, counter.ended, counter.done) == (7, 5, True, True)


def test_figures_count_tokens_within_the_time_and_errors_by_kind() -> None:
    job = Job("a", "words", 4)
    within = Record(job, 0.0, [1.0, 2.0, 3.0, 4.0], until=4.0, num_tokens=4)
    beyond = Record(job, 3.0, [4.0, 6.0], until=6.0, num_tokens=4)
    figures = summary([within, beyond, Record(job, 0.0, error="HTTP 503")], 0.0, 5.0)
    assert figures["output_tokens_per_s"] == (4 + 2) / 5
    assert figures["requests_per_s"] == 1 / 5
    assert figures["errors"] == {"HTTP 503": 1}
    assert figures["ttft_ms"]["max"] == 1000.0
    assert "HTTP 503: 1" in as_table(figures)


async def test_a_closed_loop_keeps_its_clients_busy_and_an_open_one_does_not_wait() -> None:
    flying: list[int] = []
    most: list[int] = []

    async def send(job: Job) -> Record:
        flying.append(1)
        most.append(len(flying))
        await asyncio.sleep(0)
        flying.pop()
        return Record(job, job.at)

    closed = await closed_loop(send, Budget(workload().jobs(), num_requests=10, seconds=None), 3)
    assert (len(closed), max(most)) == (10, 3)
    opened = await open_loop(send, Budget(workload(rate=5000.0).jobs(), num_requests=10, seconds=None))
    assert [record.since for record in opened] == [job.at for job in first(workload(rate=5000.0), 10)]


def answering(*events: object, status: int = 200) -> Client:
    """A client whose server sends these events."""
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
    client = Client("http://server/")
    client.http = httpx.AsyncClient(
        transport=httpx.MockTransport(lambda request: httpx.Response(status, text="".join(lines)))
    )
    return client


TEXT = {"choices": [{"delta": {"content": "x"}}]}


@pytest.mark.parametrize(
    ("events", "status", "tokens", "error"),
    [
        ([{"choices": [{"delta": {"role": "assistant", "content": ""}}]}, TEXT, TEXT, "[DONE]"], 200, 2, None),
        ([TEXT, {"choices": [], "usage": {"completion_tokens": 7, "prompt_tokens": 3}}, "[DONE]"], 200, 7, None),
        ([{"choices": [{"text": "x"}]}, "[DONE]"], 200, 1, None),
        ([TEXT, {"error": {"message": "no"}}], 200, 1, "error in the stream"),
        ([TEXT], 200, 1, "cut off"),
        (["[DONE]"], 200, 0, "empty"),
        ([], 503, 0, "HTTP 503"),
        (["{"], 200, 0, "JSONDecodeError"),
    ],
)
async def test_every_end_of_a_stream_has_its_kind(
    events: list[object], status: int, tokens: int, error: str | None
) -> None:
    record = await answering(*events, status=status).send(Job("a", " ".join(WORDS), 8))
    assert (record.num_tokens, record.error) == (tokens, error)


def test_random_adapters_are_the_same_for_a_seed_and_another_for_each_name(tmp_path: Path) -> None:
    base = find_base("micro")
    one, other = write_adapters(base, tmp_path / "first", ["x", "y"], rank=2)
    again = write_adapters(base, tmp_path / "second", ["x", "y"], rank=2)[0]
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (again / name).read_bytes() != (other / name).read_bytes()
    shapes = {tensor.shape[0 if "lora_A" in key else 1] for key, tensor in load_file(one / name).items()}
    assert shapes == {2}
    with pytest.raises(ValueError, match="no module"):
        write_adapters(base, tmp_path, ["z"], targets=["absent"])


def test_a_timer_keeps_only_what_was_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.parts.step_timers.clock", itertools.count().__next__)
    stack = Stack()
    inner = stack.around("inner", lambda: None)
    stack.around("outer", lambda: (inner(), inner()))()
    assert stack.own == {"outer": 3, "inner": 2}


@pytest.mark.parametrize(("base", "sentence"), [("nowhere", "no such folder or file"), ("cut.gguf", "truncated")])
def test_a_base_that_cannot_be_read_is_one_line_of_the_command(
    base: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(SystemExit) as ended:
        prefix_ttft.parse(["--base", base])
    assert ended.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "error: argument --base: " in message and sentence in message
