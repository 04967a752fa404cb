"""The overhead of HTTP: streaming clients of a real server against the same requests given to the engine directly.

    python -m benchmarks.http_overhead [--base micro] [--clients 32] [--requests 64] [--pairs 5]

Both sides have the same base, adapters, prompts (token ids), greedy decoding and the same ends, so they compute the
same tokens. The client reads raw sockets and counts events; the CPU time that it takes from the server is printed,
since they share the machine's cores. The server idles while the engine in this process runs, and the other way round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base_files.locate import find_base
from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE
from benchmarks.parts.bases import base_argument
from benchmarks.parts.engines import Ask, InProcessEngine, in_process_engine
from benchmarks.parts.figures import median
from benchmarks.parts.pairs import alternate
from benchmarks.parts.random_adapters import write_adapters
from benchmarks.parts.raw_client import closed_loop, http_request
from cpu_kernels.cores import find_cores
from tests.serving import ServerProcess, running_server


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=base_argument, default=EMBEDDED_BASE, help=BASE_MODEL_HELP)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--quantization", default="none", help="none or int8")
    parser.add_argument("--num-adapters", type=int, default=8, help="0 asks the base alone")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64, help="in a round, all clients together")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


class OverHttp:
    """The server's side of a pair; ``shares`` are client's and server's shares of all cores' CPU time."""

    def __init__(self, server: ServerProcess, asks: Sequence[Ask], options: argparse.Namespace) -> None:
        self._server, self._options, self._asks = server, options, asks
        self._url = f"{server.url}/v1/completions"
        self.shares: list[tuple[float, float]] = []
        self.num_tokens = 0

    def requests(self) -> list[bytes]:
        base = self._server.models()[0]
        return [
            http_request(
                self._url,
                {
                    "model": base if ask.adapter is None else f"a{ask.adapter}",
                    "prompt": ask.prompt_ids,
                    "max_tokens": ask.num_tokens,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
            )
            for ask in self._asks
        ]

    def __call__(self) -> float:
        requests = self.requests()
        client, server, since = time.process_time(), self._server.usage().cpu_seconds, time.perf_counter()
        self.num_tokens = asyncio.run(closed_loop(self._url, requests, self._options.clients))
        seconds = time.perf_counter() - since
        cpus = seconds * find_cores().num_cpus
        client_seconds = time.process_time() - client
        server_seconds = self._server.usage().cpu_seconds - server
        self.shares.append((client_seconds / cpus, server_seconds / cpus))
        return self.num_tokens / seconds


class Direct:
    """The engine's side."""

    def __init__(self, engine: InProcessEngine, asks: Sequence[Ask], options: argparse.Namespace) -> None:
        self._engine, self._asks, self._options = engine, asks, options
        self.num_tokens = 0

    def __call__(self) -> float:
        eos_ids = self._engine.base.eos_ids
        seconds, self.num_tokens = self._engine.run_counted(self._asks, self._options.clients, eos_ids=eos_ids)
        return self.num_tokens / seconds


def asks_of(options: argparse.Namespace, vocab_size: int) -> list[Ask]:
    rng = random.Random(0)
    return [
        Ask(
            tuple(rng.randrange(vocab_size // 16, vocab_size - vocab_size // 16) for _ in range(options.prompt_tokens)),
            options.output_tokens,
            number % options.num_adapters if options.num_adapters else None,
        )
        for number in range(options.requests)
    ]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    names = [f"a{number}" for number in range(options.num_adapters)]
    adapters = write_adapters(find_base(options.base), folder, names, rank=options.rank)
    length = options.prompt_tokens + options.output_tokens + 1
    given = {"dtype": options.dtype, "quantization": options.quantization, "max_num_seqs": options.clients}
    engine = in_process_engine(options.base, adapters, max_len=length, **given)
    flags = ["--base-model", options.base, "--adapters-dir", str(folder), "--no-demo-adapters"]
    flags += ["--dtype", options.dtype, "--max-num-seqs", str(options.clients), "--max-model-len", str(length)]
    flags += ["--quantization", options.quantization] if options.quantization != "none" else []
    asks = asks_of(options, engine.base.vocab_size)
    with running_server(*flags) as server:
        server.until("the adapters are served", lambda: len(server.models()) > options.num_adapters)
        over_http, direct = OverHttp(server, asks, options), Direct(engine, asks, options)
        over_http()
        direct()
        over_http.shares.clear()
        sides = ("over HTTP", "engine in process")
        pairs = alternate(sides, (over_http, direct), num_pairs=options.pairs, unit="output tokens/s")
    print(pairs.as_table())
    shares = [median([share[side] for share in over_http.shares]) for side in (0, 1)]
    print(f"\nCPU time over HTTP, share of all {find_cores().num_cpus} CPUs: ", end="")
    print(f"client {100 * shares[0]:.1f} %, server {100 * shares[1]:.1f} %")
    print(f"output tokens in a round: {over_http.num_tokens} over HTTP, {direct.num_tokens} in process")
    return pairs.as_json() | {"client_cpu_share": shares[0], "server_cpu_share": shares[1]}


def main() -> None:
    """Measure, print a table, write JSON."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps({"options": vars(options), **result}, indent=1, default=str))


if __name__ == "__main__":
    main()
