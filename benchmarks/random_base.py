"""Make a base of random weights in a real model's shape, and random adapters for it, to measure speed.

    python -m benchmarks.random_base SHAPE FOLDER [--adapters 8] [--rank 8]

writes FOLDER/base (config, bf16 weights, tokenizer: what transformers saves) and FOLDER/adapters/a0, a1, ... (what
PEFT saves). Nothing is downloaded; the same seed gives the same files. With SHAPE ``none`` only adapters are written,
for the base that --base names.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from base_files.locate import find_base
from base_files.names import BASE_MODEL_HELP
from base_files.source import BaseSource, FolderBase
from benchmarks.parts.bases import base_argument
from benchmarks.parts.random_adapters import PROJECTIONS, write_adapters
from benchmarks.parts.random_tokenizer import save_tokenizer

QWEN: Mapping[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen2.5-0.5b": {
        **QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "qwen2.5-1.5b": {
        **QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
    },
    "tiny": {
        **QWEN,
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


def write_base(shape: str, folder: Path, *, seed: int = 0) -> Path:
    """A model of random weights in bfloat16 with a tokenizer of its vocabulary's size."""
    settings = dict(SHAPES[shape])
    vocab_size = int(settings["vocab_size"])
    # The tokenizer's special tokens are its last: what ends a turn, then what pads.
    config = AutoConfig.for_model(
        **settings, eos_token_id=vocab_size - 3, pad_token_id=vocab_size - 2, bos_token_id=None
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(folder, vocab_size)
    return folder


def main() -> None:
    """Write what the command line names, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=(*SHAPES, "none"))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--base", type=base_argument, help=f"the base of the adapters where SHAPE is none: {BASE_MODEL_HELP}"
    )
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=list(PROJECTIONS))
    parser.add_argument("--adapter-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.shape == "none") != (options.base is not None):
        parser.error("--base goes with the shape 'none', and with no other")
    if options.shape == "none":
        base: BaseSource = find_base(options.base)
    else:
        base = FolderBase(write_base(options.shape, options.folder / "base", seed=options.seed))
        print(f"base      {base.path}")
    write_adapters(
        base,
        options.folder / "adapters",
        [f"a{number}" for number in range(options.adapters)],
        rank=options.rank,
        targets=options.targets,
        dtype=getattr(torch, options.adapter_dtype),
        seed=options.seed,
    )
    print(f"adapters  {options.folder / 'adapters'} ({options.adapters} of rank {options.rank})")


if __name__ == "__main__":
    main()
