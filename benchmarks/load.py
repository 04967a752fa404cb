"""Load any OpenAI-compatible server, and report throughput and latency.

    python -m benchmarks.load --url http://127.0.0.1:8000 --models a0 a1 a2 --clients 8 --requests 100
    python -m benchmarks.load --url http://127.0.0.1:8000 --all-models --zipf 1.0 --rate 2 --seconds 30 --plot load.png

Either --clients in a closed loop, each asking again as soon as it is answered, or --rate arrivals in a second
(Poisson). Tokens are counted by the server's usage. Prompts are chats of plain words, their number fitted to the
server's own count; with --vocab-size they are token ids on /v1/completions, exactly as long as asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.parts.jobs import Measure, Mix, Span, Workload
from benchmarks.parts.load_report import as_table, plot, summary, without_nan
from benchmarks.parts.loops import Budget, closed_loop, open_loop
from benchmarks.parts.requests import Client, Record


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload(parser)
    parser.add_argument("--url", required=True)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--clients", type=int, default=8, help="in a closed loop")
    how.add_argument("--rate", type=float, help="arrivals in a second, instead of clients")
    parser.add_argument("--requests", type=int, help="stop asking after so many")
    parser.add_argument("--seconds", type=float, help="stop asking after so long; what runs is read to its end")
    parser.add_argument("--json", type=Path, help="write figures and every request here")
    parser.add_argument("--plot", type=Path, help="write a picture here, *.png")
    options = parser.parse_args(arguments)
    if options.requests is None and options.seconds is None:
        options.requests = 8 * options.clients
    return options


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Options of the workload and of the server."""
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--models", nargs="+", help="names to ask; the first that the server lists where none is named")
    models.add_argument("--all-models", action="store_true", help="ask every name that the server lists")
    parser.add_argument("--zipf", type=float, default=0.0, metavar="S", help="Zipf's exponent of the mix; 0 is even")
    parser.add_argument("--prompt-tokens", type=Span.parse, default=Span(125, 125), metavar="N|N-M")
    parser.add_argument("--output-tokens", type=Span.parse, default=Span(64, 64), metavar="N|N-M")
    parser.add_argument(
        "--shared-prefix", type=int, default=0, metavar="N", help="first tokens, the same in all prompts"
    )
    parser.add_argument("--vocab-size", type=int, help="prompts are token ids below this, on /v1/completions")
    parser.add_argument("--warm-up", type=int, default=8, metavar="N", help="requests before those that count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--extra", type=json.loads, default={}, help="more of the body, as '{\"ignore_eos\": true}'")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds without a byte")


async def workload_of(options: argparse.Namespace, client: Client) -> Workload:
    """The workload, its words fitted to the server's count. Raises ``httpx.HTTPError``."""
    models = options.models
    if not models:
        listed = await client.models()
        models = listed if options.all_models else listed[:1]
    measure = Measure() if options.vocab_size else await client.measure(models[0])
    return Workload(
        Mix(models, options.zipf),
        options.prompt_tokens,
        options.output_tokens,
        shared_prefix=options.shared_prefix,
        vocab_size=options.vocab_size,
        measure=measure,
        rate=getattr(options, "rate", None),
        seed=options.seed,
    )


async def run_load(
    options: argparse.Namespace, client: Client, workload: Workload
) -> tuple[list[Record], float, float]:
    """Warm up, then run the load; returns the records, and the times between which rates are measured."""
    if options.warm_up:
        others = replace(workload, rate=None, seed=workload.seed + 1)
        await closed_loop(
            client.send, Budget(others.jobs(), num_requests=options.warm_up, seconds=None), options.clients
        )
    budget = Budget(workload.jobs(), num_requests=options.requests, seconds=options.seconds)
    if options.rate is None:
        records = await closed_loop(client.send, budget, options.clients)
    else:
        records = await open_loop(client.send, budget)
    last = max((record.until for record in records), default=time.perf_counter())
    return records, budget.since, last if options.seconds is None else min(last, budget.since + options.seconds)


async def measure_once(options: argparse.Namespace) -> tuple[list[Record], float, float]:
    client = Client(options.url, api_key=options.api_key, extra=options.extra, timeout=options.timeout)
    async with client.http:
        return await run_load(options, client, await workload_of(options, client))


def as_json(record: Record, since: float) -> dict[str, Any]:
    """One request, its times from the start of the load."""
    return {
        "model": record.job.model,
        "since": record.since - since,
        "times": [moment - since for moment in record.times],
        "until": record.until - since,
        "output_tokens": record.num_tokens,
        "prompt_tokens": record.num_prompt_tokens,
        "error": record.error,
    }


def main() -> None:
    """Measure, print a table, write JSON and plot; exits with status 1 where no request was answered."""
    options = parse()
    cpu_start, start = time.process_time(), time.perf_counter()
    records, since, until = asyncio.run(measure_once(options))
    figures = summary(records, since, until)
    print(as_table(figures))
    share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
    figures["client_cpu_share"] = share
    print(f"\nCPU time of this client: {100 * share:.0f} % of one core")
    if options.json is not None:
        requests = [as_json(record, since) for record in records]
        options.json.write_text(
            json.dumps(
                without_nan({"options": vars(options), **figures}) | {"records": requests}, indent=1, default=str
            )
        )
    if options.plot is not None:
        plot(records, since, until, options.plot)
    if all(record.error is not None for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
