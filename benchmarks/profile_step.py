"""Where a step's time goes, and how far it is from what this machine could do at best.

    python -m benchmarks.profile_step --base BASE [--adapters FOLDER] [--quantization int8]

First the ceilings are measured: reading memory, and products of matrices of the base's own shapes. Then decode steps of
1, 8 and 32 sequences, and a prefill of 512 tokens, each with and without adapters where there are some. A step of
decoding has to read every weight once, so its bound is those bytes by the bandwidth; a prefill's bound is two
operations for each weight and token by the rate of the format that the linears compute in; the greater bound counts.

On a machine that others use, what it can do changes from second to second. So each step's share is measured a second
time in turn with what bounds it: with reading the same bytes, or with torch's products of as many layers.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE
from benchmarks.parts.bases import base_argument
from benchmarks.parts.ceilings import Shape, layers, operations, product_rates, read_bandwidth
from benchmarks.parts.engines import Ask, InProcessEngine, in_process_engine
from benchmarks.parts.figures import median, table
from benchmarks.parts.step_timers import KINDS, Stack, timing

CONTEXT = 160
"""Tokens that a decoding sequence has behind it."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=base_argument, default=EMBEDDED_BASE, help=BASE_MODEL_HELP)
    parser.add_argument("--adapters", type=Path, help="a folder of adapter folders: rows take them in turn")
    parser.add_argument("--num-adapters", type=int, default=8)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--quantization", default="none", help="none or int8")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prefill", type=int, default=512, help="tokens; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=20, help="decode steps that count, each with and without timers")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


class Profile:
    """One engine's steps, timed one after another as a server takes them, and then with timers."""

    def __init__(self, engine: InProcessEngine, num_steps: int) -> None:
        self.engine, self.num_steps = engine, num_steps
        self._rng = random.Random(0)
        self._memory = torch.ones(1 << 27)

    def prompt(self, length: int) -> tuple[int, ...]:
        size = self.engine.base.vocab_size
        return tuple(self._rng.randrange(size // 16, size - 256) for _ in range(length))

    def decode(self, num_seqs: int, num_adapters: int, num_bytes: int) -> dict[str, Any]:
        """A step in which each of ``num_seqs`` sequences gets a token; it has to read so many bytes. Milliseconds."""
        for number in range(num_seqs):
            adapter = number % num_adapters if num_adapters else None
            self.engine.add(Ask(self.prompt(max(1, CONTEXT - 2 * self.num_steps)), 10 * self.num_steps, adapter))
        scheduler = self.engine.engine.scheduler
        while scheduler.waiting or not all(sequence.output_ids for sequence in scheduler.running.values()):
            self.engine.step()
        factor = num_bytes / self._memory.nbytes
        return self._timed(self.engine.step, self.num_steps, lambda: factor * seconds_of(self._memory.sum))

    def prefill(self, length: int, num_adapters: int, sizes: Sizes) -> dict[str, Any]:
        """A step that computes a whole prompt; milliseconds."""
        count = round(2 * length * sizes.in_linears / operations(sizes.one_layer, length))
        products = layers(sizes.compute, sizes.one_layer, length, count)

        def one_prompt() -> None:
            sequence = self.engine.add(Ask(self.prompt(length), 2, 0 if num_adapters else None))
            self.engine.step()
            self.engine.engine.abort(sequence.id)

        return self._timed(one_prompt, max(3, self.num_steps // 4), lambda: seconds_of(products))

    def _timed(self, step: Callable[[], object], count: int, bound: Callable[[], float]) -> dict[str, Any]:
        step(), step(), step(), bound()
        pairs = [_share(step, bound) for _ in range(max(3, count // 2))]
        timed, stack = [], Stack()
        plain = [seconds_of(step) for _ in range(count)]
        for _ in range(count):
            with timing(self.engine, stack):
                timed.append(seconds_of(step))
        for sequence_id in list(self.engine.engine.scheduler.running):
            self.engine.engine.abort(sequence_id)
        whole, with_timers = sum(timed), median(timed)
        claimed = sum(stack.own.values())
        stack.own["rest"] += whole - claimed
        return {
            "ms": 1000 * median(plain),
            "ms_with_timers": 1000 * with_timers,
            "shares": {kind: stack.own[kind] / whole for kind in KINDS},
            "in_turn": median(pairs),
        }


def _share(step: Callable[[], object], bound: Callable[[], float]) -> float:
    """The least time that a step could take by the time it takes, each three times in turn."""
    steps = sum(seconds_of(step) for _ in range(3))
    return sum(bound() for _ in range(3)) / steps


def seconds_of(step: Callable[[], object]) -> float:
    since = time.perf_counter()
    step()
    return time.perf_counter() - since


class Sizes:
    """Weights of the base, by the shapes that its probe saw. ``itemsize`` is bytes of a linear's weight."""

    def __init__(self, engine: InProcessEngine, quantization: str) -> None:
        modules = engine.base.signature.modules
        linears = {name: shape.size for name, shape in modules.items() if shape.kind == "linear"}
        self.head = next((linears.pop(name) for name in list(linears) if name.endswith("lm_head")), (0, 0))
        self.linears = linears
        self.in_head = self.head[0] * self.head[1]
        self.in_linears = sum(num_inputs * num_outputs for num_inputs, num_outputs in linears.values())
        self.compute = "int8" if quantization == "int8" else str(engine.base.model.dtype).removeprefix("torch.")
        self.float_bytes = engine.base.model.dtype.itemsize
        self.weight_bytes = 1 if quantization == "int8" else self.float_bytes
        self.per_token = sum(
            layer.num_kv_heads * (layer.key_dim + layer.value_dim) * self.float_bytes for layer in engine.base.shapes
        )

    @property
    def one_layer(self) -> dict[str, Shape]:
        """The linears of one layer: those that have the most common prefix, the first of them."""
        kinds: dict[str, Shape] = {}
        for name, size in self.linears.items():
            kinds.setdefault(name.rpartition(".")[2], size)
        return kinds

    def read_in_a_step(self, num_seqs: int, adapter_bytes: int) -> int:
        """Bytes that a decode step has to read: weights, head (in the linears' format), keys and values, adapters."""
        head = self.in_head * self.weight_bytes
        return self.in_linears * self.weight_bytes + head + num_seqs * CONTEXT * self.per_token + adapter_bytes


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def main() -> None:
    """Measure, print two tables, write JSON where it is wanted."""
    options = parse()
    found = sorted(path.parent for path in options.adapters.glob("*/adapter_config.json")) if options.adapters else []
    adapters = found[: options.num_adapters]
    engine = in_process_engine(
        options.base,
        adapters,
        dtype=options.dtype,
        quantization=options.quantization,
        max_num_seqs=max([*options.sequences, 1]),
        max_len=max(options.prefill + 8, 2 * CONTEXT + 12 * options.steps),
    )
    sizes = Sizes(engine, options.quantization)
    bandwidth, rates = read_bandwidth(), product_rates(sizes.one_layer, 512)
    print(f"memory read {bandwidth / 1e9:.1f} GB/s; products of 512 rows at the base's shapes: ", end="")
    print(", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    print(f"weights: {sizes.in_linears / 1e6:.0f} M in linears, {sizes.in_head / 1e6:.0f} M in the head")
    results = measure(options, engine, sizes, bandwidth, rates)
    print_tables(results)
    if options.json is not None:
        report = {"options": vars(options), "read_bytes_per_s": bandwidth, "operations_per_s": rates, "steps": results}
        options.json.write_text(json.dumps(report, indent=1, default=str))


def measure(
    options: argparse.Namespace, engine: InProcessEngine, sizes: Sizes, bandwidth: float, rates: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Each kind of step, with ``ceiling``: the least time it could take by the time it took."""
    profile, results = Profile(engine, options.steps), {}
    rate = rates.get(sizes.compute, rates["float32"])
    for held in sorted({0, len(engine.adapter_bytes)}):
        engine.hold(held)
        suffix = f", {held} adapters" if held else ""
        for num_seqs in options.sequences:
            used = sum(engine.adapter_bytes[: min(held, num_seqs)])
            num_bytes = sizes.read_in_a_step(num_seqs, used)
            step = profile.decode(num_seqs, held, num_bytes)
            read = num_bytes / bandwidth
            computed = 2 * num_seqs * (sizes.in_linears + sizes.in_head) / rate
            results[f"decode {num_seqs}{suffix}"] = step | bounds(step, read, computed, num_seqs)
        if options.prefill:
            step = profile.prefill(options.prefill, held, sizes)
            computed = 2 * options.prefill * sizes.in_linears / rate
            results[f"prefill {options.prefill}{suffix}"] = step | bounds(step, 0.0, computed, options.prefill)
    return results


def bounds(step: dict[str, Any], read: float, computed: float, num_tokens: int) -> dict[str, Any]:
    """What reading and computing alone would take, in milliseconds, and the share of the greater in the step."""
    least = 1000 * max(read, computed)
    return {
        "tokens_per_s": 1000 * num_tokens / step["ms"],
        "read_ms": 1000 * read,
        "computed_ms": 1000 * computed,
        "ceiling": least / step["ms"],
    }


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    """Each step's time and share of the roofline, then where its time goes in percent."""
    rows = [
        (
            name,
            step["ms"],
            step["tokens_per_s"],
            step["read_ms"],
            step["computed_ms"],
            percent(step["ceiling"]),
            percent(step["in_turn"]),
        )
        for name, step in results.items()
    ]
    print("\n" + table(("step", "ms", "tokens/s", "reading ms", "computing ms", "of roofline", "in turn"), rows))
    rows = [
        (name, *(f"{100 * step['shares'][kind]:.1f}" for kind in KINDS), step["ms_with_timers"] - step["ms"])
        for name, step in results.items()
    ]
    print("\n" + table(("% of a step", *KINDS, "timer overhead, ms"), rows))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
