"""Eight requests on eight adapters: our engine against PEFT, ``set_adapter`` in turn. Pairs, medians, ratios.

    python -m benchmarks.many_adapters [--base micro] [--adapters 8] [--requests 8] [--pairs 5]

Both sides use the same base in the same number format, the same random adapters, the same prompts, and greedy decoding
of a fixed number of tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from server.adapters.content.manifest import Limits, read_manifest
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.metrics import Metrics
from server.model.device import available_threads
from server.model.loader import find_base, load_base
from server.model.runner import ModelRunner
from server.model.sampler import Sampler
from server.sequence import AdapterUse, SamplingParams, Sequence

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapters(base: Path, folder: Path, count: int, rank: int) -> list[Path]:
    """Random adapters on all seven projections, as PEFT saves them."""
    paths = []
    for number in range(count):
        torch.manual_seed(number)
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        paths.append(folder / f"adapter-{number}")
        model.save_pretrained(str(paths[-1]))
    return paths


def ours(
    base_model: str, dtype: str, adapters: list[Path], max_num_seqs: int
) -> Callable[[list[list[int]], int], None]:
    """A function that runs one prompt on each adapter in turn, all in one batch."""
    base = load_base(base_model, name="base", device="cpu", dtype=dtype, max_model_len=512)
    runner = ModelRunner(base.model, base.attention, base.shapes, num_slots=max_num_seqs, max_len=512)
    digests = []
    for path in adapters:
        manifest = read_manifest(path, base.signature, Limits(256, 1 << 30))
        runner.add_adapter(manifest.weights_digest, runner.prepare(manifest))
        digests.append(manifest.weights_digest)
    scheduler = Scheduler(max_num_seqs=max_num_seqs, max_num_batched_tokens=512, max_model_len=512)
    engine = Engine(scheduler, runner, Sampler(), Metrics())

    def run(prompts: list[list[int]], num_tokens: int) -> None:
        for number, prompt in enumerate(prompts):
            uses = (AdapterUse(digests[number % len(digests)]),)
            engine.add(Sequence(number, tuple(prompt), num_tokens, SamplingParams(temperature=0.0), uses))
        while not engine.idle:
            engine.step()

    return run


def peft_in_turn(base_model: str, dtype: str, adapters: list[Path]) -> Callable[[list[list[int]], int], None]:
    """The same with PEFT: one request after another, the adapter set before each."""
    chosen = getattr(torch, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(find_base(base_model), dtype=chosen)
    model = PeftModel.from_pretrained(loaded, adapters[0], adapter_name="0")
    for number, path in enumerate(adapters[1:], start=1):
        model.load_adapter(path, adapter_name=str(number))
    model.eval()

    def run(prompts: list[list[int]], num_tokens: int) -> None:
        for number, prompt in enumerate(prompts):
            model.set_adapter(str(number % len(adapters)))
            model.generate(
                input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens
            )

    return run


def seconds(run: Callable[[list[list[int]], int], None], prompts: list[list[int]], num_tokens: int) -> float:
    """Wall time of one round."""
    since = time.perf_counter()
    run(prompts, num_tokens)
    return time.perf_counter() - since


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="micro", help="'micro', a folder or a hub id")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=125)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(available_threads())
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 4000) for _ in range(options.prompt_tokens)] for _ in range(options.requests)]
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(find_base(options.base), Path(folder), options.adapters, options.rank)
        engine = ours(options.base, options.dtype, adapters, max(options.requests, 1))
        peft = peft_in_turn(options.base, options.dtype, adapters)
        tokens = options.output_tokens * options.requests
        seconds(engine, prompts, 4), seconds(peft, prompts, 4)
        pairs = [
            (seconds(engine, prompts, options.output_tokens), seconds(peft, prompts, options.output_tokens))
            for _ in range(options.pairs)
        ]
    print(
        json.dumps(
            {
                **vars(options),
                "ours_tokens_per_s": round(tokens / statistics.median(mine for mine, _ in pairs), 1),
                "peft_tokens_per_s": round(tokens / statistics.median(theirs for _, theirs in pairs), 1),
                "median_ratio": round(statistics.median(theirs / mine for mine, theirs in pairs), 2),
                "ratios": [round(theirs / mine, 2) for mine, theirs in pairs],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
