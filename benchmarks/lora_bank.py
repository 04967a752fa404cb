"""The cost of adapters in a step: the LoRA bank against a plain loop over adapters. Alternating pairs, medians.

    python -m benchmarks.lora_bank [--rank 8] [--layers 24] [--hidden 896] [--intermediate 4864] [--pairs 15]

The base's linears are stand-ins that compute nothing, so that only the adapters' part is measured; ``floor`` is the
time that reading the adapters' numbers once takes at the rate at which this machine sums up a large tensor.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from cpu_kernels.cores import default_threads
from server.lora.bank import LoRABank
from server.lora.batched import BatchedTorchLoRA
from server.lora.delta import LoRADelta
from server.lora.weights import FusedA, LoRAWeights
from server.sequence import Batch, LoRARequest, SamplingParams, Segment, Sequence

CASES = {"1x1": [1], "8x1": [8], "8x8": [1] * 8, "16x8": [2] * 8, "32x8": [4] * 8, "32x32": [1] * 32}
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


class Result(nn.Module):
    """In the place of a linear: always the same tensor [1, rows, out]."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.out, self.y = out, torch.empty(0)
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x is not looked at."""
        return self.y


class Body(nn.Module):
    """The linears of a transformer, called as its layers call them, some with the same tensor."""

    def __init__(self, layers: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        key = max(hidden // 7, 1)
        outs = {"q": hidden, "k": key, "v": key, "o": hidden, "gate": intermediate, "up": intermediate, "down": hidden}
        self.sizes = {name: (intermediate if name == "down" else hidden, out) for name, out in outs.items()}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Result(out) for name, out in outs.items()}) for _ in range(layers)
        )
        self.inputs: list[torch.Tensor] = []

    def resize(self, rows: int) -> None:
        self.inputs = [torch.randn(1, rows, self.sizes[group[0]][0]) for group in GROUPS]
        for module in self.modules():
            if isinstance(module, Result):
                module.y = torch.zeros(1, rows, module.out)

    def forward(self) -> None:
        """One pass."""
        for layer in self.layers:
            for x, group in zip(self.inputs, GROUPS, strict=True):
                for name in group:
                    layer[name](x)  # type: ignore[index]


def random_adapter(body: Body, rank: int) -> LoRAWeights:
    """Deltas on every linear, A of a group in one tensor."""
    deltas, shared = {}, []
    for number in range(len(body.layers)):
        for group in GROUPS:
            names = [f"layers.{number}.{name}" for name in group]
            whole = torch.randn(rank * len(group), body.sizes[group[0]][0])
            columns = {name: slice(place * rank, place * rank + rank) for place, name in enumerate(names)}
            shared.append(FusedA(whole.t(), columns))
            for name, kind in zip(names, group, strict=True):
                deltas[name] = LoRADelta(
                    "linear", whole[columns[name]].t(), torch.randn(rank, body.sizes[kind][1]) / 1000
                )
    return LoRAWeights(deltas, 1.0, shared)


def make_batch(counts: list[int]) -> Batch:
    """One decoding row a sequence, so many on each adapter."""
    sequences = [
        Sequence(0, (1,), 9, SamplingParams(), (LoRARequest(str(number)),))
        for number, count in enumerate(counts)
        for _ in range(count)
    ]
    return Batch(tuple(Segment(sequence, 0, 0, 1) for sequence in sequences))


def loop(body: Body, adapters: list[LoRAWeights], counts: list[int]) -> Callable[[], None]:
    """Every adapter by itself on every linear: two products on its rows."""
    contiguous = [
        {name: (delta.a.contiguous(), delta.b) for name, delta in weights.deltas.items() if delta.a is not None}
        for weights in adapters[: len(counts)]
    ]

    def step() -> None:
        for number, layer in enumerate(body.layers):
            for x, group in zip(body.inputs, GROUPS, strict=True):
                for name in group:
                    y = layer[name](x)[0]  # type: ignore[index]
                    start = 0
                    for deltas, count in zip(contiguous, counts, strict=False):
                        a, b = deltas[f"layers.{number}.{name}"]
                        assert b is not None
                        y[start : start + count].addmm_(x[0, start : start + count].float() @ a, b)
                        start += count

    return step


def banked(body: Body, bank: LoRABank, counts: list[int]) -> Callable[[], None]:
    batch = make_batch(counts)

    def step() -> None:
        bank.begin_sorted(batch)
        body()

    return step


def median_pair(first: Callable[[], None], second: Callable[[], None], pairs: int) -> tuple[float, float]:
    """Milliseconds of each, one after the other in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs + 2):
        for run, taken in zip((first, second), times, strict=True):
            since = time.perf_counter()
            run()
            if number > 1:
                taken.append(1000 * (time.perf_counter() - since))
    return statistics.median(times[0]), statistics.median(times[1])


def bytes_per_ms() -> float:
    large, best = torch.ones(1 << 26), float("inf")
    for _ in range(8):
        since = time.perf_counter()
        large.sum()
        best = min(best, time.perf_counter() - since)
    return large.nbytes / best / 1000


@torch.inference_mode()
def main() -> None:
    """Measure and print one JSON object, in milliseconds a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--intermediate", type=int, default=4864)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(default_threads())
    rng, rate, found = random.Random(0), bytes_per_ms(), {}
    uneven = {f"uneven {counts}": counts for counts in ([rng.choice((1, 1, 2, 3, 6)) for _ in range(8)] for _ in "12")}
    cases = {**CASES, **uneven, "uneven [1, 1, 1, 1, 128]": [1, 1, 1, 1, 128]}
    most = max(map(len, cases.values()))
    plain, body = (Body(options.layers, options.hidden, options.intermediate) for _ in range(2))
    adapters = [random_adapter(body, options.rank) for _ in range(most)]
    groups = [tuple(f"layers.{n}.{name}" for name in group) for n in range(options.layers) for group in GROUPS]
    for case, counts in cases.items():
        bank = LoRABank(body, BatchedTorchLoRA(groups, max_slots=most, device=torch.device("cpu")))
        for number, weights in enumerate(adapters[: len(counts)]):
            bank.add(str(number), weights)
        plain.resize(sum(counts))
        body.resize(sum(counts))
        before, now = median_pair(loop(plain, adapters, counts), banked(body, bank, counts), options.pairs)
        floor = sum(weights.num_bytes for weights in adapters[: len(counts)]) / rate
        found[case] = {"loop": round(before, 2), "bank": round(now, 2), "floor": round(floor, 2)}
        for number in range(len(counts)):
            bank.remove(str(number))
    print(json.dumps({**vars(options), "rows x adapters, ms": found}, indent=1))


if __name__ == "__main__":
    main()
