"""One request after another, with speculation and without: what drafts gain, and what they cost where they never hit.

    python -m benchmarks.speculation [--adapter adapters/helpdesk] [--prompts 24] [--pairs 5]
    python -m benchmarks.speculation --text random [--base FOLDER] [--dtype bfloat16]

Without ``--text`` the prompts are questions on Python in wordings as users have them, asked of the adapter, greedy.
With ``--text random`` the tokens are drawn at temperature 100 from all of the vocabulary, so that no draft can be right,
and with ``--text base`` the questions go to the base alone at temperature 1. Both sides get the same prompts in the
same process, alternating; each begins with an empty memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from server.adapters.content.manifest import Limits, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.metrics import Metrics
from server.model.device import available_threads
from server.model.loader import Base, load_base
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.sequence import AdapterUse, SamplingParams, Sequence
from server.settings import Settings
from server.text.detokenizer import Detokenizer
from server.text.prompt import PromptRenderer
from trainer.micro.topics.python_facts import facts

CONTEXT = 512
DRAFTS: int = Settings.model_fields["max_draft_tokens"].default


@dataclass(frozen=True)
class Round:
    """All prompts once: seconds, the tokens of each answer, and how many tokens were drafted and right."""

    seconds: float
    answers: list[list[int]]
    drafted: float
    accepted: float

    @property
    def tokens_per_second(self) -> float:
        """Output tokens, prompts' time included."""
        return sum(map(len, self.answers)) / self.seconds


@dataclass
class Bench:
    """A base, one adapter or none, and how to ask."""

    base: Base
    runner: ModelRunner
    adapters: tuple[AdapterUse, ...]
    stop: tuple[str, ...]
    temperature: float
    num_tokens: int
    at_once: int

    def round(self, prompts: list[list[int]], *, drafts: int) -> Round:
        """Every prompt, ``at_once`` at a time, on an engine that remembers nothing."""
        scheduler = Scheduler(
            max_num_seqs=self.at_once, max_num_batched_tokens=512, max_model_len=CONTEXT, max_draft_tokens=drafts
        )
        engine = Engine(scheduler, self.runner, Sampler(), Metrics())
        answers: list[list[int]] = [[] for _ in prompts]
        detokenizers = [Detokenizer(PromptRenderer(self.base.tokenizer).decode, self.stop) for _ in prompts]
        stopped: set[int] = set()
        since = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add(self._sequence(number, prompt))
        while not engine.idle:
            outputs = engine.step()
            engine.account(outputs, 0.0)
            for output in outputs:
                if output.token_id is None or (number := output.sequence_id) in stopped:
                    continue
                answers[number].append(output.token_id)
                detokenizers[number].push(output.token_id)
                if detokenizers[number].stopped:
                    stopped.add(number)
                    engine.abort(number)
        seconds = time.perf_counter() - since
        counted = [
            engine.metrics.registry.get_sample_value(f"quickchange_{name}_tokens_total") or 0.0
            for name in ("draft", "accepted_draft")
        ]
        return Round(seconds, answers, *counted)

    def _sequence(self, number: int, prompt: list[int]) -> Sequence:
        params = SamplingParams(temperature=self.temperature, seed=number)
        ends = frozenset() if self.temperature > 1 else self.base.eos_ids
        return Sequence(number, tuple(prompt), self.num_tokens, params, self.adapters, ends)


def questions(base: Base, count: int) -> list[list[int]]:
    """Prompts of different facts in frames and phrases that users might choose."""
    rng, prompts = random.Random("as users have them"), PromptRenderer(base.tokenizer, vocab_size=base.vocab_size)
    asked = [fact.question(rng) for fact in rng.sample(facts(), count)]
    return [prompts.chat([{"role": "user", "content": question}]) for question in asked]


def build(options: argparse.Namespace) -> tuple[Bench, list[list[int]]]:
    """The base with its adapter, and the prompts."""
    base = load_base(options.base, name="base", device="cpu", dtype=options.dtype, max_model_len=CONTEXT)
    runner = ModelRunner(base.model, base.attention, base.shapes, num_slots=options.at_once, max_len=CONTEXT)
    adapters: tuple[AdapterUse, ...] = ()
    stop: tuple[str, ...] = ()
    if options.text == "adapter":
        manifest = read_manifest(options.adapter, base.signature, Limits(256, 1 << 30))
        runner.add_adapter(manifest.weights_digest, runner.prepare(manifest))
        adapters, stop = (AdapterUse(manifest.weights_digest),), manifest.defaults.stop
    temperature = {"adapter": 0.0, "base": 1.0, "random": 100.0}[options.text]
    bench = Bench(base, runner, adapters, stop, temperature, options.output_tokens, options.at_once)
    if options.text != "random":
        return bench, questions(base, options.prompts)
    rng = random.Random(0)
    return bench, [[rng.randrange(100, base.vocab_size) for _ in range(30)] for _ in range(options.prompts)]


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="micro", help="'micro', a folder or a hub id")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--adapter", type=Path, default=Path("adapters/helpdesk"))
    parser.add_argument("--text", default="adapter", choices=("adapter", "base", "random"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--at-once", type=int, default=1, help="sequences computed at once")
    parser.add_argument("--drafts", type=int, default=DRAFTS, help="tokens drafted for a sequence in a step at most")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(available_threads())
    bench, prompts = build(options)
    bench.round(prompts[:2], drafts=options.drafts)
    pairs = [
        (bench.round(prompts, drafts=options.drafts), bench.round(prompts, drafts=0)) for _ in range(options.pairs)
    ]
    ratios = [off.seconds / on.seconds for on, off in pairs]
    last = pairs[-1][0]
    print(
        json.dumps(
            {
                **{name: str(value) for name, value in vars(options).items()},
                "equal_answers": sum(a == b for a, b in zip(last.answers, pairs[-1][1].answers, strict=True)),
                "output_tokens_of_all": sum(map(len, last.answers)),
                "drafted": int(last.drafted),
                "accepted": int(last.accepted),
                "on_tokens_per_s": round(statistics.median(on.tokens_per_second for on, _ in pairs), 1),
                "off_tokens_per_s": round(statistics.median(off.tokens_per_second for _, off in pairs), 1),
                "median_ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
