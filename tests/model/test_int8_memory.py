"""A base that becomes int8 is never all in memory in floats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from base_files.source import FolderBase
from base_files.stock_model import stock_model, stock_tokenizer
from benchmarks.parts.random_tokenizer import save_tokenizer
from tests.gguf_models import model_arrays, model_metadata, tokenizer_metadata, write_gguf_model
from tests.model.hub_layout import as_in_hub_cache
from tests.serving import ROOT

VOCAB_SIZE = 16_000


def build(folder: Path) -> int:
    """A random base in float32; megabytes of its file."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=VOCAB_SIZE - 3,
        pad_token_id=VOCAB_SIZE - 2,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder, VOCAB_SIZE)
    return (folder / "model.safetensors").stat().st_size // 1_000_000


def measured(base: Path, weights: str) -> dict[str, float]:
    """Megabytes by which a process grows that loads the base."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.int8_memory", str(base), "--weights", weights, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_a_gguf_is_never_all_in_memory_in_float32(weights: str, tmp_path: Path) -> None:
    """Its blocks are dequantized piece by piece: with all weights in float32 beside what is served it would be more."""
    build(tmp_path / "base")
    source = FolderBase(tmp_path / "base")
    tokenizer = stock_tokenizer(source)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    model = stock_model(source)
    metadata = model_metadata(model, "qwen2") | tokenizer_metadata(tokenizer, VOCAB_SIZE, "qwen2")
    path = write_gguf_model(
        tmp_path / "base.gguf", "qwen2", model_arrays(model, "qwen2"), metadata, quantization="Q8_0"
    )
    found = measured(path, weights)
    served = found["int8"] + found["floats"]
    assert served > 45
    assert found["peak"] < 1.6 * served + 60, found  # in float32 alone: 4 x the integers, 2 x bfloat16


def test_loading_holds_little_more_than_the_integers(tmp_path: Path) -> None:
    """The files are links, as a hub's cache has them: of such bases no page was given back once."""
    megabytes = build(tmp_path / "base")
    folder = as_in_hub_cache(tmp_path / "base", tmp_path / "cache")
    found = measured(folder, "int8")
    assert 4 * found["int8"] > 0.99 * megabytes
    assert found["peak"] < 1.6 * found["int8"] + 60, found
    assert found["peak"] < 0.75 * megabytes, found  # with the whole file in memory: 1.3
