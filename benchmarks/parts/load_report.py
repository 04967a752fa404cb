"""What the records of a load come to: figures, a table, a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.parts.figures import spread, table
from benchmarks.parts.requests import Record


def summary(records: Sequence[Record], since: float, until: float) -> dict[str, Any]:
    """Figures of those that were answered; rates over ``since`` to ``until``, times in milliseconds.

    A token counts to the rate if it came within, so that answers which end after the time is over count by their part.
    """
    good = [record for record in records if record.error is None]
    seconds = max(until - since, 1e-9)
    per_token = [record.per_token for record in good]
    return {
        "requests": len(records),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "seconds": seconds,
        "requests_per_s": sum(record.until <= until for record in good) / seconds,
        "output_tokens_per_s": sum(tokens_within(record, since, until) for record in good) / seconds,
        "output_tokens": sum(record.num_tokens for record in good),
        "prompt_tokens": sum(record.num_prompt_tokens for record in good),
        "ttft_ms": in_ms([record.to_first for record in good]),
        "time_per_token_ms": in_ms([one for one in per_token if one is not None]),
        "gap_ms": in_ms([gap for record in good for gap in record.gaps]),
        "latency_ms": in_ms([record.until - record.since for record in good]),
        "requests_by_model": dict(Counter(record.job.model for record in records).most_common()),
    }


def tokens_within(record: Record, since: float, until: float) -> float:
    """A record's tokens between two times, each piece taken for its share of them."""
    if not record.times:
        return 0.0
    return record.num_tokens * sum(since <= moment <= until for moment in record.times) / len(record.times)


def in_ms(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and max in milliseconds."""
    return {name: 1000 * value for name, value in spread(seconds).items()}


def as_table(figures: Mapping[str, Any]) -> str:
    times = [
        ("time to first token", "ttft_ms"),
        ("time per output token", "time_per_token_ms"),
        ("gap between pieces", "gap_ms"),
        ("whole answer", "latency_ms"),
    ]
    errors = ", ".join(f"{kind}: {count}" for kind, count in figures["errors"].items()) or "none"
    return "\n".join(
        [
            f"{figures['requests']} requests in {figures['seconds']:.1f} s, errors {errors}",
            f"{figures['requests_per_s']:.2f} requests/s, {figures['output_tokens_per_s']:.1f} output tokens/s",
            "",
            table(
                ("milliseconds", "p50", "p90", "p99", "max"), [(name, *figures[key].values()) for name, key in times]
            ),
        ]
    )


def without_nan(value: Any) -> Any:
    """JSON has no NaN: what has no value is null."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def plot(records: Sequence[Record], since: float, until: float, path: Path) -> None:
    """Three pictures beside each other: times to first token, gaps, tokens in each second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    good = [record for record in records if record.error is None]
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(15, 4))
    ttft = sorted(1000 * record.to_first for record in good)
    first.step(ttft, [(place + 1) / len(ttft) for place in range(len(ttft))], where="post")
    first.set(title="time to first token", xlabel="ms", ylabel="share of requests", ylim=(0, 1))
    gaps = [1000 * gap for record in good for gap in record.gaps]
    second.hist(gaps, bins=60, log=True)
    second.set(title="gap between pieces", xlabel="ms", ylabel="gaps")
    bins = range(max(1, math.ceil(until - since)))
    rates = [sum(tokens_within(record, since + at, since + at + 1) for record in good) for at in bins]
    third.step(list(bins), rates, where="post")
    third.set(title="output tokens in each second", xlabel="s", ylabel="tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
