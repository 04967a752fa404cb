"""One request after another, with speculation and without: what drafts gain, and what they cost where they never hit.

    python -m benchmarks.speculation [--adapter adapters/helpdesk] [--prompts 24] [--pairs 5]
    python -m benchmarks.speculation --text random [--base BASE] [--dtype bfloat16]

Without ``--text`` the prompts are questions on Python in wordings as users have them, asked of the adapter, greedy.
With ``--text random`` tokens are drawn at temperature 100 from all of the vocabulary, so that drafts never hit; with
``--text base`` the questions go to the base alone at temperature 1. Both sides get the same prompts, ``--at-once`` of
them on one side, then on the other; in each pair they begin with an empty memory. A group's time is the median over
the pairs, and the ratio is of the sums: what disturbs the machine for a moment counts for little.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE
from benchmarks.parts.bases import HELPDESKS, base_argument
from cpu_kernels.cores import default_threads
from server.adapters.content.manifest import AdapterPolicy, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.metrics import Metrics
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.sequence import LoRARequest, SamplingParams, Sequence
from server.settings import Settings
from server.text.detokenizer import Detokenizer
from server.text.prompt import PromptRenderer
from trainer.micro.topics.python_facts import facts

CONTEXT = 512
DRAFTS: int = Settings.model_fields["max_draft_tokens"].default


@dataclass
class Side:
    """An engine with speculation or without, its output tokens for each prompt, and the ``seconds`` of each group."""

    engine: Engine
    answers: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def counted(self, name: str) -> int:
        return int(self.engine.metrics.registry.get_sample_value(f"quickchange_{name}_total") or 0)


@dataclass
class SpeculationBench:
    """A base, one adapter or none, and how to ask."""

    base: Base
    runner: ModelRunner
    adapters: tuple[LoRARequest, ...]
    stop: tuple[str, ...]
    temperature: float
    num_tokens: int
    at_once: int

    def side(self, drafts: int) -> Side:
        scheduler = Scheduler(
            max_num_seqs=self.at_once, max_num_batched_tokens=512, max_model_len=CONTEXT, max_draft_tokens=drafts
        )
        return Side(Engine(scheduler, self.runner, Sampler(self.base.kernels.softmax_rows), Metrics()))

    def pair(self, prompts: list[list[int]], drafts: int) -> tuple[Side, Side]:
        """Every prompt on both sides, ``at_once`` at a time, in turns who is first."""
        sides = self.side(drafts), self.side(0)
        for number, first in enumerate(range(0, len(prompts), self.at_once)):
            for side in sides if number % 2 else reversed(sides):
                self.ask(side, prompts[first : first + self.at_once])
        return sides

    def ask(self, side: Side, prompts: list[list[int]]) -> None:
        """A group of prompts, from the first step to the last."""
        decode = PromptRenderer(self.base.tokenizer).decode
        detokenizers = [Detokenizer(decode, self.stop) for _ in prompts]
        first, engine = len(side.answers), side.engine
        side.answers += [[] for _ in prompts]
        stopped: set[int] = set()
        since = time.perf_counter()
        for number, prompt in enumerate(prompts, start=first):
            engine.add(self._sequence(number, prompt))
        while not engine.idle:
            outputs = engine.step()
            engine.record_step(outputs, 0.0)
            for output in outputs:
                number, token = output.sequence_id, output.token
                if token is None or number in stopped:
                    continue
                side.answers[number].append(token.id)
                detokenizers[number - first].push(token)
                if detokenizers[number - first].stopped:
                    stopped.add(number)
                    engine.abort(number)
        side.seconds.append(time.perf_counter() - since)

    def _sequence(self, number: int, prompt: list[int]) -> Sequence:
        params = SamplingParams(temperature=self.temperature, seed=number)
        ends = frozenset() if self.temperature > 1 else self.base.eos_ids
        return Sequence(number, tuple(prompt), self.num_tokens, params, self.adapters, ends)


def questions(base: Base, count: int) -> list[list[int]]:
    """Prompts of different facts in frames and phrases that users might choose."""
    rng, prompts = random.Random("as users have them"), PromptRenderer(base.tokenizer, vocab_size=base.vocab_size)
    asked = [fact.question(rng) for fact in rng.sample(facts(), count)]
    return [prompts.chat([{"role": "user", "content": question}]) for question in asked]


def build(options: argparse.Namespace) -> tuple[SpeculationBench, list[list[int]]]:
    base = load_base(options.base, name="base", device="cpu", dtype=options.dtype, max_model_len=CONTEXT)
    runner = ModelRunner.of(base, num_slots=options.at_once, max_len=CONTEXT)
    adapters: tuple[LoRARequest, ...] = ()
    stop: tuple[str, ...] = ()
    if options.text == "adapter":
        manifest = read_manifest(options.adapter, base.signature, AdapterPolicy(256, 1 << 30))
        runner.add_adapter(manifest.weights_digest, runner.prepare(manifest))
        adapters, stop = (LoRARequest(manifest.weights_digest),), manifest.defaults.stop
    temperature = {"adapter": 0.0, "base": 1.0, "random": 100.0}[options.text]
    bench = SpeculationBench(base, runner, adapters, stop, temperature, options.output_tokens, options.at_once)
    if options.text != "random":
        return bench, questions(base, options.prompts)
    rng = random.Random(0)
    return bench, [[rng.randrange(100, base.vocab_size) for _ in range(30)] for _ in range(options.prompts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=base_argument, default=EMBEDDED_BASE, help=BASE_MODEL_HELP)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--adapter", type=Path, help="default: the helpdesk of this base in adapters/")
    parser.add_argument("--text", default="adapter", choices=("adapter", "base", "random"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--at-once", type=int, default=1, help="sequences computed at once")
    parser.add_argument("--drafts", type=int, default=DRAFTS, help="tokens drafted for a sequence in a step at most")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    if options.text == "adapter" and options.adapter is None:
        if options.base not in HELPDESKS:
            parser.error(f"--adapter: {options.base} has none in adapters/; name one, or --text base or random")
        options.adapter = Path("adapters", HELPDESKS[options.base])
    torch.set_num_threads(default_threads())
    bench, prompts = build(options)
    bench.pair(prompts[: 2 * options.at_once], options.drafts)
    pairs = [bench.pair(prompts, options.drafts) for _ in range(options.pairs)]
    on, off = pairs[-1]
    on_seconds, off_seconds = (
        sum(statistics.median(times) for times in zip(*(pair[side].seconds for pair in pairs), strict=True))
        for side in (0, 1)
    )
    num_tokens = sum(map(len, on.answers))
    report = {
        **{name: str(value) for name, value in vars(options).items()},
        "equal_answers": sum(a == b for a, b in zip(on.answers, off.answers, strict=True)),
        "num_tokens": num_tokens,
        "drafted": on.counted("draft_tokens"),
        "accepted": on.counted("accepted_draft_tokens"),
        "on_tokens_per_s": round(num_tokens / on_seconds, 1),
        "off_tokens_per_s": round(num_tokens / off_seconds, 1),
        "ratio": round(off_seconds / on_seconds, 3),
        "ratios_of_pairs": [round(sum(off.seconds) / sum(on.seconds), 3) for on, off in pairs],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
