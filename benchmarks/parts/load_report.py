"""The results of a load: figures, a table, a plot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.parts.figures import spread, table
from benchmarks.parts.requests import Record


def summary(records: Sequence[Record], since: float, until: float) -> dict[str, Any]:
    """Figures of the requests that were answered; rates over ``since`` to ``until``, times in milliseconds.

    A token counts if it arrived in that time, so that answers which end later count in part.
    """
    answered = [record for record in records if record.error is None]
    seconds = max(until - since, 1e-9)
    per_token = [record.per_token for record in answered if record.per_token is not None]
    return {
        "requests": len(records),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "seconds": seconds,
        "requests_per_s": sum(record.until <= until for record in answered) / seconds,
        "output_tokens_per_s": sum(tokens_within(record, since, until) for record in answered) / seconds,
        "output_tokens": sum(record.num_tokens for record in answered),
        "prompt_tokens": sum(record.num_prompt_tokens for record in answered),
        "ttft_ms": in_ms([record.to_first for record in answered]),
        "time_per_token_ms": in_ms(per_token),
        "gap_ms": in_ms([gap for record in answered for gap in record.gaps]),
        "latency_ms": in_ms([record.until - record.since for record in answered]),
        "requests_by_model": dict(Counter(record.job.model for record in records).most_common()),
    }


def tokens_within(record: Record, since: float, until: float) -> float:
    """A record's tokens between two times; each event counts as an equal share of the tokens."""
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
        ("inter-token latency", "gap_ms"),
        ("request latency", "latency_ms"),
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
    """NaN becomes None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def plot(records: Sequence[Record], since: float, until: float, path: Path) -> None:
    """Three plots side by side: time to first token, inter-token latency, output tokens per second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    answered = [record for record in records if record.error is None]
    figure, (ttft_axes, itl_axes, rate_axes) = plt.subplots(1, 3, figsize=(15, 4))
    ttft = sorted(1000 * record.to_first for record in answered)
    ttft_axes.step(ttft, [(index + 1) / len(ttft) for index in range(len(ttft))], where="post")
    ttft_axes.set(title="time to first token", xlabel="ms", ylabel="share of requests", ylim=(0, 1))
    gaps = [1000 * gap for record in answered for gap in record.gaps]
    itl_axes.hist(gaps, bins=60, log=True)
    itl_axes.set(title="inter-token latency", xlabel="ms", ylabel="tokens")
    bins = range(max(1, math.ceil(until - since)))
    rates = [sum(tokens_within(record, since + second, since + second + 1) for record in answered) for second in bins]
    rate_axes.step(list(bins), rates, where="post")
    rate_axes.set(title="output tokens/s", xlabel="s", ylabel="tokens/s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
