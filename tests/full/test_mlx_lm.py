"""Adapters trained by mlx-lm itself, on a CPU: converted, they give the logits that mlx-lm gives.

mlx-lm gets a virtual environment of its own, since it brings another machine's arithmetic and its own dependencies.
"""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.cli.convert.command import main
from tests.model.foreign_adapters import logits_of
from tests.tiny_models import build_tiny_base

PACKAGES = ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")
PROMPTS = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(7))
"""Those of ``logits_of``."""

ROUNDING = 1e-4
"""Two libraries' float32, as a share of the largest logit."""

LOGITS = """\
import json, sys
import mlx.core as mx, numpy as np
from mlx_lm import load

base, adapter, out = sys.argv[1:]
model, _ = load(base, adapter_path=adapter)
np.save(out, np.array(model(mx.array(json.load(sys.stdin))).astype(mx.float32)))
"""

KINDS = {
    "every linear": ("lora", None),
    "DoRA": ("dora", ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]),
    "an embedding, tied to the head": ("lora", ["self_attn.o_proj", "model.embed_tokens"]),
}


def run(*command: str, said: str = "") -> None:
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def mlx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter that has mlx-lm."""
    folder = tmp_path_factory.mktemp("mlx")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES)
    return python


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_answers_as_in_mlx_lm(kind: str, mlx: str, base_folder: Path, tmp_path: Path) -> None:
    fine_tune_type, keys = KINDS[kind]
    folder = tmp_path / "pirate"
    lines = "".join(json.dumps({"text": f"The quick brown fox number {number} jumps."}) + "\n" for number in range(8))
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    parameters = {"rank": 4, "scale": 8.0, "dropout": 0.0} | ({} if keys is None else {"keys": keys})
    (tmp_path / "lora.yaml").write_text(json.dumps({"lora_parameters": parameters}))  # JSON is YAML
    training = (
        f"lora --train --model {base_folder} --data {tmp_path} --adapter-path {folder} -c {tmp_path / 'lora.yaml'}"
    )
    numbers = f"--iters 8 --batch-size 4 --num-layers 2 --learning-rate 1e-2 --fine-tune-type {fine_tune_type}"
    run(mlx, "-m", "mlx_lm", *training.split(), *numbers.split())
    run(mlx, "-c", LOGITS, str(base_folder), str(folder), str(tmp_path / "a.npy"), said=json.dumps(PROMPTS.tolist()))
    settings = [f"--base-model={base_folder}", f"--adapters-dir={tmp_path / 'adapters'}", "--threads=1"]
    assert main([str(folder), *settings]) == 0
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    theirs = torch.from_numpy(np.load(tmp_path / "a.npy"))
    ours, plain = logits_of(base, tmp_path / "adapters" / "pirate"), logits_of(base)
    assert float((theirs - plain).abs().max()) > 0.1 * float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < ROUNDING * float(theirs.abs().max())
