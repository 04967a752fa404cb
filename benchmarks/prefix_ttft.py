"""Time to first token of a prompt with a cached prefix, against one with a new prefix.

    python -m benchmarks.prefix_ttft --base BASE [--prefix 500] [--tail 20] [--pairs 7]

In this process, one sequence at a time. Each pair takes a prefix that was never asked before, with a short tail, and
then the same prefix with another tail. An engine that reuses nothing gives a ratio of 1.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE
from benchmarks.parts.bases import base_argument
from benchmarks.parts.engines import Ask, in_process_engine
from benchmarks.parts.pairs import Pairs


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=base_argument, default=EMBEDDED_BASE, help=BASE_MODEL_HELP)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--quantization", default="none", help="none or int8")
    parser.add_argument("--prefix", type=int, default=500, help="tokens")
    parser.add_argument("--tail", type=int, default=20, help="tokens after the prefix, different each time")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print a table, write JSON."""
    options = parse()
    length = options.prefix + options.tail + 8
    given = {"dtype": options.dtype, "quantization": options.quantization}
    engine = in_process_engine(options.base, max_num_seqs=8, max_len=length, prefix_caching=True, **given)
    size, rng = engine.base.vocab_size, random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(size // 16, size - size // 16) for _ in range(count))

    engine.seconds_to_first_token(Ask(ids(options.prefix + options.tail), 2))
    pairs = Pairs(("new prefix", "cached prefix"), "ms to first token")
    for _ in range(options.pairs):
        prefix = ids(options.prefix)
        for rounds in (pairs.left, pairs.right):
            rounds.append(1000 * engine.seconds_to_first_token(Ask(prefix + ids(options.tail), 2)))
    print(pairs.as_table())
    if options.json is not None:
        options.json.write_text(json.dumps({"options": vars(options), **pairs.as_json()}, indent=1, default=str))


if __name__ == "__main__":
    main()
