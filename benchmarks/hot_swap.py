"""Inter-token latency of running streams while other adapters are loaded and evicted, against all resident.

    python -m benchmarks.hot_swap [--streams 4] [--adapters 12] [--room 6] [--rate 8] [--seconds 15] [--pairs 5]

Two servers on the embedded base get the same requests: long streams on one adapter, and beside them, at a fixed rate,
short requests that go through the other adapters in turn. One server has room for all of them; the other has room for
``--room``, so that each of the short requests evicts an adapter and loads one. Latencies are the long streams'.
Figures are medians over pairs of rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.serving import ROOT, ServerProcess, running_server, vary

STEADY, QUESTION = "steady", "Write about a house by the river."


def make_adapters(folder: Path, count: int) -> int:
    """Make adapters of the demo ones' size, one of them for the long streams; returns the bytes of one."""
    for number, name in enumerate((STEADY, *names(count))):
        path = vary(ROOT / "adapters" / "tolstoy", folder / name, seed=number)
    return (path / "adapter_model.safetensors").stat().st_size


def names(count: int) -> list[str]:
    return [f"adapter-{number}" for number in range(count)]


def body(model: str, max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens, "stream": True}


def times_of(client: httpx.Client, request: dict[str, Any]) -> Iterator[float]:
    with client.stream("POST", "/v1/chat/completions", json=request, timeout=60) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                yield time.perf_counter()


def stream_until(over: threading.Event, url: str) -> list[float]:
    """Inter-token latencies of one long stream after another, in seconds, until ``over`` is set."""
    gaps: list[float] = []
    with httpx.Client(base_url=url) as client:
        while not over.is_set():
            times = []
            for moment in times_of(client, body(STEADY, 400)):
                times.append(moment)
                if over.is_set():
                    break
            gaps += [after - before for before, after in itertools.pairwise(times)]
    return gaps


def ask_once(client: httpx.Client, model: str) -> None:
    list(times_of(client, body(model, 4)))


def ask_in_turn(over: threading.Event, url: str, adapters: list[str], rate: float) -> None:
    """Short requests at a fixed rate, in an open loop."""
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=url) as client:
        for number in itertools.count():
            model = adapters[number % len(adapters)]
            pool.submit(ask_once, client, model)
            if over.wait(1 / rate):
                return


def round_of(server: ServerProcess, options: argparse.Namespace) -> dict[str, float]:
    """One round of one side: inter-token latency in milliseconds, and the adapters loaded in it."""
    over, loads = threading.Event(), server.metric("quickchange_adapter_load_seconds_count")
    load_seconds = server.metric("quickchange_adapter_load_seconds_sum")
    with ThreadPoolExecutor(options.streams + 1) as pool:
        streams = [pool.submit(stream_until, over, server.url) for _ in range(options.streams)]
        pool.submit(ask_in_turn, over, server.url, names(options.adapters), options.rate)
        time.sleep(options.seconds)
        over.set()
        gaps = [1000 * gap for stream in streams for gap in stream.result()]
    loads = server.metric("quickchange_adapter_load_seconds_count") - loads
    load_seconds = server.metric("quickchange_adapter_load_seconds_sum") - load_seconds
    percentiles = statistics.quantiles(gaps, n=100)
    return {
        "p50": percentiles[49],
        "p99": percentiles[98],
        "max": max(gaps),
        "gaps": len(gaps),
        "loads": loads,
        "load_ms": 1000 * load_seconds / max(1, loads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--adapters", type=int, default=12)
    parser.add_argument("--room", type=int, default=6)
    parser.add_argument("--rate", type=float, default=8.0, help="short requests in a second")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of one side of a pair")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "adapters")
        size = make_adapters(folder, options.adapters)
        flags = ("--adapters-dir", str(folder), "--no-demo-adapters", "--adapter-memory")
        with (
            running_server(*flags, str(100 * size)) as roomy,
            running_server(*flags, str((options.room + 1) * size)) as tight,
        ):
            for server in (roomy, tight):
                round_of(server, argparse.Namespace(**vars(options) | {"seconds": 3.0}))
            pairs = [(round_of(roomy, options), round_of(tight, options)) for _ in range(options.pairs)]
    print(json.dumps(vars(options) | summary(pairs), indent=1))


def summary(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Medians over the pairs, in milliseconds, and the ratio of each pair's p99."""
    ratios = [loading["p99"] / resident["p99"] for resident, loading in pairs]
    medians = {
        side: {key: round(statistics.median(pair[index][key] for pair in pairs), 1) for key in pairs[0][index]}
        for index, side in enumerate(("resident", "loading"))
    }
    return medians | {
        "median_ratio_p99": round(statistics.median(ratios), 2),
        "ratios_p99": [round(ratio, 2) for ratio in ratios],
    }


if __name__ == "__main__":
    main()
