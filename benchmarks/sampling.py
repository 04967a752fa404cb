"""The cost of sampling the tokens of a step: greedy, temperature 1, top-p, top-k, min-p.

    python -m benchmarks.sampling [--rows 8] [--vocab 151936] [--spread 0.5]
    python -m benchmarks.sampling --base BASE [--quantization int8] [--rows 8]

Without a base the logits are random normal ones: a spread of 0.5 is as flat as a random base's, at 4 nine tenths of
the probability are on a few tokens as in a trained one. With a base the engine decodes, and choosing is timed within
its steps; its share is what it takes beyond greedy, of a greedy step. Settings take turns, and medians count.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from base_files.names import BASE_MODEL_HELP
from benchmarks.parts.bases import base_argument
from benchmarks.parts.engines import Ask, InProcessEngine, in_process_engine
from benchmarks.parts.figures import median, table
from cpu_kernels.cores import default_threads
from cpu_kernels.kernels import Kernels
from server.cli.allocation import keep_freed_memory
from server.model.sampler import Sampler
from server.sequence import SampledToken, SampleRow, SamplingParams, Sequence

SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 1": SamplingParams(),
    "temperature 0.7": SamplingParams(temperature=0.7),
    "top_p 0.95": SamplingParams(top_p=0.95),
    "top_k 50": SamplingParams(top_k=50),
    "min_p 0.05": SamplingParams(min_p=0.05),
}
CONTEXT = 125
"""Tokens of each prompt."""


def parse(arguments: SequenceOf[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", type=base_argument, help=f"time within an engine's steps of this base: {BASE_MODEL_HELP}"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--quantization", default="none", help="none or int8")
    parser.add_argument("--rows", type=int, default=8, help="sequences that decode")
    parser.add_argument("--vocab", type=int, default=151_936, help="tokens, without a base")
    parser.add_argument("--spread", type=float, default=0.5, help="standard deviation of the logits, without a base")
    parser.add_argument("--rounds", type=int, default=25)
    return parser.parse_args(arguments)


Step = Callable[[SamplingParams], tuple[float, float]]
"""Runs one step with these parameters in every row; returns seconds of sampling, and of the whole step."""


class Stopwatch(Sampler):
    """The server's sampler, which tells how long it took."""

    seconds = 0.0

    def sample(self, logits: torch.Tensor, draws: SequenceOf[SampleRow]) -> list[SampledToken | None]:
        since = time.perf_counter()
        tokens = super().sample(logits, draws)
        self.seconds = time.perf_counter() - since
        return tokens


def on_random_logits(rows: int, vocab: int, spread: float) -> Step:
    """Choosing from logits that stay the same; the step is no more than that."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * spread
    sampler, numbers = Stopwatch(Kernels(native=True).ready().softmax_rows), itertools.count()

    def step(params: SamplingParams) -> tuple[float, float]:
        number = next(numbers)
        sampler.sample(logits, [SampleRow(Sequence(row, (1,), 1, params), number) for row in range(rows)])
        return sampler.seconds, sampler.seconds

    return step


def in_engine(engine: InProcessEngine, rows: int, num_steps: int) -> Step:
    """Choosing within the engine's steps; the same sequences go on decoding whatever the setting."""
    rng, size = random.Random(0), engine.base.vocab_size
    sampler = engine.engine.sampler = Stopwatch(engine.base.kernels.softmax_rows)
    for _ in range(rows):
        prompt = tuple(rng.randrange(size // 16, size - 256) for _ in range(CONTEXT))
        engine.add(Ask(prompt, CONTEXT + num_steps))
    running = engine.engine.scheduler.running
    while engine.engine.scheduler.waiting or not all(sequence.decoding for sequence in running.values()):
        engine.step()

    def step(params: SamplingParams) -> tuple[float, float]:
        for sequence in running.values():
            sequence.params = params
        since = time.perf_counter()
        engine.step()
        return sampler.seconds, time.perf_counter() - since

    return step


def measure(step: Step, rounds: int) -> dict[str, tuple[float, float]]:
    """For each setting the median milliseconds of sampling, and of the whole step."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    for number in range(rounds + 2):
        for name, params in SETTINGS.items():
            taken = step(params)
            if number > 1:
                times[name].append(taken)
    return {
        name: (1000 * median([sampling for sampling, _ in taken]), 1000 * median([whole for _, whole in taken]))
        for name, taken in times.items()
    }


def main() -> None:
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(default_threads())
    if options.base is None:
        step = on_random_logits(options.rows, options.vocab, options.spread)
    else:
        num_steps = len(SETTINGS) * (options.rounds + 2)
        engine = in_process_engine(
            options.base,
            dtype=options.dtype,
            quantization=options.quantization,
            max_num_seqs=options.rows,
            max_len=2 * CONTEXT + num_steps + 1,
        )
        step = in_engine(engine, options.rows, num_steps)
    found = measure(step, options.rounds)
    greedy, greedy_step = found["greedy"]
    header = ("", "sampling, ms", "above greedy, ms", "% of a greedy step")
    rows = []
    for name, (sampling, _) in found.items():
        share = 100 * (sampling - greedy) / greedy_step if options.base else math.nan
        rows.append((name, sampling, sampling - greedy, share))
    print(table(header, rows))
    if options.base is not None:
        print(f"greedy step of {options.rows} rows: {greedy_step:.1f} ms")


if __name__ == "__main__":
    main()
