"""The cost of a grammar: milliseconds a token of constrained sequences over those of free ones, in alternating rounds.

    python -m benchmarks.structured [--base smollm2] [--quantization int8] [--rows 1]

``string``: JSON whose text is chosen token by token, so that only the mask costs. ``form``: objects whose keys are
forced, so that many tokens need no step of their own. Greedy, without speculation; nothing ends early.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch

from base_files.names import BASE_MODEL_HELP
from benchmarks.parts.bases import base_argument
from benchmarks.parts.engines import GREEDY, Ask, InProcessEngine, in_process_engine
from benchmarks.parts.pairs import Round, alternate
from cpu_kernels.cores import default_threads
from server.cli.allocation import keep_freed_memory
from server.text.grammar.compiler import GrammarCompiler
from server.text.grammar.grammar import json_schema
from server.text.grammar.schema import Source
from server.text.prompt import PromptRenderer

LONG = {"type": "string", "minLength": 100_000}
FORM = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 12},
        "quantity": {"type": "integer", "maximum": 99},
    },
    "required": ["customer_name", "quantity"],
    "additionalProperties": False,
}
SCHEMAS = {"string": LONG, "form": {"type": "array", "items": FORM, "minItems": 1000}}


def parse(arguments: SequenceOf[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=base_argument, default=base_argument("micro"), help=BASE_MODEL_HELP)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--quantization", default="none", help="none or int8")
    parser.add_argument("--rows", type=int, default=1, help="sequences that decode at the same time")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--pairs", type=int, default=8)
    return parser.parse_args(arguments)


def side(engine: InProcessEngine, ask: Ask, rows: int) -> Round:
    """Milliseconds a token of ``rows`` equal requests, without their prompts' step."""

    def milliseconds() -> float:
        for _ in range(rows):
            engine.add(ask)
        num_tokens = len(engine.step())
        since, before = time.perf_counter(), num_tokens
        while not engine.engine.idle:
            num_tokens += len(engine.step())
        return 1000 * (time.perf_counter() - since) / (num_tokens - before)

    return milliseconds


def main() -> None:
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(default_threads())
    engine = in_process_engine(
        options.base, dtype=options.dtype, quantization=options.quantization, max_num_seqs=options.rows, max_len=1024
    )
    prompts = PromptRenderer(engine.base.tokenizer, vocab_size=engine.base.vocab_size)
    free = Ask(tuple(prompts.chat([{"role": "user", "content": "Tell me about London."}])), options.tokens)
    compiler = GrammarCompiler()
    for name, schema in SCHEMAS.items():
        grammar = compiler.compile(json_schema(schema, Source("schema", name)), prompts.grammar_tokenizer)
        constrained = replace(free, params=replace(GREEDY, grammar=grammar))
        sides = (side(engine, constrained, options.rows), side(engine, free, options.rows))
        for warm_up in sides:
            warm_up()
        print(alternate((name, "free"), sides, num_pairs=options.pairs, unit="ms/token").as_table())


if __name__ == "__main__":
    main()
