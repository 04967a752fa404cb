"""A decode step alone and beside processes that use a core each, by how long waiting threads spin.

A server for each setting, asked in turn over HTTP; the clients' requests are of equal length and end together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from base_files.names import BASE_MODEL_HELP
from benchmarks.parts.bases import base_argument
from benchmarks.parts.figures import median, table
from benchmarks.parts.raw_client import closed_loop, http_request
from cpu_kernels.spinning import CHOSEN_BY, SETTINGS
from tests.serving import ServerProcess, running_server

DEFAULT = "default"
_BUSY = "while True: pass"


class SpinningServer:
    """The server of one setting, and the milliseconds of a step in each round, alone and beside busy processes."""

    def __init__(self, server: ServerProcess, options: argparse.Namespace) -> None:
        self._url, self._options = f"{server.url}/v1/completions", options
        self._model = server.models()[0]
        self.alone: list[float] = []
        self.beside: list[float] = []

    def step(self) -> float:
        """Milliseconds of a step, over answers of all clients; the prompt's step is one of them."""
        num_tokens: int = self._options.output_tokens
        body = {
            "model": self._model, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        clients = self._options.clients
        requests = [http_request(self._url, body | {"prompt": [100 + client]}) for client in range(clients)]
        since = time.perf_counter()
        asyncio.run(closed_loop(self._url, requests, clients))
        return (time.perf_counter() - since) / num_tokens * 1000


@contextmanager
def spinning(setting: str) -> Iterator[None]:
    """The environment of a server whose threads spin so often."""
    before = {name: os.environ.pop(name, None) for name in CHOSEN_BY}
    if setting != DEFAULT:
        os.environ["GOMP_SPINCOUNT"] = setting
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        time.sleep(0.3 if count else 0)  # until they compute
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(options: argparse.Namespace) -> dict[str, SpinningServer]:
    flags = ["--base-model", options.base, "--quantization", options.quantization, "--no-demo-adapters"]
    flags += ["--max-num-seqs", str(options.clients), "--max-model-len", "512", "--speculation", "none"]
    flags += ["--no-prefix-caching", *options.flags]
    with ExitStack() as stack:
        sides = {}
        for setting in options.spins:
            with spinning(setting):
                sides[setting] = SpinningServer(stack.enter_context(running_server(*flags)), options)
            for _ in range(3):
                sides[setting].step()  # records layer graphs
        for busy in (0, options.busy):
            for number in range(options.rounds):
                names = list(sides)
                first = number % len(names)
                with busy_processes(busy):
                    for side in (sides[name] for name in (*names[first:], *names[:first])):
                        (side.beside if busy else side.alone).append(side.step())
    return sides


def _rows(sides: dict[str, SpinningServer]) -> Iterator[Sequence[object]]:
    reference = next(iter(sides.values())).alone
    for setting, side in sides.items():
        cost = median([alone / other for alone, other in zip(side.alone, reference, strict=True)])
        slower = median(side.beside) / median(side.alone)
        yield setting, median(side.alone), min(side.alone), cost, median(side.beside), max(side.beside), slower


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=base_argument, default="micro", help=BASE_MODEL_HELP)
    parser.add_argument("--quantization", default="int8", choices=("none", "int8"))
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", type=int, default=1, help="processes that use a core each")
    spins = ["300000", SETTINGS["GOMP_SPINCOUNT"]]
    parser.add_argument("--spins", nargs="+", default=spins, help=f"values of GOMP_SPINCOUNT, or '{DEFAULT}' for ours")
    parser.add_argument("--flags", nargs="*", default=[], help="further flags of the server, as --flags=--threads=2")
    return parser.parse_args()


def main() -> None:
    header = ("spins", "alone [ms]", "min", "to first [x]", "beside [ms]", "max", "beside / alone [x]")
    print(table(header, _rows(measure(parse()))))


if __name__ == "__main__":
    main()
