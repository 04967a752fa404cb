"""llama.cpp's own converter of adapters, and what ``adapters convert`` makes of its files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.cli.convert.gguf import read_gguf_adapter
from server.cli.convert.lora_folder import write_lora_folder
from tests.model.foreign_adapters import PROVED, base, make_peft, signature_of


@pytest.mark.parametrize(("architecture", "family"), PROVED)
def test_what_llama_cpp_converted_comes_back_to_the_bit(
    architecture: str, family: str, llama_cpp: Path, tmp_path: Path
) -> None:
    model = base(family)
    model.save_pretrained(tmp_path / "base")
    targets = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    fields = {"target_modules": targets} if family in ("llama", "qwen2") else {}
    source = make_peft(model, tmp_path / "peft", **fields)
    script = [str(llama_cpp / "convert_lora_to_gguf.py"), "--base", str(tmp_path / "base")]
    path = tmp_path / "adapter.gguf"
    done = subprocess.run(
        [sys.executable, *script, "--outfile", str(path), str(source)],
        env={**os.environ, "PYTHONPATH": str(llama_cpp / "gguf-py")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    adapter = read_gguf_adapter(path, max_bytes=1 << 24)
    assert adapter.architecture == architecture and adapter.alpha == 6
    tensors = adapter.convert(signature_of(model), model.config.get_text_config())
    write_lora_folder(tmp_path, tensors, base_model="base")
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
