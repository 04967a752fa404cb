"""Inter-token latency of running streams while long prompts arrive, against phases without long prompts.

    python -m benchmarks.burst --url http://127.0.0.1:8000 [--models a0 a1] [--streams 4] [--long-tokens 2000]

Streams run all the time. In every second phase a long prompt arrives at intervals, with one token of answer. Phases
come in pairs. Latencies are those of the streams alone, counted in the phase in which the later token arrived.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.load import add_workload, workload_of
from benchmarks.parts.figures import median, spread, table
from benchmarks.parts.jobs import Job, Span
from benchmarks.parts.load_report import without_nan
from benchmarks.parts.loops import Budget, closed_loop
from benchmarks.parts.requests import Client, Record

Phase = tuple[float, float, bool]
"""Start, end, and whether long prompts arrived."""

SIDES = (("quiet", False), ("long prompts", True))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload(parser)
    parser.set_defaults(output_tokens=Span(256, 256), prompt_tokens=Span(64, 64))
    parser.add_argument("--url", required=True)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--long-tokens", type=int, default=2000)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between long prompts")
    parser.add_argument("--phase", type=float, default=8.0, help="seconds of each phase")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


async def phases(client: Client, long: Iterator[Job], options: argparse.Namespace) -> tuple[list[Phase], list[Record]]:
    """Phases without and with long prompts in turn; after each of the latter wait for the answers."""
    done: list[Phase] = []
    records: list[Record] = []
    for _ in range(options.pairs):
        since = time.perf_counter()
        await asyncio.sleep(options.phase)
        done.append((since, time.perf_counter(), False))
        since = time.perf_counter()
        tasks = []
        while time.perf_counter() - since < options.phase:
            tasks.append(asyncio.create_task(client.send(next(long))))
            await asyncio.sleep(options.every)
        records += await asyncio.gather(*tasks)
        done.append((since, time.perf_counter(), True))
    return done, records


async def measure(options: argparse.Namespace) -> tuple[list[Phase], list[Record], list[Record]]:
    """Phases, the streams' records, and those of the long prompts."""
    client = Client(options.url, api_key=options.api_key, extra=options.extra, timeout=options.timeout)
    async with client.http:
        workload = await workload_of(options, client)
        alike = Span(options.long_tokens, options.long_tokens)
        long = replace(workload, prompt_tokens=alike, output_tokens=Span(1, 1), shared_prefix=0, seed=options.seed + 1)
        await closed_loop(client.send, Budget(long.jobs(), num_requests=1, seconds=None), 1)
        budget = Budget(workload.jobs(), num_requests=None, seconds=10_000.0)
        streams = asyncio.create_task(closed_loop(client.send, budget, options.streams))
        await asyncio.sleep(2.0)
        done, disturbers = await phases(client, itertools.islice(long.jobs(), 1, None), options)
        budget.close()
        return done, await streams, disturbers


def gaps_of(records: Sequence[Record], phase: Phase) -> list[float]:
    """Inter-token latencies in a phase, in milliseconds."""
    since, until, _ = phase
    return [
        1000 * (after - before)
        for record in records
        for before, after in itertools.pairwise(record.times)
        if since <= after < until
    ]


def joined(rounds: Sequence[Sequence[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(rounds))


def main() -> None:
    """Measure, and print inter-token latencies with and without long prompts; exits with 1 where a request failed."""
    options = parse()
    done, streams, disturbers = asyncio.run(measure(options))
    gaps = {name: [gaps_of(streams, phase) for phase in done if phase[2] == disturbed] for name, disturbed in SIDES}
    rows = [(name, sum(map(len, rounds)), *spread(joined(rounds)).values()) for name, rounds in gaps.items()]
    print(table(("inter-token latency, ms", "tokens", "p50", "p90", "p99", "max"), rows))
    pairs = zip(gaps["quiet"], gaps["long prompts"], strict=True)
    ratios = [spread(loud)["p99"] / spread(quiet)["p99"] for quiet, loud in pairs]
    print(f"\np99 with / without long prompts, median of {len(ratios)} pairs: {median(ratios):.2f}")
    answered = [record for record in disturbers if record.error is None]
    tokens = median([record.num_prompt_tokens for record in answered])
    print(f"{len(disturbers)} long prompts of {tokens:.0f} tokens, ", end="")
    print(f"request latency {median([record.until - record.since for record in answered]):.2f} s (median)")
    errors = [record.error for record in (*streams, *disturbers) if record.error is not None]
    if options.json is not None:
        figures = {name: spread(joined(rounds)) for name, rounds in gaps.items()}
        report = {"options": vars(options), "gap_ms": figures, "ratios_p99": ratios, "errors": errors}
        options.json.write_text(json.dumps(without_nan(report), indent=1, default=str))
    if errors:
        raise SystemExit(f"{len(errors)} requests failed: {', '.join(sorted(set(errors)))}")


if __name__ == "__main__":
    main()
