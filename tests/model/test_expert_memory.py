"""Loading a mixture of experts as int8 holds no more than an expert in floats beside what is served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.parts.random_tokenizer import save_tokenizer
from tests.model.families import _config, build_from
from tests.model.mxfp4_bases import save_gpt_oss
from tests.serving import ROOT
from tests.tables import wide

VOCAB_SIZE, HIDDEN, LAYERS, EXPERTS = 2000, 512, 4, 32


def save_qwen3_moe(folder: Path) -> None:
    """In bfloat16, with matrices of every expert."""
    config = _config(
        "Qwen3MoeConfig", vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, intermediate_size=HIDDEN,
        moe_intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, num_experts=EXPERTS, num_experts_per_tok=4, max_position_embeddings=256,
        eos_token_id=VOCAB_SIZE - 3, pad_token_id=VOCAB_SIZE - 2, bos_token_id=None,
    )  # fmt: skip
    build_from(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder, VOCAB_SIZE)


@wide
@pytest.mark.parametrize("form", ["MXFP4", "matrices"])
def test_the_peak_is_at_most_a_third_above_what_is_served(form: str, tmp_path: Path) -> None:
    """Measured with 100 MB of integers: 1.01 to 1.12 times of them from MXFP4, 1.14 from bfloat16."""
    if form == "MXFP4":
        save_gpt_oss(tmp_path, vocab_size=VOCAB_SIZE, hidden=HIDDEN, units=HIDDEN, layers=LAYERS, experts=EXPERTS)
    else:
        save_qwen3_moe(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.int8_memory", str(tmp_path), "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["int8"] > 100
    assert found["peak"] < 1.3 * (found["int8"] + found["floats"]), found
