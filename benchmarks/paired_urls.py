"""Any two OpenAI-compatible servers under the same load, in turn: two engines, or two settings of one.

    python -m benchmarks.paired_urls --urls http://127.0.0.1:8000 http://127.0.0.1:8001 --models a0 a1 --clients 8

Every option of the load is that of benchmarks.load; --models-right names the models of the second server where they
are called otherwise. Prompts are the same words for both, fitted to the first server's count. Both servers should be up
all the time and have the same threads; the one that is not asked idles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.load import add_workload, run_load, workload_of
from benchmarks.parts.figures import median, table
from benchmarks.parts.jobs import Mix
from benchmarks.parts.load_report import summary, without_nan
from benchmarks.parts.pairs import Pairs
from benchmarks.parts.requests import Client

TIMES = (
    ("time to first token", "ttft_ms"),
    ("time per output token", "time_per_token_ms"),
    ("inter-token latency", "gap_ms"),
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload(parser)
    parser.add_argument("--urls", nargs=2, required=True, metavar=("LEFT", "RIGHT"))
    parser.add_argument("--models-right", nargs="+", help="the second server's names, in the same order")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32, help="in a round, all clients together")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every round's figures here")
    parser.set_defaults(rate=None, seconds=None)
    return parser.parse_args(arguments)


async def measure(options: argparse.Namespace) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Both servers' figures, round by round. Raises ``httpx.HTTPError`` where the first one cannot be asked."""
    named = {"api_key": options.api_key, "extra": options.extra, "timeout": options.timeout}
    clients = [Client(url, **named) for url in options.urls]
    workload = await workload_of(options, clients[0])
    other = Mix(options.models_right or workload.models.names, options.zipf)
    workloads = [workload, replace(workload, models=other)]
    rounds = []
    for number in range(options.pairs):
        figures: list[dict[str, Any]] = [{}, {}]
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            figures[side] = summary(*await run_load(options, clients[side], workloads[side]))
        rounds.append((figures[0], figures[1]))
        options.warm_up = 0
    for client in clients:
        await client.http.aclose()
    return rounds


def main() -> None:
    """Measure, print a table, write JSON; exits with status 1 where a request failed."""
    options = parse()
    rounds = asyncio.run(measure(options))
    left, right = options.urls
    rates = [[figures[side]["output_tokens_per_s"] for figures in rounds] for side in (0, 1)]
    print(Pairs((left, right), "output tokens/s", *rates).as_table())
    rows = [
        (f"{name}, {which}", *(median([figures[side][key][which] for figures in rounds]) for side in (0, 1)))
        for name, key in TIMES
        for which in ("p50", "p99")
    ]
    print("\n" + table(("ms, median of rounds", left, right), rows))
    if options.json is not None:
        options.json.write_text(
            json.dumps(without_nan({"options": vars(options), "rounds": rounds}), indent=1, default=str)
        )
    errors = [figures["errors"] for pair in rounds for figures in pair if figures["errors"]]
    if errors:
        raise SystemExit(f"requests failed: {errors}")


if __name__ == "__main__":
    main()
