"""How much of a base's understanding int8 costs, alone and with each demo adapter, against the same base in float32.

    python -m benchmarks.int8_accuracy [--base BASE] [--data FOLDER] [--windows 40] [--show 3]

Reads texts that come with the repository: new conversations of the kinds micro was trained on, a licence, and on micro
the demo adapters' own conversations. With --data, a folder with ``english``, ``gutenberg`` and ``tinyshakespeare`` as
in CONTRIBUTING.md, also books. For each text: perplexity in float32, by how much int8's is above it, the share of
places with the same likeliest token, and the mean Kullback-Leibler divergence of int8's probabilities in thousandths
of a nat, which is far less a matter of luck. On micro also what single parts cost.

Then both answer twenty everyday questions, greedily: the same figures for int8 that reads the answers of float32, and
how many of each one's own answers end in a loop (``parts/everyday.py``). --show prints some of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import torch

from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE
from benchmarks.parts.bases import base_argument
from benchmarks.parts.everyday import MAX_TOKENS, QUESTIONS, Answered, ask, num_loops
from benchmarks.parts.perplexity import (
    LENGTH,
    ROOT,
    Comparison,
    Reader,
    Windows,
    adapter_texts,
    book,
    compare,
    own_texts,
)
from cpu_kernels.cores import default_threads
from cpu_kernels.int8_weights import QMAX_16BIT_SAFE
from cpu_kernels.kernels import Kernels
from server.model.loader import Base, load_base
from server.text.repetition import LOOP_LENGTH, MAX_PERIOD, is_loop

_BOOKS = ("Little-Women_514.txt", "The-Time-Machine_35.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=base_argument, default=EMBEDDED_BASE, help=BASE_MODEL_HELP)
    parser.add_argument("--data", type=Path, help="a folder with books")
    parser.add_argument("--windows", type=int, default=40, help=f"windows of {LENGTH} tokens of each text, at most")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the answers to the first N questions")
    options = parser.parse_args()
    torch.set_num_threads(default_threads())
    floats, int8 = (
        Reader(_load(options.base, quantization), num_slots=len(QUESTIONS)) for quantization in ("none", "int8")
    )
    tokenizer = floats.base.tokenizer
    texts = dict(own_texts(tokenizer, num_windows=options.windows))
    for name in _BOOKS if options.data else ():
        texts[Path(name).stem] = book(tokenizer, options.data / "english" / name, num_windows=options.windows)
    print("| model | text | tokens | float32 perplexity | int8 increase | same top-1 token | KL divergence / 1000 |")
    print("|---|---|---|---|---|---|---|")
    for name, windows in texts.items():
        print(_row("the base", name, compare(int8, floats, windows)))
    if options.base == EMBEDDED_BASE:
        of_adapters = adapter_texts(tokenizer, options.data, num_windows=options.windows)
        for adapter, (name, windows) in of_adapters.items():
            both = (int8.add(ROOT / "adapters" / adapter), floats.add(ROOT / "adapters" / adapter))
            print(_row(adapter, name, compare(int8, floats, windows, both)))
    if tokenizer.chat_template:
        answered = ask(int8, floats)
        print(_row("the base", "answers of float32", answered.comparison))
        _print_answers(answered)
        _print_texts(answered, floats, num_shown=options.show)
    else:
        print("\nThe base has no chat template: it is asked no questions.")
    if options.base == EMBEDDED_BASE:
        _print_parts(texts)


def _print_answers(found: Answered) -> None:
    """How the bases' own answers end."""
    print(f"\n{len(QUESTIONS)} everyday questions, greedy, at most {MAX_TOKENS} tokens. A loop: the last {LOOP_LENGTH}")
    print(f"tokens have a period of at most {MAX_PERIOD}.\n")
    print("| | float32 | int8 |\n|---|---|---|")
    print(f"| answers that end in a loop | {num_loops(found.other_answers)} | {num_loops(found.answers)} |")
    print(f"| answers equal to float32's | | {found.num_same} |")


def _print_texts(found: Answered, reader: Reader, *, num_shown: int) -> None:
    """The answers to the first questions, those that end in a loop marked."""
    shown = zip(QUESTIONS[:num_shown], found.other_answers, found.answers, strict=False)
    for question, float_answer, int8_answer in shown:
        print(f"\n### {question}")
        for name, ids in (("float32", float_answer), ("int8", int8_answer)):
            text = reader.base.tokenizer.decode(ids, skip_special_tokens=True)
            print(f"\n{name}{' (a loop)' if is_loop(ids) else ''}: {text}")


def _print_parts(texts: Mapping[str, Windows]) -> None:
    """The same with one part changed; each on a base of its own, since adapters stay on the one that read them."""
    embedding = _load("micro", "int8")
    exact = Reader(_load("micro", "none"))
    embedding.model.set_input_embeddings(exact.base.model.get_input_embeddings())
    with patch("server.model.quantizer.find_outliers", lambda x: None):
        unprotected = _load("micro", "int8")
    with patch.object(Kernels, "qmax", QMAX_16BIT_SAFE):
        half = _load("micro", "int8")
    readers = {
        "int8 as it is served": Reader(_load("micro", "int8")),
        "its keys and values in float32": Reader(_load("micro", "int8"), kv_dtype=torch.float32),
        "its embedding in float32": Reader(embedding),
        "no column in floats": Reader(unprotected),
        "weights of half the levels, as without VNNI": Reader(half),
        "float32, but keys and values in bfloat16": Reader(_load("micro", "none"), kv_dtype=torch.bfloat16),
    }
    print(f"\n| KL divergence / 1000 | {' | '.join(texts)} |")
    print(f"|---|{'---|' * len(texts)}")
    for name, reader in readers.items():
        found = [f"{1000 * compare(reader, exact, windows).divergence:.2f}" for windows in texts.values()]
        print(f"| {name} | {' | '.join(found)} |")


def _row(model: str, text: str, found: Comparison) -> str:
    perplexity = math.exp(found.other_loss)
    return (
        f"| {model} | {text} | {found.num_tokens:,} | {perplexity:.2f} | {found.excess:+.2%} | {found.agreement:.1%} | "
        f"{1000 * found.divergence:.2f} |"
    )


def _load(base: str, quantization: str) -> Base:
    return load_base(base, name="base", device="cpu", dtype="float32", max_model_len=LENGTH, quantization=quantization)


if __name__ == "__main__":
    main()
