"""One thing against another in this process, in pairs: our engine and PEFT, with adapters and without, few and many.

    python -m benchmarks.paired SCENARIO [SCENARIO ...] --base BASE [--adapters FOLDER] [--quantization int8]

Both sides have the same weights, prompts and lengths and no early end, and decode greedily where nothing else is said;
clients stand in a closed loop, each asking again as soon as it is answered. Without --adapters random ones are made.

scenarios:
  peft-in-turn  ours with every adapter in one batch / PEFT, set_adapter before each request
  peft-mixed    ours / PEFT, adapter_names: a batch of --clients with one adapter a row
  peft-one      ours on one adapter / PEFT on one adapter, a batch of --clients
  adapter-tax   ours on --num-adapters adapters mixed / ours on the base alone, no adapter loaded
  one-adapter   ours on one adapter / ours on the base alone, no adapter loaded
  zipf-64       ours on 64 adapters by Zipf's law, 16 clients / ours on 8 adapters by turns, 16 clients
  temperature-1 ours on the base, sampled at temperature 1 / greedy
  top-p         ours on the base, sampled at temperature 1 with top_p 0.95 / greedy
  generate      ours on the base / transformers' generate on the base, in batches of --clients
  openvino-base, openvino-one, openvino-mixed
                ours on the base, on one adapter, on all in one batch / OpenVINO GenAI's continuous batching of the
                folder that --openvino names, which plays one adapter after another

Two servers are compared by benchmarks.paired_urls.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from base_files.locate import find_base
from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE
from benchmarks.parts.bases import base_argument
from benchmarks.parts.engines import Ask, ClosedLoop, InProcessEngine, Peft, Stock, in_process_engine
from benchmarks.parts.jobs import Mix
from benchmarks.parts.openvino import OpenVino, missing
from benchmarks.parts.pairs import Pairs, Round, alternate
from benchmarks.parts.random_adapters import write_adapters
from server.sequence import SamplingParams

MANY, MANY_CLIENTS, FEW = 64, 16, 8


class PairedBench:
    """The options, and the engines made so far: each is made once, when a scenario first needs it."""

    def __init__(self, options: argparse.Namespace, adapters: Sequence[Path]) -> None:
        self.options, self.adapters = options, adapters
        self._ours: InProcessEngine | None = None

    @property
    def ours(self) -> InProcessEngine:
        if self._ours is None:
            given = self.options
            self._ours = in_process_engine(
                given.base,
                self.adapters,
                device=given.device,
                dtype=given.dtype,
                quantization=given.quantization,
                max_num_seqs=max(given.clients, MANY_CLIENTS),
                max_len=given.prompt_tokens + given.output_tokens + 1,
            )
        return self._ours

    @property
    def _dtype(self) -> str:
        return str(self.ours.base.model.dtype).removeprefix("torch.")

    def stock(self) -> Stock:
        """The stock base on the same device, in the same floating-point format."""
        return Stock(self.options.base, device=self.ours.base.model.device, dtype=self._dtype)

    def peft(self, num_adapters: int, *, mixed: bool) -> Peft:
        """PEFT on the same base in the same floating-point format, on the CPU."""
        return Peft(self.options.base, self.adapters[:num_adapters], dtype=self._dtype, mixed=mixed)

    def asks(self, adapters: Sequence[int | None], count: int | None = None) -> list[Ask]:
        """A round's requests, on these adapters in turn; prompts are the same for every side and round."""
        rng = random.Random(self.options.seed)
        vocab_size = self.ours.base.vocab_size
        given = self.options
        return [
            Ask(
                tuple(rng.randrange(vocab_size // 16, vocab_size - 256) for _ in range(given.prompt_tokens)),
                given.output_tokens,
                adapters[number % len(adapters)],
            )
            for number in range(count or given.requests)
        ]

    def pairs(self, names: tuple[str, str], left: Round, right: Round) -> Pairs:
        return alternate(names, (left, right), num_pairs=self.options.pairs, unit="output tokens/s")

    def alone(self, asks: Sequence[Ask], *, hold: int, num_clients: int | None = None) -> Round:
        """A round of our engine with so many adapters on the base."""
        self.ours.hold(hold)
        rounds = throughput(self.ours, asks, num_clients or self.options.clients)

        def one_round() -> float:
            self.ours.hold(hold)
            return rounds()

        return one_round


def throughput(engine: ClosedLoop, asks: Sequence[Ask], num_clients: int) -> Round:
    """A round's output tokens in a second; the engine is warmed up first, a few tokens of every request."""
    engine.run([replace(ask, num_tokens=2) for ask in asks[: 2 * num_clients]], num_clients)
    tokens = sum(ask.num_tokens for ask in asks)
    return lambda: tokens / engine.run(asks, num_clients)


def peft_in_turn(bench: PairedBench) -> Pairs:
    """All adapters at once against one after another."""
    num = bench.options.num_adapters
    asks = bench.asks(range(num))
    other = throughput(bench.peft(num, mixed=False), asks, 1)
    return bench.pairs(("ours mixed", "PEFT set_adapter in turn"), bench.alone(asks, hold=num), other)


def peft_mixed(bench: PairedBench) -> Pairs:
    """All adapters at once on both sides."""
    num = bench.options.num_adapters
    asks = bench.asks(range(num))
    other = throughput(bench.peft(num, mixed=True), asks, bench.options.clients)
    return bench.pairs(("ours mixed", "PEFT adapter_names"), bench.alone(asks, hold=num), other)


def peft_one(bench: PairedBench) -> Pairs:
    """One adapter, batched on both sides."""
    asks = bench.asks([0])
    other = throughput(bench.peft(1, mixed=True), asks, bench.options.clients)
    return bench.pairs(("ours on one adapter", "PEFT on one adapter"), bench.alone(asks, hold=1), other)


def adapter_tax(bench: PairedBench) -> Pairs:
    """What mixing adapters costs over the base alone."""
    num = bench.options.num_adapters
    mixed = bench.alone(bench.asks(range(num)), hold=num)
    return bench.pairs(("adapters mixed", "base only"), mixed, bench.alone(bench.asks([None]), hold=0))


def one_adapter(bench: PairedBench) -> Pairs:
    """What one adapter costs over the base alone."""
    adapted = bench.alone(bench.asks([0]), hold=1)
    return bench.pairs(("one adapter", "base only"), adapted, bench.alone(bench.asks([None]), hold=0))


def sampled(name: str, params: SamplingParams) -> Callable[[PairedBench], Pairs]:
    """What drawing tokens costs over taking the likeliest."""

    def scenario(bench: PairedBench) -> Pairs:
        greedy = bench.asks([None])
        drawn = [replace(ask, params=params) for ask in greedy]
        return bench.pairs((name, "greedy"), bench.alone(drawn, hold=0), bench.alone(greedy, hold=0))

    return scenario


def stock_generate(bench: PairedBench) -> Pairs:
    """The base alone on both sides."""
    asks = bench.asks([None])
    other = throughput(bench.stock(), asks, bench.options.clients)
    return bench.pairs(("ours", "transformers generate"), bench.alone(asks, hold=0), other)


def zipf_64(bench: PairedBench) -> Pairs:
    """What more adapters cost: as many clients on 64 as on 8."""
    rng, mix = random.Random(bench.options.seed), Mix([str(number) for number in range(MANY)], 1.0)
    count = max(bench.options.requests, 2 * MANY_CLIENTS)
    many = bench.asks([int(mix.draw(rng)) for _ in range(count)], count)
    few = bench.asks(range(FEW), count)
    return bench.pairs(
        ("64 adapters, Zipf", "8 adapters"),
        bench.alone(many, hold=MANY, num_clients=MANY_CLIENTS),
        bench.alone(few, hold=MANY, num_clients=MANY_CLIENTS),
    )


def openvino(adapters: Callable[[int], Sequence[int | None]]) -> Callable[[PairedBench], Pairs]:
    """Against OpenVINO GenAI, on the base, one adapter or several."""

    def scenario(bench: PairedBench) -> Pairs:
        if bench.options.openvino is None or (reason := missing()) is not None:
            raise SystemExit(
                reason if bench.options.openvino else "--openvino must name a folder of the converted base"
            )
        chosen = adapters(bench.options.num_adapters)
        asks, held = bench.asks(chosen), sum(adapter is not None for adapter in chosen)
        ours = bench.alone(asks, hold=held)
        engine = OpenVino(bench.options.openvino, bench.adapters[:held], max_num_seqs=bench.options.clients)
        return bench.pairs(("ours", "OpenVINO GenAI"), ours, throughput(engine, asks, bench.options.clients))

    return scenario


SCENARIOS: dict[str, Callable[[PairedBench], Pairs]] = {
    "peft-in-turn": peft_in_turn,
    "peft-mixed": peft_mixed,
    "peft-one": peft_one,
    "adapter-tax": adapter_tax,
    "one-adapter": one_adapter,
    "zipf-64": zipf_64,
    "temperature-1": sampled("temperature 1", SamplingParams()),
    "top-p": sampled("top_p 0.95", SamplingParams(top_p=0.95)),
    "generate": stock_generate,
    "openvino-base": openvino(lambda num: [None]),
    "openvino-one": openvino(lambda num: [0]),
    "openvino-mixed": openvino(range),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--base", type=base_argument, default=EMBEDDED_BASE, help=BASE_MODEL_HELP)
    parser.add_argument("--adapters", type=Path, help="a folder of adapter folders; without it, random ones are made")
    parser.add_argument("--num-adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters that are made")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="of ours and of generate")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--quantization", default="none", help="our side's linears: none or int8")
    parser.add_argument("--openvino", type=Path, metavar="FOLDER", help="the base as optimum-intel has converted it")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="in a round, all clients together")
    parser.add_argument("--prompt-tokens", type=int, default=125)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every round here")
    return parser.parse_args(arguments)


def find_adapters(options: argparse.Namespace, scratch: Path) -> list[Path]:
    """Those of the folder that is named, or random ones; as many as the scenarios need. Exits where there are fewer."""
    wanted = max(options.num_adapters, MANY if "zipf-64" in options.scenarios else 1)
    if options.adapters is None:
        names = [f"a{number}" for number in range(wanted)]
        return write_adapters(find_base(options.base), scratch, names, rank=options.rank)
    found = sorted(path.parent for path in options.adapters.glob("*/adapter_config.json"))
    if len(found) < wanted:
        raise SystemExit(f"{options.adapters} has {len(found)} adapters, and {wanted} are needed")
    return found[:wanted]


def main() -> None:
    """Measure, print a table for each scenario, and write JSON."""
    options = parse()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = PairedBench(options, find_adapters(options, Path(scratch)))
        for name in options.scenarios:
            pairs = SCENARIOS[name](bench)
            results[name] = pairs.as_json()
            print(f"\n{name}\n{pairs.as_table()}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"options": vars(options), "results": results}, indent=1, default=str))


if __name__ == "__main__":
    main()
